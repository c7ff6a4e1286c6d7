"""Patches as the classes of vLLM, with stand-ins of the same fields (vLLM #50723, #53751), applied as
vLLM does."""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import pytest
import tiny
import torch

from smt_trainer import SMTError, convert_to_smt, model_patches, to_sparse_nccl, to_vllm
from smt_trainer.export.weight_patch import WeightPatch
from smt_trainer.sparse.plain import plain_state_dict


class CheckpointWeightPatch(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None = None


@dataclass
class SparseWeightPatch:
    name: str
    indices: torch.Tensor
    values: torch.Tensor
    full_shape: tuple[int, ...]


@pytest.fixture
def vllm(monkeypatch):
    """Let vLLM be installed."""
    for path, kind in (
        ("vllm.model_executor.model_loader.checkpoint_weight_patch", CheckpointWeightPatch),
        ("vllm.distributed.weight_transfer.sparse_nccl_engine", SparseWeightPatch),
    ):
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:end]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(module, kind.__name__, kind)


@pytest.fixture
def trained():
    """Return the weights of a base, and the model after a step that trained blocks, norms and embeddings."""
    model = tiny.llama().bfloat16()
    before = tiny.weights(model)
    convert_to_smt(
        model, tiny.choose(model, tiny.config(score="random", train_norm=True, modules_to_save=["embed_tokens"]))
    )
    tiny.step(model, **tiny.batch())
    return before, model


def put(state, name, shape, values, indices) -> None:
    """Write a patch as vLLM does: over a tensor of NaN, which stand for what stays."""
    new = torch.full(state[name].shape, torch.nan, dtype=values.dtype).flatten()
    new[slice(None) if indices is None else indices.long()] = values
    assert tuple(shape) == tuple(state[name].shape) and values.dtype == state[name].dtype
    state[name] = torch.where(new.isnan(), state[name].flatten(), new).view(shape)


def test_what_the_loader_takes_makes_the_base_the_trained_model(vllm, trained):
    state, model = trained
    patches = list(to_vllm(model_patches(model, max_bytes=1000)))
    assert {type(patch) for patch in patches} == {CheckpointWeightPatch}
    is_sparse = [patch.indices is not None for patch in patches]
    assert is_sparse == sorted(is_sparse, reverse=True) and len(set(is_sparse)) == 2
    for patch in patches:
        put(state, patch.name, patch.shape, patch.values, patch.indices)
    tiny.assert_same(state, plain_state_dict(model))


def test_what_a_trainer_sends_makes_the_base_the_trained_model(vllm, trained):
    state, model = trained
    for patch in to_sparse_nccl(model_patches(model, max_bytes=1000)):
        assert isinstance(patch, SparseWeightPatch)
        assert patch.indices.dtype == torch.int32 and patch.indices.shape == patch.values.shape
        # It is sent as it lies in memory.
        assert patch.indices.is_contiguous() and patch.values.is_contiguous()
        put(state, patch.name, patch.full_shape, patch.values, patch.indices)
    tiny.assert_same(state, plain_state_dict(model))


def test_what_sparse_nccl_cannot_send_is_refused(vllm):
    integers = WeightPatch("steps", (2,), torch.int64, torch.tensor([1, 2]))
    huge = WeightPatch("w", (2**16, 2**16), torch.float32, torch.ones(1), torch.tensor([2**31]))
    for patch, found in ((integers, "torch.int64"), (huge, "torch.float32 at torch.int64")):
        with pytest.raises(SMTError, match=f"patch of `{patch.name}` .* is of {found}"):
            list(to_sparse_nccl([patch]))


@pytest.mark.parametrize("function", [to_vllm, to_sparse_nccl])
def test_without_vllm_it_is_said_what_to_install(function, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SMTError, match=r"of vLLM \(pull request #\d+\).*pip install -U vllm"):
        function([])
