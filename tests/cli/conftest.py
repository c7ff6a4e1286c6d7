"""What the tests of the command line share."""

import pytest
import tiny

from smt_trainer import BlockScores
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
