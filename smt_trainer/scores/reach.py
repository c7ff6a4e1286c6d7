"""Find which targets a warm-up reaches.

Blocks can be trained only if forward calls the linear and backward reaches its output. A model may instead read the
weight and never call the linear (Mamba's `dt_proj`, WavLM's attention, fused kernels); then the weight gets a gradient,
and the score may be high, but its blocks never get one. Or it may call the linear without using its output (LLaVA's
last vision layer). Only targets that no step on any rank reached are left out: an expert may see no token in most
steps.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smt_trainer.errors import SMTError
from smt_trainer.model.calls import watching_calls
from smt_trainer.model.names import list_projections

if TYPE_CHECKING:
    from smt_trainer.model.kinds import Target

logger = logging.getLogger(__name__)


class Reach:
    """Watches the targets of a warm-up.

    Args:
        targets: name -> target.
        needs_backward: whether the warm-up runs backward; if not, only calls count.
    """

    def __init__(self, targets: Mapping[str, Target], needs_backward: bool) -> None:
        self.targets, self.needs_backward = targets, needs_backward
        self.called: set[str] = set()
        self.passed: set[str] = set()

    @contextlib.contextmanager
    def watching(self) -> Generator[None]:
        """Record calls and gradients within this context."""
        with watching_calls(self.targets, self._note):
            yield

    def _note(self, name: str, target: Target, x: Tensor) -> Callable[[Tensor], None] | None:
        self.called.add(name)
        return None if name in self.passed else functools.partial(self._note_gradient, name)

    def _note_gradient(self, name: str, gradient: Tensor) -> None:
        self.passed.add(name)

    def flags(self) -> Tensor:
        """Return [2, targets]: 1 if forward called a target (first row), and if a gradient reached it (second row)."""
        return torch.tensor([[float(name in seen) for name in self.targets] for seen in (self.called, self.passed)])

    def keep(self, scores: Mapping[str, Tensor], flags: Tensor) -> dict[str, Tensor]:
        """Return the scores of the targets that were reached; log the names of the others.

        Args:
            scores: of all targets.
            flags: averaged over all ranks.

        Raises:
            SMTError: no target was reached.
        """
        called, passed = ({name for name, share in zip(self.targets, row, strict=True) if share} for row in flags)
        silent = [name for name in self.targets if name not in called]
        unused = [name for name in self.targets if name in called - passed] if self.needs_backward else []
        reasons = [f"the model never called {list_projections(silent)}"] if silent else []
        reasons += [f"no gradient reached {list_projections(unused)}"] if unused else []
        if len(silent) + len(unused) == len(self.targets):
            raise SMTError(
                f"none of the targets can be trained: in the warm-up, {' and '.join(reasons)}. Name other modules in "
                "target_modules; with reentrant checkpointing, set use_reentrant=False."
            )
        if reasons:
            logger.warning("Some targets are not tuned, since in the warm-up %s.", " and ".join(reasons))
        return {name: found for name, found in scores.items() if name not in {*silent, *unused}}
