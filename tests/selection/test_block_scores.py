"""Scores as an artefact: choosing blocks from them later, and what they refuse."""

import json

import pytest
import tiny
import torch
from mixtures import mixture
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smt_trainer import BlockScores, SMTConfig, SMTError
from smt_trainer.arrays import as_array
from smt_trainer.manifest import CHECKSUM, sealed
from smt_trainer.model.targets import count_parameters, find_targets, target_grids
from smt_trainer.scores import make_scorer
from smt_trainer.selection.block_scores import MANIFEST
from smt_trainer.selection.choose import select_blocks
from smt_trainer.selection.given import resolve_selection


def scores_of(model, **fields) -> BlockScores:
    config = SMTConfig(**{"block_size": 16, "budget": 12, "score": "random"} | fields)
    targets = find_targets(model, config)
    grids = target_grids(targets, config)
    scores = make_scorer(targets, grids, config).scores()
    return BlockScores(grids, scores, count_parameters(model), config, "someone/model")


@pytest.fixture
def scores(llama):
    return scores_of(llama, target_modules="attention")


def fewer(scores: BlockScores, **fields) -> SMTConfig:
    return SMTConfig(**scores.config.to_dict() | fields)


def test_a_file_gives_the_same_scores_back(scores, tmp_path):
    scores.save(tmp_path / "scores.safetensors")
    again = BlockScores.load(tmp_path / "scores.safetensors")
    assert (again.grids, again.num_parameters, again.config, again.base_model) == (
        *(scores.grids, scores.num_parameters, scores.config),
        "someone/model",
    )
    # safetensors sorts by name; ties go by the model's order.
    assert list(again.select().grids) == list(again.grids) == list(scores.grids)
    assert all(torch.equal(again.scores[name], scores.scores[name]) for name in scores.scores)
    assert again.select().to_dict() == scores.select().to_dict()


def test_a_file_takes_four_bytes_a_block_and_its_manifest(llama, tmp_path):
    sizes = []
    for block_size in (16, 8):
        scores = scores_of(llama, block_size=block_size)
        scores.save(tmp_path / "scores.safetensors")
        blocks = sum(grid.num_blocks for grid in scores.grids.values())
        sizes.append((tmp_path / "scores.safetensors").stat().st_size - 4 * blocks)
    assert abs(sizes[1] - sizes[0]) < 100


@pytest.mark.parametrize(
    ("fields", "lower"),
    [
        ({}, {}),
        ({"budget": 3}, {}),
        ({"budget": 0.5, "budget_of": "targets"}, {}),
        ({"budget": 2, "scope": "per_module"}, {}),
        ({"layer_cap": 8}, {}),
        ({"budget": {"qkv": 5, "o_proj": 2}}, {}),
        ({"master_dtype": "bfloat16"}, {}),
        ({"target_modules": "qkv"}, {"o_proj"}),
        ({"target_modules": ["v_proj", "o_proj"]}, {"q_proj", "k_proj"}),
        ({"target_modules": r".*\.v_proj"}, {"q_proj", "k_proj", "o_proj"}),
        ({"exclude_modules": ["k_proj"]}, {"k_proj"}),
        ({"lowest_layer": 1}, {"layers.0."}),
    ],
)
def test_choosing_later_gives_what_a_run_with_that_configuration_chooses(fields, lower, scores):
    config = fewer(scores, **fields)
    names = [name for name in scores.grids if not any(part in name for part in lower)]
    grids, found = ({name: part[name] for name in names} for part in (scores.grids, scores.scores))
    expected = select_blocks(found, grids, config, scores.num_parameters, "someone/model")
    assert scores.select(config).to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": "magnitude"}, "computed with score='random', which score='magnitude' does not fit"),
        ({"block_size": 32}, "computed with block_size=16, which block_size=32 does not fit"),
        ({"block_size": "auto", "granularity": "row"}, "with block_size=16"),
        ({"target_modules": "all-linear"}, "target_modules='all-linear' does not fit"),
        ({"target_modules": "mlp"}, "target_modules='mlp' does not fit"),
        ({"target_modules": ["v_proj", "up_proj"]}, "does not fit; name fewer"),
        ({"exclude_modules": None}, "exclude_modules=None does not fit"),
        ({"lowest_layer": 0}, "lowest_layer=0 does not fit"),
        ({"exclude_modules": ["k_proj", "q_proj", "v_proj", "o_proj"]}, "leave none of the 3 scored modules"),
        ({"budget": 200}, "more than the targets hold"),
    ],
)
def test_what_needs_other_scores_is_refused_naming_the_field(fields, message, llama):
    scores = scores_of(llama, target_modules="attention", exclude_modules=["k_proj"], lowest_layer=1)
    with pytest.raises(SMTError, match=message):
        scores.select(fewer(scores, **fields))


