"""Commonsense reasoning: the eight tasks of the SMT paper, with data and model."""
