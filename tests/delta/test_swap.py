"""One base in memory, many deltas."""

import copy

import pytest
import quantised
import tiny
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from smt_trainer import Delta, SMTError, applied, convert_to_smt, from_delta, merge_and_unload, save_delta, swap
from smt_trainer.model.base import base_name

KINDS = {
    "blocks": {},
    "rows": {"granularity": "row", "block_size": "auto", "budget": 9},
    "columns": {"granularity": "column", "block_size": "auto", "budget": 9},
    "a whole module": {"modules_to_save": ["lm_head"]},
    "norms": {"train_norm": True},
}


def tune(model, folder, seed, **fields):
    """Save a delta of a plain model with changed values; return the folder."""
    model = copy.deepcopy(model)
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", **fields), seed))
    torch.manual_seed(seed)
    tiny.disturb(model)
    save_delta(model, folder)
    return folder


def merged(folder, base):
    return tiny.weights(from_delta(folder, base=base))


@pytest.fixture
def model(base):
    return AutoModelForCausalLM.from_pretrained(base)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_swapped_in_is_the_merged_model_and_out_the_base(kind, dtype, llama, tmp_path):
    base = tmp_path / "base"
    llama.to(dtype).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    before = tiny.weights(model)
    delta = tune(model, tmp_path / "delta", 1, **KINDS[kind])
    swap(model, delta)
    tiny.assert_same(dict(model.state_dict()), merged(delta, base))
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    swap(model, None)
    tiny.assert_same(dict(model.state_dict()), before)


def test_deltas_follow_each_other_in_any_order(model, base, tmp_path):
    before, folders = tiny.weights(model), [tune(model, tmp_path / str(seed), seed) for seed in range(3)]
    deltas = [Delta.load(folder) for folder in folders]
    for place in (0, 1, 1, 2, 0, None, 2):
        swap(model, None if place is None else deltas[place])
        expected = before if place is None else merged(folders[place], base)
        tiny.assert_same(dict(model.state_dict()), expected)


def test_contexts_nest_and_end_in_an_exception_as_they_began(model, base, tmp_path):
    before, (first, second) = tiny.weights(model), [tune(model, tmp_path / str(seed), seed) for seed in range(2)]
    with applied(model, first) as same:
        assert same is model
        with pytest.raises(ZeroDivisionError), applied(model, second):
            tiny.assert_same(dict(model.state_dict()), merged(second, base))
            raise ZeroDivisionError
        tiny.assert_same(dict(model.state_dict()), merged(first, base))
    tiny.assert_same(dict(model.state_dict()), before)


@pytest.mark.parametrize("build", [tiny.gpt2, lambda: tiny.llama(tie_word_embeddings=True)], ids=["GPT-2", "tied"])
def test_transposed_weights_and_tied_ones(build, tmp_path):
    base, plain = tmp_path / "base", build()
    plain.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    delta = tune(model, tmp_path / "delta", 1)
    with applied(model, delta):
        tiny.assert_same(dict(model.state_dict()), merged(delta, base))
    tiny.assert_same(dict(model.state_dict()), dict(AutoModelForCausalLM.from_pretrained(base).state_dict()))


def test_a_swapped_model_is_plain_and_is_saved_as_it_is(model, base, tmp_path):
    delta = tune(model, tmp_path / "delta", 1)
    names = model.state_dict().keys()
    with applied(model, delta):
        assert model.state_dict().keys() == names
        model.save_pretrained(tmp_path / "saved")
        assert base_name(model) is None
    assert base_name(model) is not None
    tiny.assert_same(tiny.weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), merged(delta, base))


def test_a_delta_of_another_base_is_refused_first_and_later(model, base, tmp_path):
    other = tiny.llama(seed=7)
    ours, theirs = tune(model, tmp_path / "ours", 1), tune(other, tmp_path / "theirs", 1)
    before = tiny.weights(model)
    with pytest.raises(SMTError, match="has other values in"):
        swap(model, theirs)
    tiny.assert_same(dict(model.state_dict()), before)
    with applied(model, ours):
        with pytest.raises(SMTError, match="has other values in"):
            swap(model, theirs)
        tiny.assert_same(dict(model.state_dict()), merged(ours, base))


def test_deltas_of_one_base_that_hold_other_tensors_whole_follow_each_other(model, base, tmp_path):
    before, folders = tiny.weights(model), {kind: tune(model, tmp_path / kind, 1, **KINDS[kind]) for kind in KINDS}
    for kind in (*KINDS, *reversed(KINDS)):
        swap(model, folders[kind])
        tiny.assert_same(dict(model.state_dict()), merged(folders[kind], base))
    swap(model, None)
    tiny.assert_same(dict(model.state_dict()), before)


