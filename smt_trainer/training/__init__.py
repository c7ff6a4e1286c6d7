"""The trainer: the only package that builds on transformers' Trainer."""
