"""Treat each matrix of each expert as a target of its own, where a module keeps them in 3-D parameters.

transformers keeps the experts of a layer in `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I] (or without a gate in
`up_proj`), or each matrix transposed. Those of expert 7 are called `...experts.gate_up_proj.7` and
`...experts.down_proj.7` and cut into blocks like any other weight. `merging/expert_files.py` finds them in files.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smt_trainer.errors import SMTError
from smt_trainer.model.names import BLOCK_INDICES
from smt_trainer.model.products import Observer, Role, WatchedStack

# Classes without transformers' `is_transposed` -> whether they keep each matrix transposed.
UNMARKED = {"Llama4TextExperts": True, "JetMoeParallelExperts": False}


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix of one expert.

    Attributes:
        experts: the module that holds it.
        leaf: name of the 3-D parameter in this module.
        index: number of the expert.
    """

    experts: nn.Module
    leaf: str
    index: int

    @property
    def stack(self) -> nn.Parameter:
        """The parameter [E, O, I], or [E, I, O] where transposed."""
        # While forward runs, the attribute with this name is a watched stack.
        return self.experts._parameters[self.leaf]  # pyrefly: ignore[bad-return]

    @property
    def weight(self) -> Tensor:
        """The matrix as it is stored, a view."""
        return self.stack[self.index]

    @property
    def is_transposed(self) -> bool:
        """Whether the parameter holds W^T."""
        return is_transposed_stack(self.experts)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.stack.shape[1:]
        return (columns, rows) if self.is_transposed else (rows, columns)


def expert_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the name, module and leaf of each 3-D parameter that holds experts, in the model's order."""
    for name, module in model.named_modules():
        is_rewritten = BLOCK_INDICES in module._buffers
        if "expert" in f"{name}.{type(module).__name__}".lower() and not is_rewritten:
            for leaf, parameter in module._parameters.items():
                if parameter is not None and parameter.ndim == 3:
                    yield (f"{name}.{leaf}" if name else leaf), module, leaf


def matrices_of(name: str, experts: nn.Module, leaf: str) -> dict[str, ExpertMatrix]:
    """Return target name -> matrix, for all experts in one 3-D parameter."""
    count = len(experts._parameters[leaf])  # pyrefly: ignore[bad-argument-type]
    return {f"{name}.{index}": ExpertMatrix(experts, leaf, index) for index in range(count)}


def is_known(experts: nn.Module) -> bool:
    """Return whether it is known if a module of experts keeps its matrices transposed."""
    return hasattr(experts, "is_transposed") or type(experts).__name__ in UNMARKED


def is_transposed_stack(experts: nn.Module) -> bool:
    """Return whether a module of experts keeps W^T [I, O] for each matrix; False if that is not known."""
    marked: Any = getattr(experts, "is_transposed", None)
    return UNMARKED.get(type(experts).__name__, False) if marked is None else bool(marked)


def find_expert(model: nn.Module, name: str) -> ExpertMatrix | None:
    """Return the expert's matrix with this target name; None if there is none."""
    stack, _, index = name.rpartition(".")
    parent, _, leaf = stack.rpartition(".")
    with contextlib.suppress(AttributeError):
        experts = model.get_submodule(parent)
        parameter = experts._parameters.get(leaf)
        if parameter is not None and parameter.ndim == 3 and index.isdecimal() and int(index) < len(parameter):
            return ExpertMatrix(experts, leaf, int(index))
    return None


def stored_weight(model: nn.Module, name: str) -> Tensor:
    """Return the weight of a target of a plain model as it is stored, outside of autograd."""
    expert = find_expert(model, name)
    return model.get_submodule(name).get_parameter("weight").data if expert is None else expert.stack.data[expert.index]


def watch_stack(experts: nn.Module, leaf: str, observe: Observer) -> list[RemovableHandle]:
    """Report the products of a 3-D parameter to an observer from now on; return the handles of the hooks that do so."""
    # Copying the model copies what a partial function holds, but not what a closure holds.
    return [
        experts.register_forward_pre_hook(functools.partial(_start, leaf, observe)),
        experts.register_forward_hook(functools.partial(_end, leaf), always_call=True),
    ]


def _start(leaf: str, observe: Observer, experts: nn.Module, inputs: tuple) -> None:
    watched, stack = vars(experts).get(leaf), ExpertMatrix(experts, leaf, 0).stack
    observers = (observe,) if watched is None else (*watched.role.observers, observe)
    # An instance attribute takes precedence over the parameter of the same name.
    vars(experts)[leaf] = WatchedStack.of(stack, Role(leaf, is_transposed_stack(experts), observers))


def _end(leaf: str, experts: nn.Module, inputs: tuple, output: Any) -> None:
    watched = vars(experts).pop(leaf, None)
    has_tokens = not inputs or inputs[0].numel() > 0
    # After an exception there is no output.
    if watched is not None and output is not None and has_tokens and not watched.role.reported:
        raise SMTError(
            f"the forward of {type(experts).__name__} took no matrix product of `{leaf}` that can be followed (a fused "
            "kernel?). Load the model with experts_implementation='eager', 'batched_mm' or 'grouped_mm'."
        )
