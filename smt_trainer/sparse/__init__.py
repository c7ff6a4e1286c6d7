"""The rewritten linear, its backward, and rewriting a model with it."""
