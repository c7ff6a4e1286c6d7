"""Instruction following: the user's own instructions and responses."""
