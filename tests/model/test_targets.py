"""Which linears are targets."""

import pytest
import tiny
import torch
from architectures import EXPERTS, GROUPED
from torch import nn
from transformers.models.granitemoe import modeling_granitemoe as granite

from smt_trainer import SMTConfig, SMTError, convert_to_smt, load_delta
from smt_trainer.model.heads import head_names
from smt_trainer.model.names import layer_index, matches
from smt_trainer.model.targets import count_parameters, find_targets, target_grids

LAYER = "model.layers.{}.self_attn.{}_proj".format
QKV = [LAYER(layer, name) for layer in (0, 1) for name in "qkv"]


def leaves(model: nn.Module, **fields) -> list[str]:
    """Return the last parts of the targets' names, each once, in order."""
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


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        ("qkv", ["c_attn", "q_attn"]),
        ("attention", ["c_attn", "c_proj", "q_attn"]),
        ("mlp", ["c_fc", "c_proj"]),
        ("all-linear", ["c_attn", "c_proj", "q_attn", "c_fc"]),
    ],
)
def test_transposed_linears_are_targets(target_modules, expected):
    assert leaves(tiny.gpt2(add_cross_attention=True), target_modules=target_modules) == expected


@pytest.mark.parametrize(
    ("fields", "block_shape", "shape"),
    [
        ({}, (64, 64), (3, 1)),
        ({"block_size": (96, 16)}, (96, 16), (2, 4)),
        ({"granularity": "row"}, (1, 64), (192, 1)),
        ({"granularity": "column"}, (192, 1), (1, 64)),
    ],
)
def test_rows_are_out_features_whichever_way_a_weight_is_stored(fields, block_shape, shape):
    targets = {"linear": nn.Linear(64, 192), "transposed": tiny.gpt2().transformer.h[0].attn.c_attn}
    grids = target_grids(targets, SMTConfig(**fields))
    for name, grid in grids.items():
        assert (grid.block_shape, grid.shape, grid.weight_shape) == (block_shape, shape, (192, 64))
        assert grid.stored_shape == tuple(targets[name].weight.shape)
        assert grid.transposed is (name == "transposed")


@pytest.mark.parametrize("exclude", [["k_proj"], "k_proj", r".*k_proj"])
def test_excluded_modules_are_left_out(llama, exclude, warnings):
    assert leaves(llama, exclude_modules=exclude) == ["q_proj", "v_proj"] and not warnings()


def test_a_regular_expression_means_whole_names_of_linears(llama):
    everything_else = r"(?!.*v_proj).*"
    assert leaves(llama, exclude_modules=everything_else) == ["v_proj"]


@pytest.mark.parametrize("exclude", ["layers.0", ["layers.0"], "model.layers.0"])
def test_what_lies_in_an_excluded_module_is_left_out(llama, exclude, warnings):
    assert list(find_targets(llama, SMTConfig(exclude_modules=exclude))) == QKV[3:] and not warnings()


@pytest.mark.parametrize("exclude", ["wk", ["k_proj", "wk"], r".*\.wk", r".*\.layers\.0"])
def test_excluding_what_is_not_there_is_said(llama, exclude, warnings):
    find_targets(llama, SMTConfig(exclude_modules=exclude))
    (line,) = warnings()
    assert "excludes nothing: this model has no such module" in line