def training(model, seed=0, **fields):
    """Return a copy of a plain model that trains blocks, after a step, and its optimizer."""
    model = copy.deepcopy(model)
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", **fields), seed))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer) -> None:
    model.train()(**tiny.batch(), use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_earlier_step_is_swapped_into_a_model_in_training(kind, dtype, llama, tmp_path):
    base = tmp_path / "base"
    llama.to(dtype).save_pretrained(base)
    model, optimizer = training(AutoModelForCausalLM.from_pretrained(base), **KINDS[kind])
    untouched, its_optimizer = training(AutoModelForCausalLM.from_pretrained(base), **KINDS[kind])
    save_delta(model, tmp_path / "delta")
    step(model, optimizer)
    step(untouched, its_optimizer)
    with applied(model, tmp_path / "delta"):
        # Evaluation and saving write the blocks into the weights.
        found = tiny.weights(model.eval())
        tiny.assert_same(
            {name: found[name] for name in merged(tmp_path / "delta", base)}, merged(tmp_path / "delta", base)
        )
        tiny.assert_same(tiny.logits(model), tiny.logits(from_delta(tmp_path / "delta", base=base)))
    tiny.assert_same(tiny.weights(model), tiny.weights(untouched))
    # The masters are those of before, too: training goes on as if nothing had been.
    step(model, optimizer)
    step(untouched, its_optimizer)
    tiny.assert_same(tiny.weights(model), tiny.weights(untouched))


def test_deltas_follow_each_other_in_a_model_in_training(model, base, tmp_path):
    model, optimizer = training(model)
    for folder in ("first", "second"):
        save_delta(model, tmp_path / folder, master=folder == "second")
        step(model, optimizer)
    before = tiny.weights(model)
    for folder in ("first", "second", "second", "first", None):
        swap(model, folder and tmp_path / folder)
        expected = merged(tmp_path / folder, base) if folder else before
        tiny.assert_same({name: tiny.weights(model)[name] for name in expected}, expected)
    tiny.assert_same(tiny.weights(model), before)


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_blocks_beside_quantised_weights_are_swapped(kind, base, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = quantised.load(base, kind)
    convert_to_smt(model, tiny.choose(model))
    found = {}
    for folder in ("first", "second"):
        tiny.disturb(model)
        save_delta(model, tmp_path / folder)
        found[folder] = tiny.logits(model)
    with applied(model, tmp_path / "first"):
        tiny.assert_same(tiny.logits(model), found["first"])
    tiny.assert_same(tiny.logits(model), found["second"])
    assert not torch.equal(found["first"], found["second"])


def test_what_cannot_be_swapped_into_is_refused(model, base, tmp_path):
    delta = tune(model, tmp_path / "delta", 1)
    rewritten, _ = training(model)
    before = tiny.weights(rewritten)
    with pytest.raises(SMTError, match="the delta holds other blocks than this model trains"):
        swap(rewritten, delta)
    tiny.assert_same(tiny.weights(rewritten), before)
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SMTError, match="not in a quantised base"):
        swap(quantised.load(base, "nf4"), delta)


def test_weights_that_are_spread_over_ranks_are_refused(model, tmp_path):
    delta = tune(model, tmp_path / "delta", 1)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        weight = distribute_tensor(model.lm_head.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        model.lm_head.weight = torch.nn.Parameter(weight)
        with pytest.raises(
            SMTError, match=r"sharded over ranks.*from_delta\(delta, base=..., distributed_config=...\)"
        ):
            swap(model, delta)
    finally:
        torch.distributed.destroy_process_group()


def test_statistics_that_only_the_model_has_are_not_left_in(model, tmp_path):
    model.model.layers[0].extra = torch.nn.BatchNorm1d(4)
    convert_to_smt(model, tiny.choose(model))
    save_delta(model, tmp_path / "delta")
    model.model.layers[0].extra(torch.randn(8, 4))
    with pytest.raises(SMTError, match=r"holds `model.layers.0.extra.num_batches_tracked`, such as"):
        swap(model, tmp_path / "delta")


def test_a_model_that_was_rewritten_or_merged_meanwhile_is_refused(model, base, tmp_path):
    delta = tune(model, tmp_path / "delta", 1)
    swap(model, delta)
    convert_to_smt(model, tiny.choose(model))
    with pytest.raises(SMTError, match=r"rewritten or merged while a delta was swapped in.*swap\(model, None\)"):
        swap(model, None)
    rewritten, _ = training(AutoModelForCausalLM.from_pretrained(base))
    save_delta(rewritten, tmp_path / "own")
    swap(rewritten, tmp_path / "own")
    with pytest.raises(SMTError, match="rewritten or merged while a delta was swapped in"):
        swap(merge_and_unload(rewritten), None)


def test_other_rows_of_the_vocabulary_are_refused(model, tmp_path):
    delta = tune(model, tmp_path / "delta", 1, modules_to_save=["embed_tokens", "lm_head"])
    model.resize_token_embeddings(tiny.VOCABULARY + 4)
    with pytest.raises(SMTError, match="Load the base"):
        swap(model, delta)
