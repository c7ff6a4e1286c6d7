"""`hyperparameter_search`: each trial warms up, selects and trains on its own model."""

import pytest
import tiny
import torch
from safetensors.torch import load_file

from smt_trainer import BlockSelection
from smt_trainer.delta.delta import DELTA_FILE
from smt_trainer.training.trainer import SELECTION_FILE

LEARNING_RATES = [1e-2, 1e-4, 1e-2]


def make(folder, **overrides):
    return tiny.RecordingSMTTrainer(
        model_init=lambda: tiny.llama(attention_dropout=0.3),
        args=tiny.arguments(folder, **overrides),
        train_dataset=tiny.examples(),
        eval_dataset=tiny.examples(4, seed=2),
        smt_config=tiny.config(),
    )


def learning_rate(trial) -> dict[str, float]:
    rate = LEARNING_RATES[trial.number]
    return {"learning_rate": trial.suggest_float("learning_rate", rate, rate)}


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """Search with three trials; return the folder, the trainer and the best run."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.disable_default_handler()
    folder = tmp_path_factory.mktemp("search")
    trainer = make(folder, save_strategy="steps", save_steps=2)
    return folder, trainer, trainer.hyperparameter_search(learning_rate, n_trials=len(LEARNING_RATES), backend="optuna")


def checkpoint(folder, trial: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"run-{trial}" / "checkpoint-4" / DELTA_FILE)


def test_the_best_run_is_returned(search):
    assert search[2].hyperparameters == {"learning_rate": 1e-2}


def test_each_trial_starts_from_the_model_that_model_init_gives(search):
    first, other, same = torch.tensor(search[1].losses).view(3, 4)
    assert first[0] == other[0] and torch.equal(first, same)
    assert not torch.equal(first, other)


def test_trials_with_the_same_hyperparameters_end_bit_identical(search):
    first, other, same = (checkpoint(search[0], trial) for trial in range(3))
    assert first.keys() == other.keys() == same.keys()
    assert all(torch.equal(tensor, same[key]) for key, tensor in first.items())
    assert not all(torch.equal(tensor, other[key]) for key, tensor in first.items())


def test_each_trial_keeps_its_selection_in_its_own_folder(search):
    folder = search[0]
    for trial in range(3):
        assert BlockSelection.load(folder / f"run-{trial}" / SELECTION_FILE).num_blocks == 12
    assert not (folder / SELECTION_FILE).exists()


def test_without_a_search_each_run_warms_up_on_the_model_that_model_init_gives(tmp_path):
    trainer = make(tmp_path)
    selections = []
    for _ in range(2):
        trainer.train()
        assert tiny.logged(trainer, "smt_warmup_steps") == [2]
        selections.append(trainer.smt_selection)
    first, second = torch.tensor(trainer.losses).view(2, 4)
    assert torch.equal(first, second)
    assert selections[0] is not selections[1] and selections[0].to_dict() == selections[1].to_dict()
