"""The console script `smt`: one module per command, each imports the library only when it runs."""

from smt_trainer.cli.main import main

__all__ = ["main"]
