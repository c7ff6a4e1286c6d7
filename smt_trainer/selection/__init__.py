"""From scores and a budget to the chosen blocks."""
