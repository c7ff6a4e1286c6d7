"""Parts of the vision task: its sources of data, and the tiny models."""
