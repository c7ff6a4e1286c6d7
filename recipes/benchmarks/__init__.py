"""Benchmarks of the library and their results."""
