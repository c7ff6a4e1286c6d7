"""Changes of one base add up."""

import arithmetic
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from smt_trainer import SMTError, compose_deltas, from_delta, load_delta, merge_checkpoint, verify_merge
from smt_trainer.arithmetic.compose import Composition
from smt_trainer.delta.delta import Delta
from smt_trainer.delta.folder import DELTA_FILE, MANIFEST_FILE

WEIGHTS = st.floats(-2, 2, allow_subnormal=False)


@pytest.fixture
def trained(base, tmp_path):
    """Return a function that trains a delta of the base by a seed."""
    return lambda seed, **fields: arithmetic.train(tiny.llama(), tmp_path / f"delta{seed}", seed, **fields)


def merged(base, delta, tmp_path):
    """Return the tensors of a base with a delta merged into it."""
    merge_checkpoint(base, delta, tmp_path / "merged")
    assert verify_merge(base, delta, tmp_path / "merged").problems == []
    return tiny.saved_tensors(tmp_path / "merged")


@pytest.mark.parametrize("master_dtype", ["float32", "float64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [False, True])
def test_one_delta_is_itself_bit_for_bit(mean, dtype, master_dtype, tmp_path):
    tiny.llama().to(dtype).save_pretrained(tmp_path / "base")
    fields = {"train_norm": True, "master_dtype": master_dtype}
    delta = arithmetic.train(tiny.llama().to(dtype), tmp_path / "delta", **fields)
    compose_deltas(tmp_path / "base", [delta], tmp_path / "composed", mean=mean)
    # The copy of the manifest holds a checksum of all tensors.
    assert (tmp_path / "composed" / MANIFEST_FILE).read_bytes() == (delta / MANIFEST_FILE).read_bytes()
    arithmetic.assert_equal(*(load_file(folder / DELTA_FILE) for folder in (tmp_path / "composed", delta)))


def test_deltas_that_share_nothing_are_merged_one_after_the_other(base, tmp_path):
    halves = arithmetic.halves(tiny.choose(tiny.llama()))
    folders = [
        arithmetic.train(tiny.llama(), tmp_path / f"delta{number}", number, half) for number, half in enumerate(halves)
    ]
    before = tiny.saved_tensors(base)
    for number, order in enumerate((folders, folders[::-1])):
        found = compose_deltas(base, order, tmp_path / f"composed{number}")
        assert (found.shared, found.shared_whole) == ({}, []) and "share nothing" in str(found)
        expected = arithmetic.put(order[1], arithmetic.put(order[0], before))
        (tmp_path / f"run{number}").mkdir()
        arithmetic.assert_equal(merged(base, tmp_path / f"composed{number}", tmp_path / f"run{number}"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("weights", "mean"), [(None, False), ([1, 0.5], False), (None, True), ([2, -1], True)])
def test_changes_are_summed_and_rounded_once(weights, mean, dtype, tmp_path):
    base = tmp_path / "base"
    tiny.llama().to(dtype).save_pretrained(base)
    folders = [
        arithmetic.train(tiny.llama().to(dtype), tmp_path / f"delta{seed}", seed, budget=30, train_norm=True)
        for seed in range(2)
    ]
    found = compose_deltas(base, folders, tmp_path / "composed", weights=weights, mean=mean)
    before = tiny.saved_tensors(base)
    after = [arithmetic.put(folder, before) for folder in folders]
    ours = merged(base, tmp_path / "composed", tmp_path)
    for key, tensor in before.items():
        changes = sum(
            weight * (trained[key].double() - tensor.double())
            for weight, trained in zip(weights or [1, 1], after, strict=True)
        )
        expected = tensor.double() + changes / (2 if mean else 1)
        torch.testing.assert_close(ours[key], expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-12)
    indices = [Delta.load(folder).selection.block_indices for folder in folders]
    shared = {
        name: len({*map(tuple, found)} & {*map(tuple, indices[1].get(name, []))}) for name, found in indices[0].items()
    }
    assert found.shared == {name: count for name, count in shared.items() if count} != {}
    assert len(found.shared_whole) == 5


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(first=WEIGHTS, second=WEIGHTS)
def test_weights_are_linear(first, second, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear")
    tensors = tiny.saved_tensors(base)
    folders = [arithmetic.train(tiny.llama(), folder / f"delta{seed}", seed, budget=30) for seed in range(2)]
    compose_deltas(base, folders, folder / "composed", weights=[first, second])
    ours = arithmetic.put(folder / "composed", tensors)
    for key, before in tensors.items():
        changes = [arithmetic.put(one, tensors)[key].double() - before.double() for one in folders]
        expected = before.double() + first * changes[0] + second * changes[1]
        torch.testing.assert_close(ours[key].double(), expected, rtol=2**-24, atol=1e-15)


@pytest.mark.parametrize("count", [2, 3, 49])
def test_the_mean_of_one_delta_and_itself_is_the_delta(count, base, trained, tmp_path):
    folder = trained(0, train_norm=True)
    compose_deltas(base, [folder] * count, tmp_path / "composed", mean=True)
    composed, delta = Delta.load(tmp_path / "composed"), Delta.load(folder)
    for ours, theirs in ((composed.blocks, delta.blocks), (composed.whole, delta.whole)):
        arithmetic.assert_equal(ours, theirs)


def test_weight_zero_leaves_the_base(base, trained, tmp_path):
    compose_deltas(base, [trained(0, train_norm=True)], tmp_path / "composed", weights=[0])
    arithmetic.assert_equal(merged(base, tmp_path / "composed", tmp_path), tiny.saved_tensors(base))


SHAPES = [
    ({"block_size": 16}, {"block_size": 32}),
    ({"block_size": (16, 8)}, {"block_size": (4, 32)}),
    ({"granularity": "row", "block_size": "auto"}, {"block_size": 16}),
    ({"target_modules": "qkv"}, {"target_modules": "mlp"}),
]


@pytest.mark.parametrize("fields", SHAPES)
def test_blocks_of_other_shapes_and_targets_are_composed(fields, base, trained, tmp_path):
    folders = [trained(seed, budget=4, **own) for seed, own in enumerate(fields)]
    compose_deltas(base, folders, tmp_path / "composed")
    before = tiny.saved_tensors(base)
    after = [arithmetic.put(folder, before) for folder in folders]
    ours = merged(base, tmp_path / "composed", tmp_path)
    for key, tensor in before.items():
        expected = tensor.double() + sum(one[key].double() - tensor.double() for one in after)
        torch.testing.assert_close(ours[key].double(), expected, rtol=2**-23, atol=1e-12)
    tiny.assert_same(
        tiny.logits(from_delta(tmp_path / "composed", base=base)),
        tiny.logits(load_delta(tiny.llama(), tmp_path / "composed")),
    )


WHOLE = [
    {"train_norm": True},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["lm_head"], "train_norm": True},
]


@pytest.mark.parametrize("fields", WHOLE)
def test_whole_tensors_of_one_delta_stay_as_they_are(fields, base, trained, tmp_path):
    folders = [trained(0), trained(1, **fields)]
    compose_deltas(base, folders, tmp_path / "composed")
    composed, delta = (Delta.load(folder) for folder in (tmp_path / "composed", folders[1]))
    arithmetic.assert_equal(composed.whole, delta.whole)
    assert composed.fingerprint.checksums.keys().isdisjoint(composed.whole)
    model = load_delta(tiny.llama(), tmp_path / "composed")
    tiny.assert_same(tiny.logits(from_delta(tmp_path / "composed", base=base)), tiny.logits(model))


def with_new_heads(folder, count):
    """Save a base in a folder, and deltas of classifiers trained on it, whose heads are new; return those."""
    tiny.llama().save_pretrained(folder / "base")
    kind = type(tiny.build("LlamaForSequenceClassification"))
    return [
        arithmetic.train(kind.from_pretrained(folder / "base", num_labels=3), folder / f"delta{seed}", seed)
        for seed in range(count)
    ]


def test_heads_that_are_new_have_a_mean_and_no_sum(tmp_path):
    folders = with_new_heads(tmp_path, 2)
    compose_deltas(tmp_path / "base", folders, tmp_path / "mean", mean=True)
    heads = [Delta.load(folder).whole["score.weight"] for folder in [*folders, tmp_path / "mean"]]
    torch.testing.assert_close(heads[2], (heads[0] + heads[1]) / 2)
    assert from_delta(tmp_path / "mean", base=tmp_path / "base").score.weight.equal(heads[2])
    compose_deltas(tmp_path / "base", folders[:1], tmp_path / "one")
    with pytest.raises(SMTError, match=r"`score.weight` has no change that could be weighted: it is new"):
        compose_deltas(tmp_path / "base", folders, tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
def test_weights_that_make_one_up_to_rounding_need_no_base(weights, tmp_path):
    folders = with_new_heads(tmp_path, 3)
    compose_deltas(tmp_path / "base", folders, tmp_path / "sum", weights=weights)
    *heads, found = [Delta.load(folder).whole["score.weight"] for folder in [*folders, tmp_path / "sum"]]
    torch.testing.assert_close(found, sum(weight * head for weight, head in zip(weights, heads, strict=True)))


@pytest.mark.parametrize(
    ("shared", "whole", "text"),
    [
        ({"h.0.q_proj": 1}, [], "overlap in 1 block, in q_proj (1)"),
        ({"h.0.q_proj": 1, "h.1.q_proj": 1}, ["x"], "overlap in 2 blocks, in q_proj (2) and in 1 whole tensor, `x`"),
        ({}, ["x", "y"], "overlap in 2 whole tensors, such as `x`"),
    ],
)
def test_one_is_singular(shared, whole, text, llama):
    assert str(Composition(tiny.choose(llama), shared, whole)).endswith(f"\nthe deltas {text}")


# ---- refused ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tiny.llama(seed=1),
            r"was trained on another base model\. base has other values in .* merge that one first \(smt merge BASE "
            r"EARLIER OUT\) and give OUT as the base\.$",
        ),
        (lambda: tiny.llama(hidden_size=32), r"expects `.*` of .*base to have shape"),
    ],
    ids=["other values", "other shapes"],
)
def test_other_bases_are_refused_naming_the_delta(make, message, base, trained, tmp_path):
    other = arithmetic.train(make(), tmp_path / "other")
    with pytest.raises(SMTError, match=f"^the delta in {other} {message}"):
        compose_deltas(base, [trained(0), other], tmp_path / "composed")


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [1, float("nan")], [1, float("inf")]])
def test_other_numbers_of_weights_are_refused(weights, base, trained, tmp_path):
    with pytest.raises(SMTError, match="a finite weight for each; got 2 deltas"):
        compose_deltas(base, [trained(0), trained(1)], tmp_path / "composed", weights=weights)
    with pytest.raises(SMTError, match="got 0 deltas"):
        compose_deltas(base, [], tmp_path / "composed")


def test_blocks_of_what_is_whole_elsewhere_are_refused(base, trained, tmp_path):
    fields = {"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]}
    with pytest.raises(SMTError, match=r"holds `model.*q_proj.weight` whole, and the one in .*delta0 has"):
        compose_deltas(base, [trained(seed, budget=4, **own) for seed, own in enumerate(fields)], tmp_path / "composed")


def test_rows_and_columns_are_refused(base, trained, tmp_path):
    fields = [{"granularity": kind, "block_size": "auto"} for kind in ("row", "column")]
    with pytest.raises(SMTError, match="1x64 in one delta and 64x1 in another; common ones would be 1x1"):
        compose_deltas(base, [trained(seed, **own) for seed, own in enumerate(fields)], tmp_path / "composed")


def test_other_dtypes_are_refused(base, trained, tmp_path):
    other = arithmetic.train(tiny.llama().double(), tmp_path / "other")
    with pytest.raises(SMTError, match=r"has weight_dtype 'float32', the one in .* 'float64'. Extract both again"):
        compose_deltas(base, [trained(0), other], tmp_path / "composed")
