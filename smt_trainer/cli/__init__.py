"""The console script `smt`: one module per command, each imported only when it runs."""

from smt_trainer.cli.main import main

__all__ = ["main"]
