"""Two deltas side by side."""

import arithmetic
import pytest
import tiny
import torch

from smt_trainer import SMTError, diff_deltas
from smt_trainer.delta.delta import Delta


@pytest.fixture
def trained(tmp_path):
    """Return a function that trains a delta by a seed."""
    return lambda seed, **fields: arithmetic.train(tiny.llama(), tmp_path / f"delta{seed}", seed, **fields)


def test_counts_and_norms_are_those_of_the_dense_weights(base, trained):
    folders = [trained(seed, budget=30) for seed in range(2)]
    found = diff_deltas(*folders)
    assert (found.same_base, found.other_values, found.whole) == (True, [], {})
    before = tiny.saved_tensors(base)
    after = [arithmetic.put(folder, before) for folder in folders]
    chosen = [Delta.load(folder).selection for folder in folders]
    for name, part in found.modules.items():
        ours, theirs = ({*map(tuple, one.block_indices.get(name, torch.empty(0, 2)).tolist())} for one in chosen)
        assert (part.first, part.second, part.shared) == (len(ours), len(theirs), len(ours & theirs))
        assert part.jaccard == len(ours & theirs) / len(ours | theirs)
        one, other = (chosen[0].grids[name].split(weights[f"{name}.weight"].double()) for weights in after)
        norms = [torch.stack([blocks[place] for place in ours & theirs] or [one[0, 0] * 0]) for blocks in (one, other)]
        assert part.difference == pytest.approx((norms[0] - norms[1]).norm().item())
        assert part.values == pytest.approx(norms[0].norm().item())
    assert found.total.shared == sum(part.shared for part in found.projections.values()) > 0
    assert found.total.difference**2 == pytest.approx(sum(part.difference**2 for part in found.modules.values()))


def test_a_delta_has_all_in_common_with_itself(trained):
    folder = trained(0, train_norm=True)
    found = diff_deltas(folder, folder)
    assert found.same_base and found.total.jaccard == 1 and found.total.difference == 0
    assert len(found.whole) == 5 and not any(found.whole.values())


def test_deltas_of_other_shapes_and_targets_are_compared(trained):
    found = diff_deltas(trained(0, budget=8), trained(1, budget=2, block_size=32))
    assert (found.total.first, found.total.second) == (8, 8)
    found = diff_deltas(trained(0, target_modules="qkv"), trained(1, target_modules="mlp"))
    assert (found.total.shared, found.total.jaccard) == (0, 0)


def test_another_base_is_told(trained, tmp_path):
    other = tiny.llama()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    found = diff_deltas(trained(0), arithmetic.train(other, tmp_path / "other"))
    assert (found.same_base, found.other_values) == (False, ["lm_head.weight"])
    found = diff_deltas(trained(0), arithmetic.train(tiny.llama().bfloat16(), tmp_path / "rounded"))
    assert found.same_base is None


def test_bases_are_compared_whatever_the_deltas_hold_whole(tmp_path):
    sizes = {"vocab_size": 1200, "hidden_size": 256}
    ours, changed = tiny.llama(**sizes), tiny.llama(**sizes)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight += 1
    folders = [
        arithmetic.train(model, tmp_path / str(place), target_modules="qkv", **fields)
        for place, (model, fields) in enumerate(
            [(ours, {}), (tiny.llama(**sizes), {"modules_to_save": ["lm_head"], "train_norm": True}), (changed, {})]
        )
    ]
    assert diff_deltas(*folders[:2]).same_base is True
    found = diff_deltas(*folders[1:])
    assert (found.same_base, found.other_values) == (False, ["model.layers.1.mlp.up_proj.weight"])


def test_models_of_other_sizes_are_refused(trained, tmp_path):
    wide = arithmetic.train(tiny.llama(hidden_size=128), tmp_path / "wide")
    with pytest.raises(SMTError, match=r"q_proj` is \[64, 64\] in one delta and \[128, 128\] in another"):
        diff_deltas(trained(0), wide)


def test_whole_tensors_of_one_delta_are_named(trained):
    found = diff_deltas(trained(0), trained(1, modules_to_save=["lm_head"]))
    assert found.whole == {"lm_head.weight": None}