def test_layers_below_the_lowest_are_left_out(llama):
    assert list(find_targets(llama, SMTConfig(lowest_layer=1))) == QKV[3:]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["wq"]}, r"'wq' matches no linear.*q_proj \(2 of 64x64\).*Name some of them.*modules\.$"),
        ({"target_modules": r"q_.*"}, r"\(a regular expression for whole names; several names are a list\) matches no"),
        (
            {"target_modules": ["attention", "mlp"]},
            r"in a list, 'attention' means a module of this name.* match no linear",
        ),
        ({"lowest_layer": 2}, "lowest_layer=2 matches no linear.* or lower lowest_layer"),
        ({"exclude_modules": ["q_proj", "k_proj", "v_proj"]}, "exclude_modules=.* matches no linear"),
    ],
)
def test_no_match_is_refused_listing_the_linears(llama, fields, message):
    with pytest.raises(SMTError, match=message):
        find_targets(llama, SMTConfig(**fields))


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        (["q_porj", "k_proj"], r": 'q_porj' matches no linear of this model.*Did you mean 'q_proj'\?$"),
        (["k_proj", "self_attn.q_porj"], r": 'self_attn\.q_porj' matches .*Did you mean 'self_attn\.q_proj'\?$"),
        (["qproj", "k_proj", "wv", "vproj"], "'qproj' and 'wv' and 'vproj' match no.* mean 'q_proj' and 'v_proj'.$"),
        (["k_proj", "input_layernorm"], ": 'input_layernorm' matches no linear"),
        (["k_proj", "self_attn"], ": 'self_attn' matches no linear"),
        (["mlp", "k_proj"], r"\(in a list, 'mlp' means a module of this name.*: 'mlp' matches no linear.*modules\.$"),
    ],
    ids=str,
)
def test_a_name_in_a_list_that_matches_nothing_is_refused_naming_it_and_the_closest(target_modules, message, llama):
    with pytest.raises(SMTError, match=message):
        find_targets(llama, SMTConfig(target_modules=target_modules))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["0.self_attn.q_proj", "1.self_attn.v_proj"], "lowest_layer": 1},
        {"target_modules": ["k_proj", "1.self_attn.v_proj"], "exclude_modules": ["k_proj"]},
        {"target_modules": ["0.self_attn.v_proj", "1.self_attn.v_proj", "up_proj"], "exclude_modules": ["mlp"]},
    ],
    ids=str,
)
def test_a_name_counts_if_all_that_it_matches_is_left_out(fields, llama):
    llama.model.layers[0].requires_grad_(False)
    assert list(find_targets(llama, SMTConfig(**fields))) == QKV[5:]


def test_a_model_without_linears_is_refused():
    with pytest.raises(SMTError, match=r"neither torch\.nn\.Linear nor Conv1D"):
        find_targets(nn.Sequential(nn.ReLU()), SMTConfig())


def test_linears_that_cannot_be_tuned_are_left_out_with_the_reason(llama, warnings):
    q, k, v = (llama.get_submodule(name) for name in QKV[:3])
    q.forward = q.forward
    k.weight = llama.get_submodule(QKV[4]).weight
    v.weight = nn.Parameter(torch.zeros(32, 64, dtype=torch.uint8), requires_grad=False)
    assert list(find_targets(llama, SMTConfig())) == [QKV[3], QKV[5]]
    reasons = "\n".join(warnings())
    assert f"`{QKV[0]}` is not tuned: its forward is replaced" in reasons
    assert f"`{QKV[1]}` and 1 more are not tuned: its weight is shared" in reasons
    assert (
        f"`{QKV[2]}` is not tuned: its weight is not a plain matrix of floats but a Parameter of torch.uint8" in reasons
    )


# ---- linears with a forward of their own ----


