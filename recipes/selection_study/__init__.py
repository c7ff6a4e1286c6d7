"""How long a warm-up has to be: selections after few steps beside those after many, and beside another data order."""
