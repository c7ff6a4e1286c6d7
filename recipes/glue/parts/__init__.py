"""What the glue task is made of: its sources of data."""