class Half(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


def test_a_linear_with_a_forward_of_its_own_is_left_out(llama, warnings):
    llama.get_submodule(QKV[0]).__class__ = Half
    assert list(find_targets(llama, SMTConfig())) == QKV[1:]
    assert f"`{QKV[0]}` is not tuned: its class, Half, has a forward of its own" in warnings()[0]


def test_a_selection_in_a_linear_with_a_forward_of_its_own_is_refused_and_the_model_left_as_it_was(llama):
    selection = tiny.every_block(llama, QKV)
    llama.get_submodule(QKV[1]).__class__ = Half
    before = tiny.logits(llama)
    with pytest.raises(SMTError, match="this model has a Half, which has a forward of its own"):
        convert_to_smt(llama, selection)
    assert torch.equal(tiny.logits(llama), before) and type(llama.get_submodule(QKV[0])) is nn.Linear


def test_a_linear_of_torchs_quantisation_aware_training_is_left_out(llama):
    qat = pytest.importorskip("torch.ao.nn.qat")
    config = torch.ao.quantization.get_default_qat_qconfig()
    llama.model.layers[0].self_attn.q_proj = qat.Linear(64, 64, bias=False, qconfig=config)
    assert list(find_targets(llama, SMTConfig())) == QKV[1:]


def test_a_subclass_with_the_forward_of_a_linear_is_a_target(llama):
    named = type("Named", (nn.Linear,), {"extra_repr": lambda self: "named"})
    llama.get_submodule(QKV[0]).__class__ = named
    assert list(find_targets(llama, SMTConfig())) == QKV


def test_falcons_linears_are_targets():
    falcon = tiny.build("FalconForCausalLM", new_decoder_architecture=False)
    assert leaves(falcon) == ["query_key_value"]
    assert type(next(iter(find_targets(falcon, SMTConfig()).values()))) is not nn.Linear


# ---- frozen by the user ----


@pytest.mark.parametrize("fields", [{}, {"target_modules": ["q_proj", "k_proj", "v_proj"]}], ids=str)
def test_frozen_linears_are_left_out_in_one_line_even_if_they_are_named(fields, llama, warnings):
    llama.model.layers[0].requires_grad_(False)
    assert list(find_targets(llama, SMTConfig(**fields))) == QKV[3:]
    assert len(warnings()) == 1 and warnings()[0].startswith(f"3 of 6 matching linears, such as `{QKV[0]}`")


def test_only_frozen_matches_are_refused(llama):
    llama.model.layers.requires_grad_(False)
    with pytest.raises(SMTError, match=r"none of which can be tuned.*unfreeze"):
        find_targets(llama, SMTConfig())


def test_a_model_frozen_whole_is_tuned_like_one_that_is_not(llama, warnings):
    assert list(find_targets(llama.requires_grad_(False), SMTConfig())) == QKV
    assert len(warnings()) == 1 and warnings()[0].startswith("All parameters of the model are frozen")


# ---- wrapped modules ----


def test_compiled_modules_are_refused_by_name(llama):
    llama.model.layers[1] = torch.compile(llama.model.layers[1], backend="eager")
    with pytest.raises(SMTError, match=r"layers\.1\._orig_mod` is inside a wrapper of torch.*torch_compile=True"):
        find_targets(llama, SMTConfig())


@pytest.mark.parametrize(
    "weight",
    [
        nn.Parameter(torch.zeros(64, 64).to(torch.float8_e4m3fn)),
        nn.Parameter(torch.zeros(1024, 1, dtype=torch.bfloat16)),
        type("Packed", (nn.Parameter,), {})(torch.zeros(64, 64)),
    ],
    ids=["float8", "packed into bfloat16", "a kind of parameter of its own"],
)
def test_a_weight_that_only_looks_like_floats_is_left_out(weight, llama, warnings):
    llama.get_submodule(QKV[0]).weight = weight
    assert list(find_targets(llama, SMTConfig())) == QKV[1:]
    assert f"`{QKV[0]}` is not tuned: its weight is not a plain matrix of floats" in warnings()[0]


def test_the_output_projection_of_torchs_own_attention_is_left_out(warnings):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2), "out_proj": nn.Linear(32, 32)})
    assert list(find_targets(model, SMTConfig(target_modules=["out_proj"]))) == ["out_proj"]
    assert "`attention.out_proj` is not tuned: nn.MultiheadAttention reads its weight" in warnings()[0]


# ---- experts in 3-D parameters ----


