"""The delta: the folder with the trained blocks, loading it into a model, and the hub."""
