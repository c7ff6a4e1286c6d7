"""Rows of embeddings that are trained, alone and with the head that is tied to them."""

import copy

import pytest
import tiny
import torch
from reference import block_mask
from torch import nn

from smt_trainer import SMTConfig, SMTError, convert_to_smt, load_delta, merge_and_unload, save_delta, select_tokens
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.embedding import SMTEmbedding, TiedHead

NAME = "model.embed_tokens"
SHAPES = {
    "rows": {"granularity": "row", "block_size": "auto"},
    "columns": {"granularity": "column", "block_size": "auto"},
    "blocks": {"granularity": "block", "block_size": (4, 16)},
}
MODELS = {
    "untied": lambda: tiny.llama(),
    "tied": lambda: tiny.llama(tie_word_embeddings=True),
    "scaled": lambda: tiny.build("GemmaForCausalLM", num_key_value_heads=2, head_dim=16),
}


def chosen(model, **fields):
    values = {"target_modules": ["embed_tokens"], "score": "random", "budget": 20} | SHAPES["rows"]
    return tiny.choose(model, SMTConfig(**values | fields))


def batch(seed: int = 0):
    """Make a batch with repeated tokens and, in the last row, padding (token 0)."""
    ids = torch.randint(1, tiny.VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(seed))
    ids[:, 5] = ids[:, 2]
    ids[-1, 9:] = 0
    return {"input_ids": ids, "labels": ids}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]().double()


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_the_blocks_get_the_gradient_of_dense_training(model, fields):
    selection, dense = chosen(model, **fields), copy.deepcopy(model)
    loss = dense(**batch()).loss
    loss.backward()
    convert_to_smt(model, selection)
    ours = model(**batch()).loss
    ours.backward()
    assert torch.equal(ours, loss)
    embedding = model.get_submodule(NAME)
    wanted = embedding.grid.gather(dense.get_submodule(NAME).weight.grad, embedding.block_indices)
    assert wanted.any()
    torch.testing.assert_close(embedding.blocks.grad, wanted.to(embedding.blocks.dtype))
    assert [name for name, one in model.named_parameters() if one.grad is not None] == [f"{NAME}.blocks"]


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_steps_of_adam_equal_dense_training_with_the_gradient_masked(model, fields):
    selection, before = chosen(model, master_dtype="float64", **fields), tiny.weights(model)
    dense = copy.deepcopy(model).requires_grad_(False)
    mask = block_mask(selection.grids[NAME], torch.from_numpy(selection.block_indices[NAME]))
    weight = dense.get_submodule(NAME).weight.requires_grad_(True)
    convert_to_smt(model, selection)
    optimizers = [torch.optim.Adam([one], lr=0.01) for one in (model.get_submodule(NAME).blocks, weight)]
    for seed in range(4):
        for trained, optimizer in zip((model, dense), optimizers, strict=True):
            optimizer.zero_grad()
            trained(**batch(seed)).loss.backward()
            if trained is dense:
                weight.grad.mul_(mask)
            optimizer.step()
    merge_and_unload(model)
    after = model.state_dict()
    torch.testing.assert_close(after, dense.state_dict())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if after[name].data_ptr() == after[f"{NAME}.weight"].data_ptr()}
    assert torch.equal(after[f"{NAME}.weight"][~mask], before[f"{NAME}.weight"][~mask])


def test_the_padding_token_gets_the_gradient_of_a_tied_head_alone(model):
    dense = copy.deepcopy(model)
    dense(**batch()).loss.backward()
    embedding = convert_to_smt(model, select_tokens(model, [0])).get_submodule(NAME)
    model(**batch()).loss.backward()
    torch.testing.assert_close(embedding.blocks.grad[0], dense.get_submodule(NAME).weight.grad[:1].float())
    assert embedding.blocks.grad.any() == (model.lm_head.weight is embedding.weight)


