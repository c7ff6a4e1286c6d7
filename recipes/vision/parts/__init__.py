"""What the vision task is made of: its sources of data, and the tiny models."""