def test_experts_can_be_chosen_from_the_scores_of_all_linears():
    model = mixture()
    scores = scores_of(model, target_modules="all-linear", block_size=8)
    selection = scores.select(fewer(scores, target_modules="experts"))
    assert {"experts" in name for name in selection.block_indices} == {True}
    with pytest.raises(SMTError, match="target_modules='experts' does not fit"):
        attention = scores_of(model, target_modules="attention", block_size=8)
        attention.select(fewer(attention, target_modules="experts"))


def test_the_configuration_of_the_selection_says_how_its_scores_were_made(scores):
    selection = scores.select(fewer(scores, budget=5, smt_warmup_steps=7, selection="elsewhere.json"))
    assert selection.config == fewer(scores, budget=5)


# ---- of another model ----


def test_scores_fit_their_own_model(scores, llama):
    scores.check_model(llama, scores.config)


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (
            lambda: tiny.gpt2(),
            {},
            r"of a weight of 64x64; this model has no such module\. They were computed on someone",
        ),
        (lambda: tiny.llama(hidden_size=128), {}, "of a weight of 64x64; this model has 128x128"),
        (
            lambda: tiny.llama(intermediate_size=128),
            {},
            r"computed on someone/model of [\d,]+ parameters; this model has",
        ),
        (lambda: tiny.llama(), {"target_modules": r".*\.(q|up)_proj"}, "want 2 modules without scores, such as `model"),
    ],
)
def test_another_model_or_more_targets_are_refused(model, fields, message, scores, tmp_path):
    scores.save(tmp_path / "scores.safetensors")
    with pytest.raises(SMTError, match=message):
        resolve_selection(tmp_path / "scores.safetensors", fewer(scores, **fields), model())


# ---- damaged ----


@pytest.fixture
def manifest(scores, tmp_path):
    """Return a function that rewrites the scores file with another manifest or other tensors."""
    path = tmp_path / "scores.safetensors"
    scores.save(path)

    def rewrite(change_manifest=lambda values: None, change_tensors=lambda tensors: None, seal=True):
        with safe_open(path, "pt") as file:
            values = json.loads(file.metadata()[MANIFEST])
        tensors = load_file(path)
        change_manifest(values)
        change_tensors(tensors)
        if seal:
            del values[CHECKSUM]
            values = sealed(values, {name: as_array(tensor) for name, tensor in tensors.items()})
        save_file(tensors, path, {MANIFEST: json.dumps(values)})
        return path

    return rewrite


NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"change_manifest": lambda values: values.update(format="9")}, "has format 9, this version"),
        ({"change_manifest": lambda values: values.pop("modules")}, "missing or unknown .'modules'"),
        ({"change_tensors": lambda tensors: tensors.pop(NAME)}, f"damaged: `{NAME}` has a grid or scores, not both"),
        (
            {"change_tensors": lambda tensors: tensors.update({NAME: torch.ones(3, 4)})},
            rf"scores of `{NAME}` should be float32 of shape \[4, 4\], got torch.float32 of shape \[3, 4\]",
        ),
        ({"change_tensors": lambda tensors: tensors.update({NAME: torch.ones(4, 4).half()})}, "got torch.float16"),
    ],
)
def test_a_damaged_file_is_refused(changes, message, manifest):
    with pytest.raises(SMTError, match=message):
        BlockScores.load(manifest(**changes))


def test_a_truncated_file_is_refused(manifest):
    path = manifest()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SMTError, match="damaged or truncated"):
        BlockScores.load(path)


def test_a_file_of_something_else_is_refused(delta):
    with pytest.raises(SMTError, match="is not a scores file of smt_trainer"):
        BlockScores.load(delta[0] / "smt_delta.safetensors")


def test_scores_that_are_not_finite_are_refused_at_selection(scores):
    scores.scores[NAME][0, 0] = float("nan")
    with pytest.raises(SMTError, match=f"scores of `{NAME}` are not finite"):
        scores.select()
