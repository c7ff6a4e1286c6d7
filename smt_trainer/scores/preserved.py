"""Restore what scoring must not change in the model: which parameters require a gradient, and its buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from smt_trainer.scores.scorer import Scorer


@contextlib.contextmanager
def frozen(model: nn.Module) -> Generator[None]:
    """Freeze every parameter; restore `requires_grad` on exit."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def statistics_preserved(model: nn.Module, scorer: Scorer) -> Generator[None]:
    """Restore a model's buffers on exit. Within this context, make batch normalisation use its running statistics if
    the scorer needs them, even in training mode."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and scorer.needs_running_statistics]
    were_training = [norm.training for norm in norms]
    # A hook on each forward, since a trainer sets the mode of the whole model before each step.
    handles = [norm.register_forward_pre_hook(lambda norm, _: norm.train(False) and None) for norm in norms]
    try:
        with buffers_preserved(model):
            yield
    finally:
        for norm, handle, was_training in zip(norms, handles, were_training, strict=True):
            handle.remove()
            norm.train(was_training)


@contextlib.contextmanager
def buffers_preserved(model: nn.Module) -> Generator[None]:
    """Restore on exit the buffers that forward may change, such as the statistics of batch normalisation.

    Buffers outside the state dict are caches. Forward computes them again from attributes that are not restored either.
    """
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in saved:
            module._buffers[name] = buffer
            with torch.no_grad():
                buffer.copy_(values)
