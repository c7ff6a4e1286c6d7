"""Commonsense reasoning: the eight question sets of the SMT paper."""
