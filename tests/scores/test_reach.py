"""Targets that forward does not call, or backward does not pass, are left out after the warm-up."""

from types import SimpleNamespace

import pytest
import tiny
from out_of_reach import OutOfReach

from smt_trainer import BlockScores, SMTError, merge_and_unload
from smt_trainer.config import SCORES

WARMUP_SCORES = [score for score in SCORES if score not in ("magnitude", "random")]
REACHED = [
    f"mixers.{layer}.{name}" for layer in (0, 1) for name in ("called", "experts.0", "experts.1")
]  # expert 0 in a single step
UNUSED = ["mixers.0.unused", "mixers.1.unused"]


def config(**fields):
    return tiny.config(**{"target_modules": r"(mixers|tower)\..*", "smt_warmup_steps": 3} | fields)


class Attribute(OutOfReach):
    """Gives its loss as an attribute, as models of transformers do."""

    def forward(self, **inputs):
        return SimpleNamespace(**super().forward(**inputs))


@pytest.mark.parametrize("score", WARMUP_SCORES)
def test_only_what_some_step_reached_is_scored_with_or_without_a_trainer(score, tmp_path, warnings):
    expected = sorted([*REACHED, *UNUSED]) if score in ("activation", "low_activation") else REACHED
    found = BlockScores.of(Attribute().train(), config(score=score), [tiny.batch() for _ in range(3)])
    tiny.smt_trainer(OutOfReach(), tmp_path, config(score=score)).select()
    saved = BlockScores.load(tmp_path / "smt_scores.safetensors")
    for scores in (found, saved):
        assert sorted(scores.scores) == sorted(scores.grids) == expected
        assert set(scores.unreached).isdisjoint(expected) and "mixers.0.read" in scores.unreached
    first, second = warnings()
    assert first == second and "the model never called read (2), experts (2), tower (1)" in first


def test_what_is_left_out_is_never_chosen_even_from_each_module_alone(tmp_path):
    model = OutOfReach()
    before = tiny.weights(model)
    trainer = tiny.smt_trainer(model, tmp_path, config(scope="per_module", budget=1))
    trainer.train()
    assert sorted(trainer.smt_selection.block_indices) == sorted(REACHED)
    after = tiny.weights(merge_and_unload(model))
    changed = {name.removesuffix(".weight") for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in REACHED if not name.endswith("experts.0")}  # serves no token any more


def test_scores_can_be_used_again_though_targets_are_left_out(tmp_path):
    tiny.smt_trainer(OutOfReach(), tmp_path, config()).select()
    again = config(budget=3, selection=tmp_path / "smt_scores.safetensors")
    assert tiny.smt_trainer(OutOfReach(), tmp_path, again)._given_selection.num_blocks == 3


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["read"], r"the model never called read \(2\)"),
        (["read", "unused"], r"the model never called read \(2\) and no gradient reached unused \(2\)"),
    ],
)
def test_targets_none_of_which_is_reached_are_refused(targets, message, tmp_path):
    with pytest.raises(SMTError, match=f"none of the targets can be trained: in the warm-up, {message}"):
        tiny.smt_trainer(OutOfReach(), tmp_path, config(target_modules=targets, budget=2)).train()
