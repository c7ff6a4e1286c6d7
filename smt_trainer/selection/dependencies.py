"""Find the columns of a linear that depend on rows of another, and add them to a selection of rows (SPSFT's `dep`).

Let y be the output of a linear A at all tokens and x the input of a linear B. Row i of A and column j of B depend on
each other if x_j is 0 at every token whenever y_i is, whatever all other outputs are. Column j then reads only what row
i computes. Structured pruning uses the same dependency: removing the row leaves the column nothing to multiply. In
Llama, row i of `gate_proj` and of `up_proj` go with column i of `down_proj`, and row i of `v_proj` goes with one column
of `o_proj` for each query head of its group. A row of `q_proj` or `k_proj` affects all columns of its head but
determines none. The residual stream adds other outputs to a row's output, so it determines no column there.

Convolutions have channels in place of features, and positions in place of tokens. What reads an input channel is a
column of theirs (`model/convolution.py`). A batch normalisation shifts its channels apart, so the search goes by as if
it was not there: in a ResNet, channel i of the first convolution of a bottleneck goes with input channel i of the
second. The norm's own two numbers a channel are not added; `train_norm` trains them.

The search runs the model itself, on one token repeated or on images of noise; the weights of its layers do not matter.
In a forward pass, they all output noise, except that the outputs in a set S are 0. The columns that are then 0
everywhere depend on a member of S. Let S_b hold the outputs whose index has bit b set, and T_b the others. A column
with one row turns 0 under exactly one of S_b and T_b for each b, which spells the row's index. A column with several
rows, as behind a fused gate and up projection, turns 0 under both for some b; the search repeats for it in each half of
the outputs. So 2 log2 n passes suffice for the n outputs of the linears of one kind in all layers.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smt_trainer.config import TARGET_KEYWORDS, SMTConfig
from smt_trainer.errors import SMTError
from smt_trainer.model.convolution import is_convolution, padded
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.kinds import named_layers, named_targets
from smt_trainer.model.names import is_excluded
from smt_trainer.model.sharded import full_shape
from smt_trainer.model.targets import ALL_CONVOLUTIONS, find_targets, target_grids
from smt_trainer.selection.block_selection import BlockSelection

logger = logging.getLogger(__name__)

# A ReLU hides a column if it sets the noise to 0 at all tokens; the chance is 1 in 2**TOKENS.
TOKENS = 32

# Edge of an image where the model does not name one.
IMAGE_SIZE = 32


@dataclass(frozen=True, eq=False)
class Dependency:
    """The rows of a linear and the columns of another that depend on each other.

    Attributes:
        source: full name of the linear with the rows.
        reader: full name of the linear with the columns.
        pairs: [n, 2] int32 (row of the source, column of the reader), by row, then column; a row may have several
            columns, a column several rows.
        grid: the reader's grid of columns.
    """

    source: str
    reader: str
    pairs: Tensor
    grid: BlockGrid


def find_dependencies(model: nn.Module, config: SMTConfig, targets: Iterable[str]) -> list[Dependency]:
    """Find the dependencies of a model's targets; leave the model and the random state unchanged.

    A target whose columns depend on rows of another gives no rows itself, since a weight has only one grid. The log
    says so, as a warning if `target_modules` names modules.

    Args:
        model: a plain model that takes token ids or pixels.
        config: columns of the modules that it excludes are not trained.
        targets: names of the linears to choose rows from.

    Returns:
        The dependencies by source and reader, in the model's order. No reader is a source.

    Raises:
        SMTError: the model takes neither or is sharded over ranks, or no column depends on the targets.
    """
    _refuse_unsuited(model)
    targets, kept = set(targets), []
    sources, readers = set(), set()
    everything = named_targets(model)
    keywords = {ALL_CONVOLUTIONS if is_convolution(everything[name]) else "all-linear" for name in targets}
    tunable = {name for word in keywords for name in find_targets(model, replace(config, target_modules=word))}
    for one in _all_dependencies(model):
        if one.source in targets - readers and one.reader in tunable - sources:
            sources.add(one.source)
            readers.add(one.reader)
            kept.append(one)
    if not kept:
        raise SMTError(
            f"train_dependents=True, but no column depends on the rows of target_modules={config.target_modules!r}. "
            "Leave it at False, or target modules such as value or up projections."
        )
    both = sorted({name.rpartition(".")[2] for name in targets & readers})
    if both:
        level = logging.INFO if config.target_modules in TARGET_KEYWORDS else logging.WARNING
        message = "%s: only columns that depend on rows of other targets are trained, and no rows (train_dependents)."
        logger.log(level, message, ", ".join(both))
    return kept


def add_columns(
    selection: BlockSelection, dependencies: Iterable[Dependency], excluded: str | list[str] | None = None
) -> BlockSelection:
    """Add to a selection of rows the columns that depend on them, except those of excluded modules.

    The budget covers the rows alone, as in SPSFT (section 4.3), which halves the ratio to make room for the columns.
    """
    grids, columns = dict(selection.grids), {}
    for one in dependencies:
        if one.source in selection.grids and not is_excluded(one.reader, excluded):
            grids[one.reader] = one.grid
            rows, readers = one.pairs.numpy().astype(np.int64).T
            chosen = selection.block_indices.get(one.source, np.empty((0, 2), np.int64))[:, 0]
            columns.setdefault(one.reader, []).append(readers[np.isin(rows, chosen)])
    block_indices = dict(selection.block_indices)
    for name, parts in columns.items():
        chosen = np.unique(np.concatenate(parts))
        if len(chosen):
            block_indices[name] = np.stack(np.unravel_index(chosen, grids[name].shape), axis=1)
    return replace(selection, grids=grids, block_indices=block_indices)


def _refuse_unsuited(model: nn.Module) -> None:
    takes = getattr(model, "main_input_name", "input_ids")
    if takes not in ("input_ids", "pixel_values"):
        raise SMTError(
            f"train_dependents=True runs the model on token ids or pixels, but {type(model).__name__} takes {takes}. "
            "Leave it at False."
        )
    if any(full_shape(parameter) != tuple(parameter.shape) for parameter in model.parameters()):
        raise SMTError(
            "train_dependents=True runs the model before training, but its parameters are sharded over ranks. Choose "
            "the blocks on one process, with SMTTrainer.select, and pass them as SMTConfig.selection."
        )


def _all_dependencies(model: nn.Module) -> list[Dependency]:
    """Find the dependencies between any two layers of a model, by source and reader in the model's order."""
    linears = named_layers(model)
    grids = target_grids(linears, SMTConfig(granularity="column"))
    kinds: dict[str, list[str]] = {}
    for name in linears:
        kinds.setdefault(".".join("*" if part.isdigit() else part for part in name.split(".")), []).append(name)
    found = []
    with _noise_for_linears(model, linears, grids) as zero_columns:
        alive = {name: ~zero for name, zero in zero_columns({}).items()}
        for kind in kinds.values():
            # Output i of the k-th of these K linears has index i * K + k, so half of the indices is half of each.
            rows = max(grids[name].out_features for name in kind)

            def turned_zero(outputs: Tensor, kind=kind, rows=rows) -> dict[str, Tensor]:
                of_each = outputs.view(rows, len(kind)).unbind(1)
                zeros = {name: own[: grids[name].out_features] for name, own in zip(kind, of_each, strict=True)}
                return {name: alive[name] & zero for name, zero in zero_columns(zeros).items() if name in alive}

            for reader, columns, indices in _search(turned_zero, alive, range(rows * len(kind)), rows * len(kind)):
                for place in (indices % len(kind)).unique().tolist():
                    own = indices % len(kind) == place
                    pairs = torch.stack([indices[own] // len(kind), columns[own]], dim=1)
                    found.append((kind[place], reader, pairs))
    return _join(found, grids)


def _search(
    turned_zero: Callable[[Tensor], dict[str, Tensor]], asked: Mapping[str, Tensor], among: range, count: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (module, columns [n], indices [n]): the `asked` columns and the outputs in `among` they depend on."""
    index = torch.arange(count)
    members = (index >= among.start) & (index < among.stop)
    found = {name: zero & asked[name] for name, zero in turned_zero(members).items() if name in asked}
    found = {name: columns for name, columns in found.items() if columns.any()}
    if not found:
        return
    spelled = {name: columns.clone() for name, columns in found.items()}
    several = {name: torch.zeros_like(columns) for name, columns in found.items()}
    word = {name: torch.full(columns.shape, among.start) for name, columns in found.items()}
    for bit in range((len(among) - 1).bit_length()):
        is_set = ((index - among.start) >> bit) % 2 == 1
        under_set, under_unset = turned_zero(members & is_set), turned_zero(members & ~is_set)
        for name, columns in found.items():
            spelled[name] &= under_set[name] ^ under_unset[name]
            several[name] |= columns & under_set[name] & under_unset[name]
            word[name] += under_set[name].long() << bit
    for name, columns in spelled.items():
        if columns.any():
            yield name, columns.nonzero().flatten(), word[name][columns]
    middle = (among.start + among.stop) // 2
    if any(columns.any() for columns in several.values()):
        for half in (range(among.start, middle), range(middle, among.stop)):
            yield from _search(turned_zero, several, half, count)


def _join(found: list[tuple[str, str, Tensor]], grids: Mapping[str, BlockGrid]) -> list[Dependency]:
    """Make one dependency per source and reader, in the model's order."""
    parts: dict[tuple[str, str], list[Tensor]] = {}
    for source, reader, pairs in found:
        parts.setdefault((source, reader), []).append(pairs)
    names = {name: place for place, name in enumerate(grids)}
    joined = []
    for source, reader in sorted(parts, key=lambda ends: [names[end] for end in ends]):
        pairs = torch.cat(parts[source, reader])
        pairs = pairs[(pairs[:, 0] * grids[reader].num_blocks + pairs[:, 1]).argsort()]
        joined.append(Dependency(source, reader, pairs.int(), grids[reader]))
    return joined


@contextlib.contextmanager
def _noise_for_linears(
    model: nn.Module, linears: Mapping[str, nn.Module], grids: Mapping[str, BlockGrid]
) -> Iterator[Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]:
    """Make the linears output noise within this context.

    Yields a function from the outputs that are set to 0 (module name -> [O] bool) to the inputs that are then 0 at all
    tokens or positions (module name -> [I] bool, for modules that some token reached).
    """
    generator = torch.Generator().manual_seed(0)
    zeros: dict[str, Tensor] = {}
    is_zero: dict[str, Tensor] = {}

    @functools.cache
    def noise(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def forward(name: str, input: Tensor) -> Tensor:
        # The dimensions of space come after the channels.
        space = len(grids[name].kernel)
        if input.numel():
            zero = (input == 0).movedim(-1 - space, -1).flatten(0, -2).all(0)
            is_zero[name] = zero & is_zero.get(name, zero)
        shape = output_shape(name, input) if space else (*input.shape[:-1], grids[name].out_features)
        output = noise(name, shape, input.device, input.dtype)
        if name not in zeros:
            return output
        return output.masked_fill(zeros[name].to(output.device).view(-1, *[1] * space), 0)

    def output_shape(name: str, input: Tensor) -> tuple[int, ...]:
        conv: Any = linears[name]
        x, geometry = padded(conv, input.to("meta"))
        y = geometry.product(x, conv.weight.to("meta", x.dtype), None)
        return tuple(y.shape[y.ndim - input.ndim :])

    @torch.no_grad()
    def zero_columns(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        zeros.clear()
        is_zero.clear()
        zeros.update(outputs)
        body(**inputs)
        return {name: zero.cpu() for name, zero in is_zero.items()}

    # Run without the head, which may need particular tokens.
    body = getattr(model, "base_model", model)
    inputs = _inputs(model, generator)
    training = [module for module in model.modules() if module.training]
    forwards = {linear: functools.partial(forward, name) for name, linear in linears.items()}
    forwards |= {module: _pass for module in model.modules() if "BatchNorm" in type(module).__name__}
    replaced = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    model.eval()
    for module, replacement in forwards.items():
        module.forward = replacement
    try:
        yield zero_columns
    finally:
        for module in forwards:
            del module.forward
            if module in replaced:
                module.forward = replaced[module]
        for module in training:
            module.training = True


def _pass(input: Tensor, *args, **kwargs) -> Tensor:
    return input


def _inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return what to run a model on: `TOKENS` equal tokens, or as many images of the size that it was made for."""
    first, config = next(model.parameters()), getattr(model, "config", None)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", None) or IMAGE_SIZE
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = next(module.in_channels for module in model.modules() if is_convolution(module))
        # Few images where a patch is a token.
        count = TOKENS if height * width <= IMAGE_SIZE**2 else 1
        pixels = torch.randn(count, channels, height, width, generator=generator)
        return {"pixel_values": pixels.to(first.device, first.dtype)}
    inputs = {"input_ids": torch.ones(1, TOKENS, dtype=torch.long, device=first.device)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs
