"""Products of bfloat16 that are computed in float32 and rounded."""

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from recipes.studies.parts.products import RoundedProducts


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def product(rows, weight):
    return linear(rows, weight)


def batched(rows, weight):
    return rows @ weight.mT.expand(rows.shape[0], -1, -1)


def with_bias(rows, weight):
    return linear(rows.flatten(0, 1), weight, weight[:, 0]).view(3, 5, 6)  # of two dimensions: one rounding


@pytest.mark.parametrize("compute", [product, batched, with_bias])
def test_products_and_gradients_are_those_of_float32_rounded(compute):
    rows, weight = tensor(3, 5, 8), tensor(6, 8)
    exact = [leaf.detach().float().requires_grad_() for leaf in (rows, weight)]
    gradient = torch.randn(3, 5, 6).bfloat16()
    expected = compute(*exact)
    with RoundedProducts():
        found = compute(rows, weight)
        (rows_gradient, _) = torch.autograd.grad(found, (rows, weight), gradient)
    (expected_gradient, _) = torch.autograd.grad(expected, exact, gradient.float())
    assert found.dtype == rows_gradient.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-7, atol=0)
    torch.testing.assert_close(rows_gradient, expected_gradient.bfloat16(), rtol=2**-7, atol=0)


def test_attention_is_that_of_float32_rounded():
    parts = [tensor(2, 4, 16, 8) for _ in range(3)]
    exact = [part.detach().float().requires_grad_() for part in parts]
    gradient = torch.randn(2, 4, 16, 8).bfloat16()
    expected = scaled_dot_product_attention(*exact, is_causal=True)
    with RoundedProducts():
        found = scaled_dot_product_attention(*parts, is_causal=True)
        gradients = torch.autograd.grad(found, parts, gradient)
    assert torch.equal(found, expected.bfloat16())
    for rounded, unrounded in zip(gradients, torch.autograd.grad(expected, exact, gradient.float()), strict=True):
        # The backward pass reads the rounded output.
        torch.testing.assert_close(rounded.float(), unrounded, rtol=0.02, atol=0.02)


def test_other_dtypes_are_left_alone():
    rows, weight = tensor(3, 8, dtype=torch.float64), tensor(6, 8, dtype=torch.float64)
    expected = linear(rows, weight)
    with RoundedProducts():
        assert torch.equal(linear(rows, weight), expected)
