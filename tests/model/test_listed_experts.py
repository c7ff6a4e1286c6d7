"""Which lists of modules are lists of experts, and whose forward calls them."""

import mixtures
import tiny
from torch import nn

from smt_trainer import convert_to_smt
from smt_trainer.model.listed_experts import expert_lists


def test_the_module_around_a_list_calls_its_experts():
    model = mixtures.listed()
    found = [(name, caller) for name, _, caller in expert_lists(model)]
    assert found == [(f"model.layers.{index}.mlp.experts", model.model.layers[index].mlp) for index in range(2)]


def test_a_list_with_a_forward_calls_its_experts_itself():
    sizes = {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    model = tiny.build("SwitchTransformersForConditionalGeneration", **sizes, num_experts=2)
    found = list(expert_lists(model))
    assert [type(caller).__name__ for _, _, caller in found] == ["SwitchTransformersExperts"] * len(found) != []
    assert all(experts is caller for _, experts, caller in found)


def test_other_lists_and_experts_in_one_parameter_are_no_lists_of_experts():
    model = mixtures.mixture()
    convert_to_smt(model, tiny.choose(model, tiny.config(target_modules="experts", score="random")))
    assert any(isinstance(module, nn.ModuleDict) for module in model.modules())
    assert not list(expert_lists(model))
