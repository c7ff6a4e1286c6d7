"""A rewritten model as others see it."""

import pytest
import tiny
import torch

from smt_trainer import convert_to_smt, merge_and_unload
from smt_trainer.sparse.plain import plain_state_dict


def test_the_plain_state_dict_is_that_of_the_merged_model(delta):
    model = delta[1]
    plain = {name: tensor.clone() for name, tensor in plain_state_dict(model).items()}
    merged = merge_and_unload(model).state_dict()
    assert list(plain) == list(merged)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("ignored", [None, {"lm_head.weight"}], ids=["nothing", "the head"])
def test_saving_leaves_out_what_the_class_leaves_out_and_after_unloading_only_that(ignored, llama, tmp_path):
    llama._keys_to_ignore_on_save = ignored
    expected = llama.state_dict().keys() - (ignored or set())
    for step in (lambda model: convert_to_smt(model, tiny.choose(model)), merge_and_unload):
        step(llama).save_pretrained(tmp_path)
        assert tiny.saved_tensors(tmp_path).keys() == expected
    assert llama._keys_to_ignore_on_save == (ignored or set())
