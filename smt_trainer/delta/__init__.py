"""Save the trained blocks, load them, and merge them into a checkpoint."""
