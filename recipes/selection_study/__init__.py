"""How long a warm-up must be: compare selections after few and many steps, and between data orders."""
