"""Sparse Matrix Tuning for transformers' Trainer: train the blocks of the weights that matter, freeze the rest.

Names are imported on first use, so that the command line starts without torch.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "SMTConfig": "config",
    "SMTError": "errors",
    "BlockGrid": "blocks",
    "find_targets": "targets",
    "Scorer": "scores",
    "make_scorer": "scores",
    "collect_scores": "warmup",
    "BlockSelection": "selection",
    "select_blocks": "selection",
    "BlockScores": "block_scores",
    "Overlap": "overlap",
    "SMTLinear": "layers",
    "convert_to_smt": "convert",
    "merge_and_unload": "convert",
    "save_delta": "delta",
    "load_delta": "delta",
    "from_delta": "delta",
    "merge_checkpoint": "merge",
    "Estimate": "estimate",
    "plot_selection": "plotting",
    "plot_layers": "plotting",
    "plot_shares": "plotting",
    "plot_scores": "plotting",
    "plot_overlap": "plotting",
    "OverlapPoint": "plotting",
    "SMTCallback": "callbacks",
    "SMTTrainer": "trainer",
    "SMTTrainerMixin": "trainer",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
