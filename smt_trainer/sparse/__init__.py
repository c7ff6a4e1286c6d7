"""Modules that train only chosen blocks, their backward, and the rewriting of a model with them."""
