"""Commonsense reasoning: the eight tasks of the SMT paper, data and model included."""
