"""The parts of a weight that ranks hold, on one process, with the attributes of a parameter that ZeRO-3 partitioned.

Runs on real ranks are in `runs/test_sharded.py`.
"""

import math

import images
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smt_trainer import SMTError, convert_to_smt
from smt_trainer.model.sharded import assign, full_shape, full_tensor, local_parts
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.write_back import write_back


class OfRank:
    """Stands in for a process group in which this process has `rank`."""

    def __init__(self, rank: int) -> None:
        self.rank = rank


@pytest.fixture(autouse=True, scope="module")
def ranks_of_stand_ins():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.get_rank", lambda group: group.rank)
        yield


def partitioned(weight: torch.Tensor, rank: int, ranks: int, whole: bool = False) -> nn.Parameter:
    """Make one rank's ZeRO-3 parameter of a weight; `whole` as for one below the persistence threshold."""
    share = -(-weight.numel() // ranks)
    padded = torch.cat([weight.flatten(), weight.new_zeros(share * ranks - weight.numel())])
    parameter = nn.Parameter(weight.clone() if whole else weight.new_empty(0), requires_grad=False)
    parameter.ds_id, parameter.ds_shape, parameter.ds_numel = 0, weight.shape, weight.numel()
    parameter.ds_tensor = padded[share * rank : share * (rank + 1)].clone()
    parameter.ds_process_group = OfRank(rank)
    return parameter


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    kernel=st.sampled_from([(), (2,), (1, 3)]),
    ranks=st.integers(1, 12),
)
def test_the_parts_of_all_ranks_cover_a_weight_once(rows, columns, kernel, ranks):
    stored = torch.arange(1.0, rows * columns * math.prod(kernel) + 1).view(rows, columns, *kernel)
    weight = stored.view(rows, -1)
    count = torch.zeros_like(weight)
    for rank in range(ranks):
        for values, row, column in local_parts(partitioned(stored, rank, ranks), weight.shape[1]):
            place = slice(row, row + values.shape[0]), slice(column, column + values.shape[1])
            assert torch.equal(values, weight[place])
            count[place] += 1
    assert torch.equal(count, torch.ones_like(weight))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, images.convnext])
def test_blocks_are_written_back_to_the_shares_of_all_ranks(build, ranks, whole):
    config = images.config(score="random") if build is images.convnext else None
    model = convert_to_smt(build(), tiny.choose(build(), config))
    layers = [layer for _, layer in block_modules(model)]
    with torch.no_grad():
        for layer in layers:
            layer.blocks += torch.randn_like(layer.blocks)
    base = [layer.weight.detach().clone() for layer in layers]
    write_back(layers)
    expected = [layer.weight.detach().clone() for layer in layers]

    shares = [[] for _ in layers]
    for rank in range(ranks):
        for layer, weight in zip(layers, base, strict=True):
            layer.weight = partitioned(weight, rank, ranks, whole)
        write_back(layers)
        for layer, found, weight in zip(layers, shares, expected, strict=True):
            found.append(layer.weight.ds_tensor)
            assert not whole or torch.equal(layer.weight, weight)
    for found, weight in zip(shares, expected, strict=True):
        assert torch.equal(torch.cat(found)[: weight.numel()].view_as(weight), weight)


def test_a_partitioned_parameter_has_its_whole_shape_and_takes_no_values():
    parameter = partitioned(torch.ones(4, 3), rank=0, ranks=2)
    assert full_shape(parameter) == (4, 3)
    with pytest.raises(SMTError, match="ZeRO-3 has partitioned"):
        assign(parameter, torch.zeros(4, 3))


def test_any_other_parameter_is_one_part_and_whole():
    weight = nn.Parameter(torch.randn(4, 3))
    ((values, row, column),) = local_parts(weight, 3)
    assert values.data_ptr() == weight.data_ptr() and (row, column) == (0, 0)
    assert full_shape(weight) == (4, 3) and full_tensor(weight).data_ptr() == weight.data_ptr()
    assign(weight, torch.ones(4, 3))
    assert torch.equal(weight, torch.ones(4, 3))
