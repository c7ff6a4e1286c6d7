"""Differences of two checkpoints or deltas, and sums of several deltas."""
