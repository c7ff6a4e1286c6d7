"""Measurements of the library, with their results."""