def mixture(**overrides) -> nn.Module:
    """Experts in the second layer, an ordinary MLP in the first."""
    dense = {"mlp_only_layers": [0], "num_experts": 4}
    return tiny.build("Qwen3MoeForCausalLM", **GROUPED | EXPERTS | dense | overrides)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": "experts"}, ["gate_up_proj", "down_proj"]),
        ({"target_modules": ["experts"]}, ["gate_up_proj", "down_proj"]),
        ({"target_modules": ["gate_up_proj"]}, ["gate_up_proj"]),
        ({"target_modules": ["experts.down_proj"]}, ["down_proj"]),
        ({"target_modules": ["gate_up_proj.2"]}, ["gate_up_proj.2"]),
        ({"target_modules": r".*\.experts\.down_proj\.[13]"}, ["down_proj.1", "down_proj.3"]),
        ({"target_modules": "experts", "exclude_modules": ["down_proj"]}, ["gate_up_proj"]),
        (
            {"target_modules": "mlp", "exclude_modules": ["gate_proj", "up_proj", "mlp.down_proj"]},
            ["gate_up_proj", "down_proj"],
        ),
        ({"target_modules": "mlp", "lowest_layer": 1}, ["gate_up_proj", "down_proj"]),
    ],
    ids=str,
)
def test_the_matrices_of_experts_are_targets(fields, expected, warnings):
    path, count = "model.layers.1.mlp.experts.", 4
    wanted = [
        f"{path}{name}" if name[-1].isdecimal() else f"{path}{name}.{index}"
        for name in expected
        for index in range(1 if name[-1].isdecimal() else count)
    ]
    found = find_targets(mixture(), SMTConfig(**fields))
    assert list(found) == wanted and not warnings()
    grids = target_grids(found, SMTConfig(block_size=16, **fields))
    assert {name: grid.weight_shape for name, grid in grids.items()} == {
        name: (64, 64) if "gate_up" in name else (64, 32) for name in wanted
    }


@pytest.mark.parametrize("target_modules", ["mlp", "all-linear"])
def test_experts_come_in_the_place_that_they_have_in_the_model(target_modules):
    found = list(find_targets(mixture(), SMTConfig(target_modules=target_modules)))
    layers = [name.split(".")[2] for name in found]
    assert layers == sorted(layers) and sum("experts" in name for name in found) == 8
    assert not any(name.endswith(".gate") for name in found)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "qkv"},
        {"target_modules": "attention"},
        {"target_modules": "all-linear", "exclude_modules": ["experts"]},
        {"target_modules": ["gate_proj"]},
    ],
    ids=str,
)
def test_asking_for_no_experts_finds_none(fields, warnings):
    found = find_targets(mixture(), SMTConfig(**fields))
    assert found and not any("experts" in name for name in found) and not warnings()


@pytest.mark.parametrize(
    ("architecture", "overrides", "transposed"),
    [
        ("MixtralForCausalLM", GROUPED | {"num_local_experts": 4}, False),
        ("GptOssForCausalLM", GROUPED | {"num_local_experts": 4}, True),
        pytest.param(
            "GraniteMoeForCausalLM",
            {"num_key_value_heads": 2, "num_local_experts": 4},
            False,
            marks=pytest.mark.skipif(not hasattr(granite, "GraniteMoeExperts"), reason="older versions mark no side"),
        ),
    ],
)
def test_the_experts_of_an_architecture_are_known(architecture, overrides, transposed):
    config = SMTConfig(target_modules="experts", block_size=16)
    found = find_targets(tiny.build(architecture, **overrides), config)
    grids = target_grids(found, config)
    assert len(found) == 16 and {grid.transposed for grid in grids.values()} == {transposed}
    assert {grid.weight_shape for grid in grids.values()} == {(192, 64), (64, 96)}


