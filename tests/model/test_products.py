"""Watched products: which rows belong to which expert, and what cannot be followed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smt_trainer import SMTError
from smt_trainer.model.experts import watch_stack
from smt_trainer.model.products import Role, WatchedStack

# grouped_mm wants rows of a multiple of 16 bytes.
EXPERTS, OUT, IN, TOKENS = 3, 4, 8, 6
IDS = torch.tensor([2, 0, 2, 2, 0, 2])
OFFSETS = torch.tensor([2, 2, 6], dtype=torch.int32)


def stack(transposed=False):
    shape = (EXPERTS, IN, OUT) if transposed else (EXPERTS, OUT, IN)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def watched(weight, transposed, reports):
    def observe(x, y, routing):
        reports.append((x, y, routing))
        return y

    return WatchedStack.of(weight, Role("w", transposed, (observe,)))


def tokens(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# Its name before torch 2.10 is that below.
grouped_mm = getattr(F, "grouped_mm", torch._grouped_mm)
SORTED, X = IDS.sort().values, tokens(TOKENS, IN)
# How a forward may write its product: (whether W^T is stored, the product, the expert of each row).
PRODUCTS = {
    "one": (False, lambda w: F.linear(X, w[2]), [2] * TOKENS),
    "one by a tensor": (False, lambda w: F.linear(X, w[torch.tensor(2)]), [2] * TOKENS),
    "one, sequences": (False, lambda w: F.linear(X.view(2, 3, IN), w[1]), [1] * TOKENS),
    "one, transposed": (True, lambda w: X @ w[0], [0] * TOKENS),
    "one, turned": (False, lambda w: torch.matmul(X, w[1].t()), [1] * TOKENS),
    "one, mm": (False, lambda w: torch.mm(X, w.transpose(1, 2)[1]), [1] * TOKENS),
    "one, cast": (False, lambda w: F.linear(X, w[1].to(torch.float32)), [1] * TOKENS),
    "gathered": (False, lambda w: torch.bmm(w[IDS], X.unsqueeze(-1)), IDS.tolist()),
    "gathered, transposed": (True, lambda w: torch.bmm(X.unsqueeze(1), w[IDS]), IDS.tolist()),
    "grouped": (False, lambda w: grouped_mm(X, w.transpose(-2, -1), offs=OFFSETS), SORTED.tolist()),
    "grouped, transposed": (True, lambda w: grouped_mm(X, w, offs=OFFSETS), SORTED.tolist()),
    "grouped, old": (False, lambda w: torch._grouped_mm(X, w.mT, offs=OFFSETS), SORTED.tolist()),
    "all": (True, lambda w: torch.bmm(X.view(EXPERTS, 2, IN), w), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_each_way_to_write_a_product_is_reported_with_its_rows(product):
    transposed, multiply, expert_of = PRODUCTS[product]
    weight, reports = stack(transposed), []
    y = multiply(watched(weight, transposed, reports))
    assert type(y) is torch.Tensor and torch.equal(y, multiply(weight))
    ((x, reported, routing),) = reports
    assert reported is y
    experts = torch.tensor(expert_of)
    for expert in range(EXPERTS):
        if expert not in routing.among(range(len(stack()))):
            assert expert not in expert_of
            continue
        rows = routing.rows(expert, x)
        torch.testing.assert_close(rows, X[experts == expert], rtol=0, atol=0)
        matrix = weight[expert].t() if transposed else weight[expert]
        torch.testing.assert_close(routing.rows(expert, y), rows @ matrix.t())


def test_transformers_own_grouped_product_is_followed():
    pytest.importorskip("transformers.integrations.moe")
    reports = []
    turned = watched(stack(), False, reports).transpose(-2, -1)
    y = torch.ops.transformers.grouped_mm_fallback(X, turned, offs=OFFSETS)
    assert type(y) is torch.Tensor and len(reports) == 1
    torch.testing.assert_close(y, grouped_mm(X, stack().transpose(-2, -1), offs=OFFSETS))


def test_what_is_no_tensor_is_read_as_of_the_parameter():
    weight, reports = stack(), []
    w = watched(weight, False, reports)
    assert (w.shape, w.dtype, w.device, w.ndim, len(w)) == (weight.shape, weight.dtype, weight.device, 3, EXPERTS)
    assert w.data_ptr() == weight.data_ptr() and not reports


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda w: w + 1, "applies `.*add.*` to `w`, but only matrix products can be followed"),
        (lambda w: w[1] * 2, "only matrix products can be followed"),
        (lambda w: torch.einsum("ti,eoi->teo", X, w), "can be followed|way that does not tell"),
        (lambda w: w.reshape(-1, IN), "applies `reshape` to `w`"),
        (lambda w: torch.cat([X.new_zeros(1, *w.shape[1:]), w]), "applies `cat` to `w`"),
        (lambda w: torch.add(input=w, other=1), "applies `add` to `w`"),
        (lambda w: w[:2], r"reads `w\[slice"),
        (lambda w: w[0][1], r"reads `w\[1\]`; expected an expert"),
        (lambda w: w.transpose(0, 1), r"moves dimensions \(0, 1\)"),
        (lambda w: X @ w[1], "the other way round|must match|cannot be multiplied"),
        (lambda w: F.linear(tokens(2, OUT), w[1].t()), "the other way round"),
        (lambda w: torch.matmul(w, X.t()), "in a way that does not tell which rows"),
    ],
)
def test_what_would_lose_a_gradient_is_refused(use, message):
    with pytest.raises((SMTError, RuntimeError), match=message):
        use(watched(stack(), False, []))


class Experts(nn.Module):
    is_transposed = False

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(stack())

    def forward(self, x):
        # What a fused kernel does.
        return x.new_zeros(len(x), OUT).index_add(
            0, torch.arange(len(x)), torch.from_numpy(x.numpy() @ self.w.detach().plain.numpy()[0].T)
        )


def test_a_forward_that_takes_no_product_is_refused_and_leaves_the_parameter_alone():
    experts = Experts()
    handles = watch_stack(experts, "w", lambda x, y, routing: y)
    with pytest.raises(SMTError, match="Experts took no matrix product of `w` that can be followed"):
        experts(X)
    assert type(experts.w) is nn.Parameter
    experts(X[:0])
    for handle in handles:
        handle.remove()
    experts.forward = lambda x: F.linear(x, experts.w[0])
    assert torch.equal(experts(X), F.linear(X, stack()[0]))
