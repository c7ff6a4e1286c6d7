"""The trainer: the only home of transformers' Trainer."""