def test_experts_that_cannot_be_tuned_are_left_out_with_the_reason(warnings):
    model = mixture(mlp_only_layers=[])
    first, second = (model.get_submodule(f"model.layers.{layer}.mlp.experts") for layer in (0, 1))
    first.gate_up_proj.requires_grad_(False)
    second.forward = lambda *inputs: second.down_proj.sum()
    found = find_targets(model, SMTConfig(target_modules="experts"))
    assert list(found) == [f"model.layers.0.mlp.experts.down_proj.{index}" for index in range(4)]
    replaced, frozen = warnings()
    assert "the forward of its module is replaced" in replaced and "and 7 more" in replaced
    assert "4 of 8 matching linears" in frozen


def test_experts_of_an_unknown_class_are_left_out(warnings):
    class OwnExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, 32, 32))

    model = nn.ModuleDict({"experts": OwnExperts(), "up": nn.Linear(32, 32)})
    assert list(find_targets(model, SMTConfig(target_modules="all-linear"))) == ["up"]
    assert "not known which way round a OwnExperts" in warnings()[0]
    with pytest.raises(SMTError, match=r"matches no linear of this model\..* are: w"):
        find_targets(model, SMTConfig(target_modules="qkv"))


# ---- PEFT adapters ----


def wrapped(peft, model):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])), "the model is a PEFT PeftModel"


def injected(peft, model):
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    return model, r"`model\.layers\.0\.self_attn\.q_proj` is a PEFT Linear"


@pytest.mark.parametrize("adapt", [wrapped, injected])
def test_a_model_with_an_adapter_is_refused(adapt, delta):
    peft = pytest.importorskip("peft")
    selection = delta[1].smt_state.selection
    model, message = adapt(peft, tiny.llama())
    for use in (
        lambda: find_targets(model, SMTConfig()),
        lambda: convert_to_smt(model, selection),
        lambda: load_delta(model, delta[0]),
    ):
        with pytest.raises(SMTError, match=rf"{message}.*model\.merge_and_unload\(\).*save_pretrained"):
            use()


def test_a_model_whose_adapter_was_merged_is_a_plain_one():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"])).merge_and_unload()
    assert list(find_targets(model, SMTConfig())) == QKV


def test_only_untunable_matches_are_refused():
    with pytest.raises(SMTError, match="matches 1 linears, none of which can be tuned"):
        find_targets(tiny.llama(tie_word_embeddings=True), SMTConfig(target_modules=["lm_head"]))


def test_the_head_of_a_classifier_is_not_a_target():
    model = tiny.build("LlamaForSequenceClassification", num_key_value_heads=2, num_labels=3)
    assert head_names(model) == ["score"]
    assert "score" not in leaves(model, target_modules="all-linear")


def test_routers_are_not_targets():
    model = nn.Module()
    router = nn.ModuleDict({"layer": nn.Linear(32, 4)})
    model.layers = nn.ModuleList(
        [nn.ModuleDict({"gate": nn.Linear(32, 4), "router": router, "up_proj": nn.Linear(32, 32)})]
    )
    assert leaves(model, target_modules="mlp") == leaves(model, target_modules="all-linear") == ["up_proj"]


def test_tied_weights_count_once():
    tied, untied = tiny.llama(tie_word_embeddings=True), tiny.llama(tie_word_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == tiny.VOCABULARY * 64


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.7.self_attn.q_proj", 7),
        ("transformer.h.12.mlp.experts.3", 12),
        ("0.auto_model.encoder.layer.3.output.dense", 3),
        ("0.auto_model.pooler.dense", -1),
        ("2", 2),
        ("lm_head", -1),
        ("", -1),
    ],
)
def test_the_layer_index_is_the_first_number_after_a_name(name, index):
    assert layer_index(name) == index


def test_an_ending_matches_whole_parts_of_a_name_only():
    assert matches("layers.0.q_proj", ["q_proj"]) and matches("q_proj", ["q_proj"])
    assert not matches("layers.0.sq_proj", ["q_proj"])
    assert not matches("layers.0.q_proj", "q_proj")
