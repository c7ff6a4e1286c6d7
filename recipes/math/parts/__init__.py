"""What the math task is made of: its two sources of data, and its metric."""