def test_ties_stay_and_undoing_leaves_no_trace(model):
    plain, kind, is_tied = str(model), type(model.get_submodule(NAME)), model.config.tie_word_embeddings
    attributes = [vars(module).keys() for module in model.modules()]
    convert_to_smt(model, chosen(model))
    embedding = model.get_submodule(NAME)
    assert (
        isinstance(embedding, SMTEmbedding) and isinstance(embedding, kind) and "blocks=20 of 1x64" in repr(embedding)
    )
    assert isinstance(model.lm_head, TiedHead) == is_tied == (model.lm_head.weight is embedding.weight)
    assert [name for name, _ in block_modules(model)] == [NAME]
    model.tie_weights()
    tiny.step(model, **batch())
    merge_and_unload(model)
    assert str(model) == plain and type(embedding) is kind and type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is embedding.weight) == is_tied
    assert [vars(module).keys() for module in model.modules()] == attributes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_copy_is_trained_by_itself(model):
    convert_to_smt(model, chosen(model))
    copied, before = copy.deepcopy(model), tiny.weights(model)
    tiny.step(copied, **batch())
    tiny.assert_same(tiny.weights(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    ones, is_tied = torch.ones(64, dtype=torch.float64), copied.config.tie_word_embeddings
    assert torch.equal(copied.lm_head(ones), model.lm_head(ones)) != is_tied


def test_a_tied_head_reads_blocks_that_any_loop_changed():
    model = MODELS["tied"]()
    convert_to_smt(model, select_tokens(model, [7]))
    with torch.no_grad():
        model.get_submodule(NAME).blocks.fill_(1)
    assert model.lm_head(torch.ones(64))[7] == 64


def test_masters_are_in_float32_and_forward_uses_their_rounded_values():
    model = MODELS["tied"]().bfloat16()
    embedding = convert_to_smt(model, select_tokens(model, [7, 3])).get_submodule(NAME)
    with torch.no_grad():
        embedding.blocks += 2**-12
    model(**batch()).loss.backward()
    assert embedding.blocks.grad.dtype == torch.float32
    assert torch.equal(embedding.weight[[3, 7]], embedding.blocks.detach().squeeze(1).bfloat16())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(model, reentrant):
    convert_to_smt(model, chosen(model))
    blocks, gradients = model.get_submodule(NAME).blocks, []
    for checkpointing in (False, True):
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**batch()).loss.backward()
        gradients.append(blocks.grad)
        blocks.grad = None
    torch.testing.assert_close(*gradients)


def test_a_compiled_model_trains_the_same(model):
    convert_to_smt(model, chosen(model))
    blocks, gradients = model.get_submodule(NAME).blocks, []
    for run in (model, torch.compile(model, backend="aot_eager")):
        run(**batch()).loss.backward()
        gradients.append(blocks.grad)
        blocks.grad = None
    torch.testing.assert_close(*gradients)


def test_a_delta_round_trip(model, tmp_path):
    model.float()
    base = copy.deepcopy(model)
    convert_to_smt(model, chosen(model))
    tiny.disturb(model)
    save_delta(model, tmp_path / "delta")
    loaded = load_delta(base, tmp_path / "delta", merge=True)
    merge_and_unload(model)
    tiny.assert_same(tiny.weights(loaded), tiny.weights(model))
    assert (loaded.lm_head.weight is loaded.get_submodule(NAME).weight) == loaded.config.tie_word_embeddings


def test_a_head_that_is_tied_cannot_be_trained_whole_besides():
    model = MODELS["tied"]()
    with pytest.raises(SMTError, match=r"`model.embed_tokens` is a target but lies in `lm_head`, or shares its weight"):
        convert_to_smt(model, chosen(model, modules_to_save=["lm_head"]))


def test_a_selection_of_another_module_or_a_shared_one_is_refused():
    model = tiny.llama()
    selection = chosen(model)
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(
        SMTError,
        match=r"lie in an embedding with a weight of 64x64; this model has one that cannot be trained: it has max_norm",
    ):
        convert_to_smt(model, selection)
    model.model.embed_tokens = nn.Linear(64, 64)
    with pytest.raises(SMTError, match="this model has a Linear"):
        convert_to_smt(model, selection)
