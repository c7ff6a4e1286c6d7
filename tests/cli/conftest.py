"""What the tests of the command line share."""

import arithmetic
import pytest
import tiny

from smt_trainer import BlockScores, merge_checkpoint
from smt_trainer.model.targets import count_parameters, find_targets, target_grids
from smt_trainer.scores import make_scorer


@pytest.fixture
def scores(llama, tmp_path):
    """Write a scores file of the tiny Llama; return its path."""
    config = tiny.config(score="random")
    grids = target_grids(find_targets(llama, config), config)
    drawn = make_scorer({}, grids, config).scores()
    BlockScores(grids, drawn, count_parameters(llama), config).save(tmp_path / "scores.safetensors")
    return tmp_path / "scores.safetensors"


@pytest.fixture
def folder(base, scores, tmp_path):
    """Write all that the commands read: `base`, `delta0` and `delta1`, `merged`, `scores.safetensors`."""
    for seed in range(2):
        arithmetic.train(tiny.llama(), tmp_path / f"delta{seed}", seed, budget=30)
    merge_checkpoint(base, tmp_path / "delta0", tmp_path / "merged")
    return tmp_path
