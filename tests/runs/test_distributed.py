"""Two processes with half the batch each, compared with one process: gloo, on the CPU."""

import pytest
import tiny
import torch
import training_script
from training_script import RANKS_BATCH

from smt_trainer import load_delta
from smt_trainer.delta.delta import Delta
from smt_trainer.training.trainer import SCORES_FILE

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run on two ranks and on one process; return the folder, the outcome of each rank, and that of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    training_script.torchrun(training_script.__file__, 2, "ranks", folder, ACCELERATE_USE_CPU="true")
    return folder, training_script.outcomes(folder, 2), training_script.ranked(folder / "single", processes=1)


def test_both_ranks_end_with_the_same_blocks_and_weights(runs):
    _, (first, second), _ = runs
    for key in ("block_indices", "blocks", "weights", "scores"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


def test_two_ranks_score_select_and_train_like_one_process(runs):
    _, (rank, _), single = runs
    # Ranks average squares of activations; for `grad_abs`, the backward pass of each rank counts separately.
    factors = {"activation": 2**0.5, "low_activation": 2**-0.5}
    for score in rank["scores"].keys() - {"grad_abs"}:
        for name, expected in single["scores"][score].items():
            # Scores are summed in float32.
            ours, atol = factors.get(score, 1) * rank["scores"][score][name], 1e-5 * expected.max().item()
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=atol)
    torch.testing.assert_close(rank["block_indices"], single["block_indices"], rtol=0, atol=0)
    # Weights are float64, but transformers computes the loss, and so the first gradient, in float32.
    torch.testing.assert_close(rank["blocks"], single["blocks"], rtol=0, atol=1e-6)
    assert rank["losses"] == pytest.approx(single["losses"], rel=1e-5)
    base = tiny.llama().double().state_dict()
    assert any((tensor - base[name]).abs().max() > 1e-3 for name, tensor in rank["weights"].items() if name in base)


def test_the_scores_of_two_ranks_serve_one_process(runs):
    folder, (rank, _), _ = runs
    smt_config = tiny.config(selection=folder / "rank-0" / SCORES_FILE)
    trainer = tiny.smt_trainer(tiny.llama().double(), folder / "reused", smt_config)
    trainer.train()
    chosen = trainer.smt_selection.block_indices
    assert {name: indices.tolist() for name, indices in chosen.items()} == {
        name: indices.tolist() for name, indices in rank["block_indices"].items()
    }


def test_only_the_first_rank_writes(runs):
    folder, (rank, _), _ = runs
    written = [[path for path in (folder / f"rank-{number}").rglob("*") if path.is_file()] for number in range(2)]
    assert {path.parent.name for path in written[0]} == {"rank-0", "delta", "merged"}
    assert written[1] == []
    delta = Delta.load(folder / "rank-0" / "delta")
    assert delta.selection.num_blocks == 12
    loaded = load_delta(tiny.llama().double(), folder / "rank-0" / "delta").state_dict()
    torch.testing.assert_close(dict(loaded), dict(rank["weights"]), rtol=0, atol=0)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_is_resumed_on_another_number_of_ranks(before, after, tmp_path):
    # With this large epsilon, Adam's step is smooth in the gradient, so rounding errors stay small.
    how = {"make": tiny.llama, "learning_rate": 1.0, "adam_epsilon": 1.0}
    outcomes = []
    for processes, checkpoint in ((before, None), (after, 2)):
        batch = {"per_device_train_batch_size": RANKS_BATCH // processes}
        assert not any(training_script.launch(tmp_path, processes, checkpoint=checkpoint, **how, **batch))
        outcomes.append(training_script.outcomes(tmp_path, processes)[0])
    whole, resumed = outcomes
    tiny.assert_same(resumed["block_indices"], whole["block_indices"])
    for key in ("blocks", "optimizer"):
        torch.testing.assert_close(resumed[key], whole[key], rtol=1e-6, atol=1e-7)
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-5)
