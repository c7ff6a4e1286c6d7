"""`qm_taylor`: the Taylor score of each class of examples, and the mean of its quantiles over the classes.

G^c is the contribution of the examples of class c to G. Their loss has n_c terms, one for each labelled token or, if an
example has one label, for each example; n = sum over c of n_c. The gradient of the mean loss over class c is
n / n_c * G^c, up to a factor that all classes share, so that (SPSFT, section 3.2, eq. 6 and 7)

    eta^c      = n / n_c * |<W, G^c>|
    qm_taylor  = (1 / 11) * sum over k = 0..10 of the 10 k % quantile of {eta^c}_c

Quantiles between two classes are interpolated linearly. With a single class, the score is `taylor`.

One backward gives all G^c, since the gradient dy of a linear's output keeps the examples apart: G^c = dy[c]^T x[c],
where x[c] and dy[c] hold the tokens of class c's examples. Together these products take as many FLOPs as G; each is
reduced to one number per block and dropped. Examples must not affect each other, as they would in batch normalisation,
so it uses its running statistics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.model.convolution import is_convolution, weight_gradient
from smt_trainer.model.embedding import is_embedding
from smt_trainer.model.experts import ExpertMatrix
from smt_trainer.model.quantised import dense_weight
from smt_trainer.scores.block_sums import BlockSums, add_block_sums
from smt_trainer.scores.classes import NO_LABEL, loss_terms, take_classes
from smt_trainer.scores.scorer import keep_for_backward, output_gradients, product_gradient

if TYPE_CHECKING:
    from smt_trainer.model.kinds import Target

QUANTILES = np.linspace(0, 1, 11)


class QMTaylor(BlockSums):
    """`qm_taylor`: mean of the 0, 10, ..., 100 % quantiles of the classes' Taylor scores (SPSFT, eq. 7).

    Keeps one number per block and class. `begin_batch` must read the classes of the examples before each forward.
    """

    needs_running_statistics = True
    needs_all_features = True

    def __init__(self, targets, grids, config, seed) -> None:
        super().__init__(targets, grids, config, seed)
        # [classes, R, C], with room for more classes.
        self.sums = {name: total.new_zeros(0, *total.shape) for name, total in self.sums.items()}
        self.step_sums = self.sums
        self.counts = self.step_counts = torch.zeros(0, dtype=torch.long)
        self.places: dict[int, int] = {}

    @contextlib.contextmanager
    def attached(self, by_step: bool = False) -> Generator[None]:
        self.step_counts = torch.zeros_like(self.counts) if by_step else self.counts
        with super().attached(by_step):
            yield

    @classmethod
    def class_column(cls, config: SMTConfig) -> str | None:
        return config.class_column

    def begin_batch(self, inputs: MutableMapping[str, Any]) -> None:
        """As in `Scorer`. Raises `SMTError` if the classes of the examples are not known."""
        self.classes = take_classes(inputs, self.config.class_column)
        has_class = self.classes != NO_LABEL
        labels = self.classes[has_class].tolist()
        for label in labels:
            self.places.setdefault(label, len(self.places))
        self._make_room(len(self.places))
        places = torch.tensor([self.places[label] for label in labels], dtype=torch.long)
        self.step_counts.index_add_(0, places, loss_terms(inputs, len(self.classes), self.predicts_next)[has_class])

    def _make_room(self, classes: int) -> None:
        if classes <= len(self.counts):
            return
        size, held = max(classes, 2 * len(self.counts)), self.step_sums is not self.sums
        self.sums = {name: _extended(total, size) for name, total in self.sums.items()}
        self.counts = _extended(self.counts, size)
        if held:
            self.step_sums = {name: _extended(total, size) for name, total in self.step_sums.items()}
            self.step_counts = _extended(self.step_counts, size)
        else:
            self.step_sums, self.step_counts = self.sums, self.counts

    def observing(self) -> contextlib.AbstractContextManager[None]:
        return output_gradients(self.targets, self._observe)

    def _observe(self, name: str, linear: Target, x: Tensor) -> Callable[[Tensor], None]:
        if isinstance(linear, ExpertMatrix):
            raise SMTError(
                f"'qm_taylor' needs separate examples, but the router sends single tokens to `{name}`. Use 'taylor', "
                "or leave the experts out."
            )
        if is_embedding(linear):
            raise SMTError(
                f"'qm_taylor' needs separate examples, and a head tied to `{name}` may mix them. Use 'taylor', or "
                "leave the embeddings out."
            )
        if x.shape[0] != len(self.classes):
            raise SMTError(
                f"'qm_taylor' separates examples by the first dimension of a linear's input: `{name}` should get "
                f"{len(self.classes)} examples, got shape {list(x.shape)}. Examples packed into one sequence have no "
                "separate classes; use 'taylor', or exclude such modules."
            )
        kept = keep_for_backward(x)
        return lambda dy: self._add(name, linear, kept(), dy)

    def _add(self, name: str, linear: Target, x: Tensor, dy: Tensor) -> None:
        grid, x = self.grids[name], x.to(dy.dtype)
        weight, present = dense_weight(linear), self.classes.unique()
        for label in present[present != NO_LABEL].tolist():
            examples = (self.classes == label).nonzero().flatten().to(x.device)
            mine = (x, dy) if len(present) == 1 else (x[examples], dy[examples])
            gradient = weight_gradient(linear, *mine) if is_convolution(linear) else product_gradient(linear, *mine)
            add_block_sums(self.step_sums[name][self.places[label]], grid, weight.float() * gradient.float())

    def take_step(self) -> list[tuple[Tensor, Tensor]]:
        taken = [*super().take_step(), (self.counts, self.step_counts.clone())]
        self.step_counts.zero_()
        return taken

    def statistics(self) -> Iterator[Tensor]:
        # Ranks see different classes; give all ranks all classes, in the same order.
        labels = sorted(set().union(*_gathered(list(self.places))))
        self._make_room(len(self.places) + 1)
        order = [self.places.get(label, len(self.places)) for label in labels]
        self.sums = {name: total[order] for name, total in self.sums.items()}
        self.counts = self.counts[order].double()
        self.step_sums, self.step_counts = self.sums, self.counts
        self.places = {label: place for place, label in enumerate(labels)}
        yield from self.sums.values()
        yield self.counts

    def scores(self) -> dict[str, Tensor]:
        seen = self.counts > 0
        weights = (self.counts.sum() / self.counts[seen]).view(-1, 1, 1)
        return {name: _quantile_mean(weights * total.cpu()[seen].abs()) for name, total in self.sums.items()}


def _extended(tensor: Tensor, size: int) -> Tensor:
    """Pad the first dimension of a tensor to `size` with zeros."""
    return torch.cat([tensor, tensor.new_zeros(size - len(tensor), *tensor.shape[1:])])


def _gathered(labels: list[int]) -> list[list[int]]:
    """Gather the labels of all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return [labels]
    everywhere: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, labels)
    return everywhere


def _quantile_mean(scores: Tensor) -> Tensor:
    """Return the mean [R, C] of the quantiles over the first dimension of [classes, R, C], in float32."""
    if not len(scores):
        return scores.sum(0).float()
    return torch.from_numpy(np.quantile(scores.numpy(), QUANTILES, axis=0).mean(0)).float()
