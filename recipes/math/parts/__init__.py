"""Parts of the math task: its two sources of data, and its metric."""
