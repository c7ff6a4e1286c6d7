"""Slice models by transformers' tensor parallelism, in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.integrations.tensor_parallel import apply_tensor_parallelism, replace_layer_number_by_wildcard


@contextlib.contextmanager
def silent_ranks(count: int) -> Generator[None]:
    """Make this process the first of `count` ranks, between which nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def only_rank(folder: Path) -> Generator[None]:
    """Make this process the only rank."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def cut(model: nn.Module) -> nn.Module:
    """Cut the linears of a model by its own `tp_plan`, into as many slices as there are ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model._tp_size = mesh.size()
    plan = model.tp_plan
    linears = {name: plan.get(replace_layer_number_by_wildcard(name)) for name, _ in model.named_modules()}
    linears = {name: style for name, style in linears.items() if style is not None}
    styles = {f"{name}.{leaf}": style for name, style in linears.items() for leaf in ("weight", "bias")}
    own = dict(model.named_parameters())
    with torch.no_grad():
        return apply_tensor_parallelism(model, mesh, {name: styles[name] for name in styles if name in own} | linears)
