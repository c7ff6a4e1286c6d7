import pytest
import torch

from recipes.benchmarks.parts.models import MODELS
from recipes.parts.methods import Sparse
from recipes.studies.catalogue import STUDIES
from recipes.studies.parts.methods import COMMON, METHODS
from smt_trainer import SMTConfig
from smt_trainer.selection.budget import check_budget_fits
from smt_trainer.selection.candidates import find_candidates

ARMS = {
    f"{study.name}: {arm.label}": arm
    for study in STUDIES.values()
    for arm in study.arms
    if isinstance(METHODS.get(arm.method), Sparse)
}


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return MODELS["SmolLM2-135M"].build()


@pytest.mark.parametrize("label", ARMS)
def test_the_model_has_the_blocks_that_an_arm_asks_for(label, model):
    arm = ARMS[label]
    config = SMTConfig(**COMMON | {"budget": arm.budget} | METHODS[arm.method].fields | arm.fields)
    found = find_candidates(model, config)
    check_budget_fits(found.grids, config, found.num_parameters)
