"""Which linears are targets."""

import pytest
import tiny
import torch
from torch import nn

from smt_trainer import SMTConfig, SMTError, find_targets
from smt_trainer.targets import count_parameters, head_names, layer_index, matches

LAYER = "model.layers.{}.self_attn.{}_proj".format
QKV = [LAYER(layer, name) for layer in (0, 1) for name in "qkv"]


def leaves(model: nn.Module, **fields) -> list[str]:
    """The last parts of the targets' names, each once, in order."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in find_targets(model, SMTConfig(**fields))))


def test_qkv_finds_the_projections_in_the_models_order(llama):
    targets = find_targets(llama, SMTConfig())
    assert list(targets) == QKV
    assert all(targets[name] is llama.get_submodule(name) for name in QKV)


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        ("attention", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("mlp", ["gate_proj", "up_proj", "down_proj"]),
        ("all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        (["v_proj", "self_attn.q_proj"], ["q_proj", "v_proj"]),
        (r".*\.1\..*up_proj", ["up_proj"]),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_groups_lists_and_regular_expressions_name_targets(llama, target_modules, expected):
    assert leaves(llama, target_modules=target_modules) == expected


@pytest.mark.parametrize("exclude", [["k_proj"], r".*k_proj"])
def test_excluded_modules_are_left_out(llama, exclude):
    assert leaves(llama, exclude_modules=exclude) == ["q_proj", "v_proj"]


def test_layers_below_the_lowest_are_left_out(llama):
    assert list(find_targets(llama, SMTConfig(lowest_layer=1))) == QKV[3:]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["wq"]}, r"\['wq'\] matches no linear.*q_proj \(2 of 64x64\).*Name some of them"),
        ({"target_modules": "q_proj"}, "matches no linear"),
        ({"lowest_layer": 2}, "lowest_layer=2 matches no linear"),
        ({"exclude_modules": ["q_proj", "k_proj", "v_proj"]}, "exclude_modules=.* matches no linear"),
    ],
)
def test_no_match_is_refused_listing_what_there_is(llama, fields, message):
    with pytest.raises(SMTError, match=message):
        find_targets(llama, SMTConfig(**fields))


def test_a_model_without_linears_is_refused():
    with pytest.raises(SMTError, match=r"no torch\.nn\.Linear at all"):
        find_targets(nn.Sequential(nn.ReLU()), SMTConfig())


def test_linears_that_cannot_be_tuned_are_left_out_with_the_reason(llama, warnings):
    q, k, v = (llama.get_submodule(name) for name in QKV[:3])
    q.forward = q.forward
    k.weight = llama.get_submodule(QKV[4]).weight
    v.weight = nn.Parameter(torch.zeros(32, 64, dtype=torch.uint8), requires_grad=False)
    assert list(find_targets(llama, SMTConfig())) == [QKV[3], QKV[5]]
    reasons = "\n".join(warnings())
    assert f"`{QKV[0]}` is not tuned: its forward is replaced" in reasons
    assert f"`{QKV[1]}` is not tuned: its weight is shared" in reasons
    assert f"`{QKV[2]}` is not tuned: its weight is no plain matrix of floats but torch.uint8" in reasons


def test_only_untunable_matches_are_refused():
    with pytest.raises(SMTError, match="matches 1 linears, none of which can be tuned"):
        find_targets(tiny.llama(tie_word_embeddings=True), SMTConfig(target_modules=["lm_head"]))


def test_the_head_of_a_classifier_is_no_target():
    model = tiny.build("LlamaForSequenceClassification", num_key_value_heads=2, num_labels=3)
    assert head_names(model) == ["score"]
    assert "score" not in leaves(model, target_modules="all-linear")


def test_routers_are_no_targets():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(32, 4), "up_proj": nn.Linear(32, 32)})])
    assert leaves(model, target_modules="mlp") == leaves(model, target_modules="all-linear") == ["up_proj"]


def test_tied_weights_count_once():
    tied, untied = tiny.llama(tie_word_embeddings=True), tiny.llama(tie_word_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == tiny.VOCABULARY * 64


@pytest.mark.parametrize(
    ("name", "index"), [("model.layers.7.self_attn.q_proj", 7), ("transformer.h.12.mlp.experts.3", 12), ("lm_head", -1)]
)
def test_the_layer_index_is_the_first_number_of_the_path(name, index):
    assert layer_index(name) == index


def test_an_ending_matches_whole_parts_of_a_name_only():
    assert matches("layers.0.q_proj", ["q_proj"]) and matches("q_proj", ["q_proj"])
    assert not matches("layers.0.sq_proj", ["q_proj"])
    assert not matches("layers.0.q_proj", "q_proj")
