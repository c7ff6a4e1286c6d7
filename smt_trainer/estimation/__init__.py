"""Estimate what a run takes, from the model's configuration alone."""
