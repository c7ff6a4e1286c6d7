"""Compare training on two ranks with training in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import training_script


def assert_two_ranks_train_like_one_process(folder: Path, **run) -> None:
    """Train with the same global batch on one process and on two ranks, and compare the outcomes.

    Args:
        folder: empty; receives both runs.
        run: passed to `training_script.resumable`; the blocks must be float32.
    """
    found = []
    for processes in (1, 2):
        how = {"per_device_train_batch_size": 4 // processes, "optim": "sgd", "ddp_find_unused_parameters": False}
        assert not any(training_script.launch(folder / str(processes), processes, **how | run))
        found.append(training_script.outcomes(folder / str(processes), processes))
    (single,), (first, second) = found
    for key in ("block_indices", "blocks", "weights"):
        tiny.assert_same(first[key], second[key])
    tiny.assert_same(first["block_indices"], single["block_indices"])
    torch.testing.assert_close(first["blocks"], single["blocks"], rtol=1e-4, atol=1e-5)
    assert first["losses"] == pytest.approx(single["losses"], rel=1e-4)
