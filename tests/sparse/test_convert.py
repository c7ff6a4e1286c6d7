"""Rewriting a model and making it plain again, on many architectures."""

import dataclasses

import pytest
import tiny
import torch
import transformers
from architectures import ARCHITECTURES, ATTENTIONS, inputs_of
from reference import block_mask, train_only
from torch import nn

from smt_trainer import SMTConfig, SMTError, convert_to_smt, merge_and_unload
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.heads import head_names
from smt_trainer.model.targets import find_targets
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.linear import SMTLinear
from smt_trainer.sparse.state import is_smt_model, trainable_parameters


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_projections_of_an_architecture_are_found_trained_and_merged(architecture):
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    overrides, expected = ARCHITECTURES[architecture]
    model = tiny.build(architecture, **overrides)
    classes = {name: type(module) for name, module in model.named_modules()}
    targets = list(find_targets(model, tiny.config()))
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in targets))
    assert leaves == expected or (expected is None and len(leaves) == 3)
    assert len(targets) == ATTENTIONS.get(architecture, 2) * len(leaves)

    inputs, before = inputs_of(model), tiny.weights(model)
    selection = tiny.choose(model)
    convert_to_smt(model, selection)
    tiny.step(model, **inputs)
    trained = tiny.logits(model, **inputs)
    merge_and_unload(model)

    assert {name: type(module) for name, module in model.named_modules()} == classes
    # FalconLinear multiplies, then adds the bias; others do both at once. They differ by one rounding.
    tolerance = 1e-6 if architecture == "FalconForCausalLM" else 0
    torch.testing.assert_close(tiny.logits(model, **inputs), trained, rtol=tolerance, atol=tolerance)
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in selection.block_indices:
            mask = block_mask(selection.grids[module], selection.block_indices[module])
            assert torch.equal(tensor[~mask], before[name][~mask])
            assert not torch.equal(tensor[mask], before[name][mask])
        elif name.partition(".")[0] not in head_names(model):
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("granularity", ["block", "row", "column"])
# Separate projections, a transposed one, and projections that each forward pass calls once per layer.
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.albert])
def test_one_step_equals_dense_training_with_the_gradient_masked(make, granularity, optimizer, dtype, tolerance):
    shape = {} if granularity == "block" else {"granularity": granularity, "block_size": "auto"}
    master_dtype = str(dtype).removeprefix("torch.")
    smt_config = tiny.config(score="random", master_dtype=master_dtype, modules_to_save=[], **shape)
    sparse, dense = make().to(dtype), make().to(dtype)
    inputs = inputs_of(sparse)
    selection = tiny.choose(sparse, smt_config)
    masks = {name: block_mask(selection.grids[name], chosen) for name, chosen in selection.block_indices.items()}
    base = tiny.weights(dense)

    # Decay would change the masked weights of the dense twin; the sparse model does not train them at all.
    optimizer_class = type("NoDecay", (optimizer,), {})
    if optimizer is torch.optim.AdamW:
        optimizer_class.__init__ = lambda self, trained, lr: optimizer.__init__(self, trained, lr=lr, weight_decay=0)
    tiny.step(convert_to_smt(sparse, selection), optimizer_class, **inputs)
    tiny.step(train_only(dense, masks), optimizer_class, **inputs)

    trained = merge_and_unload(sparse).state_dict()
    assert trained.keys() == base.keys()
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=tolerance, atol=tolerance)
        untouched = ~masks.get(name.removesuffix(".weight"), torch.zeros_like(tensor, dtype=torch.bool))
        assert torch.equal(trained[name][untouched], base[name][untouched])


def test_only_the_blocks_are_trained(llama):
    selection = tiny.choose(llama)
    convert_to_smt(llama, selection)
    names = {name for name, parameter in llama.named_parameters() if parameter.requires_grad}
    assert names == {f"{name}.blocks" for name in selection.block_indices}
    assert trainable_parameters(llama) == selection.trainable_parameters == 12 * 256


def test_the_model_its_modules_and_its_ties_keep_their_identity():
    model = tiny.llama(tie_word_embeddings=True)
    modules, parameters = list(model.modules()), dict(model.named_parameters())
    assert convert_to_smt(model, tiny.choose(model)) is model
    assert all(ours is theirs for ours, theirs in zip(model.modules(), modules, strict=True))
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_unloading_restores_requires_grad(llama):
    llama.lm_head.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in llama.named_parameters()}
    merge_and_unload(convert_to_smt(llama, tiny.choose(llama)))
    assert {name: parameter.requires_grad for name, parameter in llama.named_parameters()} == before
    assert not is_smt_model(llama) and not list(block_modules(llama))


def test_rewriting_and_unloading_without_training_changes_no_weight(llama):
    before = tiny.weights(llama)
    merge_and_unload(convert_to_smt(llama, tiny.choose(llama)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


def test_generating_gives_the_merged_models_tokens(delta):
    model, prompt = delta[1], tiny.tokens(2, length=4)
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(merge_and_unload(model).generate(prompt, max_new_tokens=6, do_sample=False), generated)


def test_a_model_is_rewritten_once_and_made_plain_once(llama):
    selection = tiny.choose(llama)
    convert_to_smt(llama, selection)
    with pytest.raises(SMTError, match="already trains blocks; call merge_and_unload"):
        convert_to_smt(llama, selection)
    merge_and_unload(llama)
    with pytest.raises(SMTError, match="merged already"):
        merge_and_unload(llama)
    with pytest.raises(SMTError, match="trains no blocks"):
        merge_and_unload(tiny.llama())


def test_the_head_of_a_classifier_is_trained_whole_unless_told_otherwise():
    for modules_to_save, expected in ((None, True), ([], False)):
        model = tiny.build("BertForSequenceClassification", num_labels=3)
        convert_to_smt(model, tiny.choose(model, tiny.config(score="random", modules_to_save=modules_to_save)))
        assert {parameter.requires_grad for parameter in model.classifier.parameters()} == {expected}


def test_named_modules_are_trained_whole(llama):
    convert_to_smt(llama, tiny.choose(llama, tiny.config(score="random", modules_to_save=["norm"])))
    assert llama.model.norm.weight.requires_grad
    assert trainable_parameters(llama) == 12 * 256 + 64


@pytest.mark.parametrize("master_dtype", ["float32", "bfloat16", "float64"])
def test_masters_have_the_configured_dtype(llama, master_dtype):
    convert_to_smt(llama, tiny.choose(llama, tiny.config(score="random", master_dtype=master_dtype)))
    assert {layer.blocks.dtype for _, layer in block_modules(llama)} == {getattr(torch, master_dtype)}


def test_any_module_tree_of_linears_works():
    model = nn.ModuleDict({"q_proj": nn.Linear(32, 32), "rest": nn.Linear(32, 32)})
    selection = dataclasses.replace(tiny.every_block(model, ["q_proj"]), config=SMTConfig(target_modules=["q_proj"]))
    convert_to_smt(model, selection)
    assert isinstance(model["q_proj"], SMTLinear) and selection.grids["q_proj"] == BlockGrid(32, 32, 16, 16)
