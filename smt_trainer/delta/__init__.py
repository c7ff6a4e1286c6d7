"""What is saved: the trained blocks, and their merge into a checkpoint."""
