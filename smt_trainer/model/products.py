"""Observe the matrix products of a module that keeps the matrices of several experts in one 3-D parameter.

Let W [E, ., .] be such a parameter. Expert e computes y = x W_e^T for the rows of x (tokens) that the router sends to
it. transformers implements this in several ways (`integrations/moe.py`), shown here with one token per row:

    eager         F.linear(x, W[e])     x @ W[e] where W_e^T is stored     x, y [T_e, .]
    batched_mm    torch.bmm(W[ids], x)                                     x, y [S, ., 1], row s goes to ids[s]
    grouped_mm    grouped_mm(x, W^T, offs)                                 x, y [S, .], expert e's rows end at offs[e]
    Llama 4       torch.bmm(x, W)                                          x, y [E, T, .], all rows go to each expert

While a module is watched, its forward reads a `WatchedStack` instead of W: it has the same values, but tracks how it is
indexed and transposed and reports each product, with its `Routing`. The model still computes the product itself. Any
other operation raises an error, since its gradient would be lost.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from smt_trainer.errors import SMTError


class Routing(ABC):
    """Which rows of the input and the output of a product belong to which expert."""

    def among(self, experts: Collection[int]) -> Collection[int]:
        """Return which of these experts may have rows; to know for certain would need a GPU synchronisation."""
        return experts

    @abstractmethod
    def rows(self, expert: int, features: Tensor) -> Tensor:
        """Return an expert's rows [T_e, F] of the product's input or output."""


@dataclass(frozen=True)
class OneExpert(Routing):
    """All rows belong to one expert."""

    expert: int

    def among(self, experts: Collection[int]) -> Collection[int]:
        return [self.expert] if self.expert in experts else []

    def rows(self, expert: int, features: Tensor) -> Tensor:
        return features.reshape(-1, features.shape[-1])


class AllExperts(Routing):
    """The first dimension is the expert's."""

    def rows(self, expert: int, features: Tensor) -> Tensor:
        return features[expert].reshape(-1, features.shape[-1])


