"""Sparse Matrix Tuning for transformers' Trainer: train the blocks of the weights that matter, freeze the rest.

Names are imported on first use, so that the command line starts without torch.
"""

import importlib

__version__ = "0.2.0"

_HOME = {
    "SMTConfig": "config",
    "SMTError": "errors",
    "BlockSelection": "selection.block_selection",
    "BlockScores": "selection.block_scores",
    "Overlap": "selection.overlap",
    "select_tokens": "selection.tokens",
    "convert_to_smt": "sparse.convert",
    "merge_and_unload": "sparse.convert",
    "Delta": "delta.delta",
    "save_delta": "delta.delta",
    "load_delta": "delta.load",
    "from_delta": "delta.load",
    "push_delta": "delta.hub",
    "applied": "delta.swap",
    "swap": "delta.swap",
    "merge_checkpoint": "merging.merge",
    "verify_merge": "merging.verify",
    "unmerge": "merging.unmerge",
    "extract_delta": "arithmetic.extract",
    "diff_deltas": "arithmetic.diff",
    "compose_deltas": "arithmetic.compose",
    "delta_patches": "export.patches",
    "model_patches": "export.patches",
    "to_sparse_nccl": "export.vllm_patches",
    "to_vllm": "export.vllm_patches",
    "export_lora": "export.lora",
    "SMTCallback": "training.callback",
    "SMTTrainer": "training.trainer",
    "SMTTrainerMixin": "training.trainer",
    "estimate": "estimation.estimate",
    "plot_experts": "plotting",
    "plot_layers": "plotting",
    "plot_overlap": "plotting",
    "plot_scores": "plotting",
    "plot_selection": "plotting",
    "plot_shares": "plotting",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
