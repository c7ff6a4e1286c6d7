"""Observing the calls of linears."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from smt_trainer.model.calls import watching_calls


@pytest.mark.parametrize(
    ("linear", "has_gradient"),
    [(nn.Linear(4, 3), False), (Conv1D(3, 4), False), (nn.Linear(4, 3, bias=False), True)],
    ids=["Linear", "Conv1D", "Linear with a gradient"],
)
def test_an_output_may_be_changed_in_place(linear, has_gradient):
    # Gemma 3n scales one so.
    linear.requires_grad_(False)
    x, weights, seen = torch.randn(2, 5, 4, requires_grad=has_gradient), torch.randn(2, 5, 3), []
    with watching_calls({"linear": linear}, lambda name, target, x: seen.append, start=True):
        y = linear(x)
        y *= 2
    (y * weights).sum().backward()
    torch.testing.assert_close(y.detach(), 2 * linear(x).detach())
    torch.testing.assert_close(seen, [2 * weights])