class Gathered(Routing):
    """Row s belongs to expert ids[s]."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def rows(self, expert: int, features: Tensor) -> Tensor:
        return features.flatten(1)[self.ids == expert]


class Grouped(Routing):
    """The rows are sorted by expert; those of expert e end at offsets[e]."""

    def __init__(self, offsets: Tensor) -> None:
        self.offsets = offsets

    @functools.cached_property
    def ends(self) -> list[int]:
        return self.offsets.tolist()

    def rows(self, expert: int, features: Tensor) -> Tensor:
        return features[self.ends[expert - 1] if expert else 0 : self.ends[expert]]


# Takes the input x, the output y and the routing of a product; returns y or its replacement.
Observer = Callable[[Tensor, Tensor, Routing], Tensor]


@dataclass(frozen=True)
class Role:
    """How a tensor was derived from a stack of experts' matrices.

    Attributes:
        name: of the parameter, for messages.
        transposed: whether the parameter holds W_e^T [I, O] for each expert.
        observers: what each product is reported to.
        turned: whether the last two dimensions are swapped.
        routing: which rows of its products belong to which expert; None while it holds all experts.
        reported: routings of the products so far.
    """

    name: str
    transposed: bool
    observers: tuple[Observer, ...]
    turned: bool = False
    routing: Routing | None = None
    reported: list[Routing] = field(default_factory=list)

    def report(self, x: Tensor, y: Tensor, routing: Routing, *, is_turned: bool) -> Tensor:
        """Report a product, which took the matrix as [I, O] if `is_turned`, else as [O, I]; return its output."""
        if (self.transposed != self.turned) != is_turned:
            raise SMTError(
                f"the forward of the experts uses `{self.name}` the other way round from what its class says "
                f"(is_transposed={self.transposed}). Leave it out with exclude_modules=['{self.name}']."
            )
        self.reported.append(routing)
        for observe in self.observers:
            y = observe(x, y, routing)
        return y


class WatchedStack(Tensor):
    """A stack of experts' matrices, or a selection from it, that reports its matrix products."""

    role: Role

    @staticmethod
    def of(values: Tensor, role: Role) -> WatchedStack:
        """Return a tensor with the same storage."""
        watched = values.detach().as_subclass(WatchedStack)
        watched.role = role
        return watched

    @property
    def plain(self) -> Tensor:
        """The same values as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        follow = FOLLOWED.get(getattr(func, "_qualified_op_name", func))
        if follow is not None:
            return follow(func, *args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            # The argument may be nested in a list, as for `torch.cat`.
            name = next(each.role.name for each in tree_leaves((args, kwargs)) if isinstance(each, WatchedStack))
            raise SMTError(
                f"the forward of the experts applies `{getattr(func, '__name__', func)}` to `{name}`, but only matrix "
                "products can be followed. Load the model with experts_implementation='eager', 'batched_mm' or "
                f"'grouped_mm', or leave these experts out: exclude_modules=['{name}']."
            )
        return result


def _select(func: Callable, stack: WatchedStack, index: Any) -> Tensor:
    """Track W[e] and W[ids]."""
    role, values = stack.role, func(stack.plain, index)
    if role.routing is not None or not isinstance(index, (int, Tensor)):
        raise SMTError(
            f"the forward of the experts reads `{role.name}[{index}]`; expected an expert's index, or several."
        )
    is_list = isinstance(index, Tensor) and index.ndim > 0
    routing = Gathered(index) if is_list else OneExpert(int(index))
    return WatchedStack.of(values, replace(role, routing=routing))


def _turn(func: Callable, stack: WatchedStack, *dimensions: int) -> Tensor:
    """Track W_e^T of each expert."""
    role, values = stack.role, func(stack.plain, *dimensions)
    if dimensions and {dimension % stack.ndim for dimension in dimensions} != {stack.ndim - 1, stack.ndim - 2}:
        raise SMTError(
            f"the forward of the experts moves dimensions {dimensions} of `{role.name}`; expected the last two."
        )
    return WatchedStack.of(values, replace(role, turned=not role.turned))


def _keep(func: Callable, stack: WatchedStack, *args: Any, **kwargs: Any) -> Tensor:
    """Track the same values, cast or moved."""
    return WatchedStack.of(func(stack.plain, *args, **kwargs), stack.role)


def _linear(func: Callable, input: Tensor, weight: WatchedStack, bias: Tensor | None = None) -> Tensor:
    role = weight.role
    y = func(input, weight.plain, bias)
    return role.report(input, y, _expect_routing(role, func), is_turned=False)


def _matmul(func: Callable, input: Tensor, other: Tensor) -> Tensor:
    """Report x W[e]^T of one expert; x W^T or W x with one expert per row, or with all in the first dimension."""
    if isinstance(input, WatchedStack):
        role = input.role
        y = func(input.plain, other)
        # W[s] x[s] of [S, O, I] and [S, I, 1].
        is_column = isinstance(role.routing, Gathered) and other.shape[-1] == 1
        return role.report(other, y, _expect_routing(role, func, is_column), is_turned=False)
    assert isinstance(other, WatchedStack)
    role = other.role
    y = func(input, other.plain)
    routing = AllExperts() if role.routing is None and input.ndim == 3 else role.routing
    is_known = isinstance(routing, (OneExpert, AllExperts)) or (isinstance(routing, Gathered) and input.shape[-2] == 1)
    return role.report(input, y, _expect_routing(role, func, is_known, routing), is_turned=True)


def _grouped(func: Callable, input: Tensor, weight: WatchedStack, *args: Any, **kwargs: Any) -> Tensor:
    role = weight.role
    offsets = kwargs["offs"] if "offs" in kwargs else args[0]
    y = func(input, weight.plain, *args, **kwargs)
    return role.report(input, y, Grouped(offsets), is_turned=True)


def _expect_routing(role: Role, func: Callable, is_known: bool = True, routing: Routing | None = None) -> Routing:
    routing = routing or role.routing
    if routing is None or not is_known:
        raise SMTError(
            f"the forward of the experts applies `{func.__name__}` to `{role.name}` in a way that does not tell which "
            f"rows belong to which expert. Leave these experts out: exclude_modules=['{role.name}']."
        )
    return routing


FOLLOWED: dict[Any, Callable] = {
    Tensor.__getitem__: _select,
    **dict.fromkeys((Tensor.transpose, torch.transpose, Tensor.t), _turn),
    # Properties.
    **dict.fromkeys((getattr(Tensor.T, "__get__"), getattr(Tensor.mT, "__get__")), _turn),  # noqa: B009
    **dict.fromkeys((Tensor.to, Tensor.contiguous, Tensor.detach), _keep),
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm), _matmul),
    torch._grouped_mm: _grouped,
    # What transformers uses where torch has no grouped product.
    "transformers::grouped_mm_fallback": _grouped,
}
