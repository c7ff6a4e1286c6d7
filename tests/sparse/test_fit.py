"""A selection that does not fit a model is refused."""

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from smt_trainer import SMTError, convert_to_smt


def other_shape(model):
    return tiny.choose(tiny.build("LlamaForCausalLM", hidden_size=96, num_key_value_heads=4)), "this model has a weight"


def other_names(model):
    return tiny.choose(tiny.build("GPTNeoXForCausalLM")), "this model has no such module"


def quantised(model):
    projection = model.model.layers[1].self_attn.q_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.float8_e4m3fn))
    return tiny.every_block(tiny.llama(), ["model.layers.1.self_attn.q_proj"]), "has a weight of 64x64 .*float8_e4m3fn"


def stored_the_other_way(model):
    projection = model.model.layers[1].self_attn.q_proj
    selection = tiny.every_block(model, ["model.layers.1.self_attn.q_proj"])
    model.model.layers[1].self_attn.q_proj = Conv1D(projection.out_features, projection.in_features)
    return selection, "lie in a linear .* this model has a Conv1D"


def not_a_linear(model):
    selection = tiny.choose(model)
    model.model.layers[1].self_attn = nn.ModuleDict(dict.fromkeys(["q_proj", "k_proj", "v_proj"], nn.Identity()))
    return selection, "this model has a Identity"


def shared_weight(model):
    selection = tiny.every_block(model, ["model.layers.1.self_attn.q_proj"])
    model.model.layers[0].self_attn.q_proj.weight = model.model.layers[1].self_attn.q_proj.weight
    return selection, "this model has one whose weight is shared with another module"


def tied_head(model):
    selection = tiny.every_block(model, ["lm_head"])
    model.lm_head.weight = model.model.embed_tokens.weight
    return selection, "this model has one whose weight is shared with another module"


def unknown_module_to_save(model):
    return tiny.choose(model, tiny.config(score="random", modules_to_save=["score"])), "modules_to_save names 'score'"


def target_trained_whole(model):
    selection = tiny.choose(model, tiny.config(score="random", modules_to_save=["layers.0.self_attn"]))
    return selection, "modules_to_save"


def replaced_forward(model):
    projection = model.model.layers[1].self_attn.q_proj
    selection = tiny.every_block(model, ["model.layers.1.self_attn.q_proj"])
    projection.forward = projection.forward
    return selection, "the forward of `model.layers.1.self_attn.q_proj` is replaced on the instance"


MISFITS = [
    other_shape,
    other_names,
    quantised,
    stored_the_other_way,
    not_a_linear,
    shared_weight,
    tied_head,
    replaced_forward,
    unknown_module_to_save,
    target_trained_whole,
]


@pytest.mark.parametrize("case", MISFITS)
def test_a_selection_that_does_not_fit_is_refused_and_the_model_left_as_it_was(case, llama):
    selection, message = case(llama)
    before = {name: (type(module), len(vars(module))) for name, module in llama.named_modules()}
    with pytest.raises(SMTError, match=message):
        convert_to_smt(llama, selection)
    assert {name: (type(module), len(vars(module))) for name, module in llama.named_modules()} == before
    assert all(parameter.requires_grad for parameter in llama.parameters())
