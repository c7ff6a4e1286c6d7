"""Recipes to run: experiments and benchmarks."""
