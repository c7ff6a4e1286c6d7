"""Differences and sums: of two checkpoints, of several deltas."""
