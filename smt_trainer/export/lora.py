"""Write what training changed as a LoRA adapter for PEFT, which gives exactly the same model.

The change D = W' - W [O, I] of a weight is zero outside the trained blocks. If these touch r rows i_1 ... i_r of W, let
A [r, I] be these rows of D, and B [O, r] zero except for B[i_k, k] = 1; then D = B A. If they touch fewer columns
j_1 ... j_r than rows, let B [O, r] be these columns of D, and A [r, I] zero except for A[k, j_k] = 1. LoRA adds
lora_alpha / r B A to W, so with lora_alpha = r it adds D: nothing is approximated, and no rank has to be chosen.

W is the base in the dtype of training (for a quantised base, see `lora_onto.py`), and W' the trained weight. D is
computed in float64 and stored in float32, which holds the difference of two bfloat16 (float16) values exactly unless
one of them is over 2^15 (2^12) times the other. The largest |stored - D| of all weights is logged. Where D is exact,
PEFT's `merge_and_unload()` gives exactly W' on a base in 16 bits, though not with `safe_merge=True`, which rounds D; in
float32 it rounds the sum W + D. Only the trained blocks of the base are read, and torch is not
imported, except for an adapter that goes onto a quantised base.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from smt_trainer.arrays import cast
from smt_trainer.delta.delta import Delta
from smt_trainer.delta.folder import DELTA_FILE
from smt_trainer.delta.onto import DEQUANTIZED
from smt_trainer.errors import SMTError
from smt_trainer.export.adapter_config import ADAPTER_CONFIG, adapter_config
from smt_trainer.export.lora_onto import advice, check_lora_onto, quantised_values
from smt_trainer.export.saved_modules import saved_modules
from smt_trainer.files import new_folder
from smt_trainer.merging.matrix_rows import read_matrix
from smt_trainer.merging.merge import open_both
from smt_trainer.merging.plan import MergePlan, refuse_grown, refuse_other_depth
from smt_trainer.merging.side_files import copy_trained
from smt_trainer.model.checkpoint import Checkpoint
from smt_trainer.model.grid import BlockGrid
from smt_trainer.settings import is_int
from smt_trainer.tensor_file import save_arrays

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
# The prefix that PEFT adds to the names of a model's modules.
PREFIX = "base_model.model."
DTYPES_OF_FACTORS = ("float32", "bfloat16", "float16")
# The largest max_lora_rank of vLLM.
MAX_RANK = 512


def export_lora(
    base: str | Path,
    delta: str | Path,
    output: str | Path,
    *,
    base_revision: str | None = None,
    delta_revision: str | None = None,
    dtype: str = "float32",
    max_rank: int = MAX_RANK,
    onto: str | None = None,
) -> Path:
    """Write a delta as a LoRA adapter in PEFT's format, for `PeftModel.from_pretrained(base_model, output)`.

    The rank of each module is the number of rows or columns that its blocks touch, whichever are fewer. Modules that
    the delta holds whole are `modules_to_save`, in their own dtype, which some servers (vLLM) do not take. Tokenizer,
    chat templates and generation settings of training are copied from the delta's folder.

    Args:
        base: folder or hub name of the base checkpoint, in safetensors format.
        delta: folder or hub name of the delta.
        output: folder to make; it appears whole or not at all.
        base_revision: revision of a base on the hub.
        delta_revision: revision of a delta on the hub.
        dtype: dtype of the factors, "float32", "bfloat16" or "float16"; the last two round the change.
        max_rank: the largest rank that is allowed.
        onto: for a delta of a quantised base, "dequantized" for an adapter that goes onto that base, or "original" for
            one that goes onto the weights that were quantised (see `export/lora_onto.py`).

    Returns:
        The output folder.

    Raises:
        SMTError: as in `merge_checkpoint`; or a module's rank is above `max_rank`, the delta holds tensors whole that
            PEFT cannot, a change does not fit the dtype, or the base is stored quantised. Nothing is written.
    """
    if dtype not in DTYPES_OF_FACTORS or not is_int(max_rank) or max_rank < 1:
        raise SMTError(
            f"dtype must be one of {', '.join(DTYPES_OF_FACTORS)} and max_rank an int >= 1, got {dtype!r} and "
            f"{max_rank!r}."
        )
    output = Path(output)
    checkpoint, delta_folder = open_both(base, delta, output, base_revision, delta_revision)
    loaded = Delta.load(delta_folder)
    check_lora_onto(loaded, onto, checkpoint)
    _refuse_experts(loaded)
    refuse_other_depth(delta_folder, checkpoint)
    ranks = _ranks(loaded, max_rank)
    plan = MergePlan.of(loaded, delta_folder, checkpoint)
    refuse_grown(plan, "written as an adapter")
    for stored in plan.other_dtypes if onto != DEQUANTIZED else ():
        logger.warning(
            "The base is stored in %s and was trained in %s: load it in %s to get the trained model with the adapter.",
            stored,
            *[loaded.weight_dtype] * 2,
        )
    saved = saved_modules(plan, checkpoint)
    quantised = quantised_values(loaded, delta_folder, onto, checkpoint)
    arrays, error = _factors_of_all(plan, checkpoint, dtype, quantised)
    arrays |= {f"{PREFIX}{name}": values for name, values in loaded.whole_arrays.items()}
    with new_folder(output) as stage:
        save_arrays(arrays, stage / ADAPTER_FILE, {"format": "pt"})
        config = adapter_config(loaded, ranks, saved, base, base_revision)
        (stage / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_trained(checkpoint, delta_folder, stage)
    _log(ranks, saved, error, dtype, [output / ADAPTER_FILE, delta_folder / DELTA_FILE], advice(loaded, onto))
    return output


def factors(grid: BlockGrid, block_indices: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return B [O, r] and A [r, I], whose product holds the blocks and is zero elsewhere.

    Args:
        grid: grid of the weight [O, I].
        block_indices: positions [n, 2] of the blocks.
        blocks: their values [n, br, bc]; the factors have the same dtype.
    """
    rows, columns = grid.touched(block_indices)
    if columns < rows:
        turned = BlockGrid(*grid.weight_shape[::-1], *grid.block_shape[::-1])
        b, a = _by_rows(turned, block_indices[:, ::-1], blocks.swapaxes(1, 2))
        return a.T, b.T
    return _by_rows(grid, block_indices, blocks)


def _by_rows(grid: BlockGrid, block_indices: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lines, places = np.unique(block_indices[:, 0], return_inverse=True)
    a = np.zeros((len(lines), grid.block_rows, grid.shape[1], grid.block_columns), blocks.dtype)
    a[places, :, block_indices[:, 1]] = blocks
    rank = len(lines) * grid.block_rows
    b = np.zeros((grid.out_features, rank), blocks.dtype)
    b[(lines[:, None] * grid.block_rows + np.arange(grid.block_rows)).ravel(), np.arange(rank)] = 1
    return b, a.reshape(rank, grid.in_features)


def _factors_of_all(
    plan: MergePlan, checkpoint: Checkpoint, dtype: str, quantised: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], float]:
    """Return the factors of all modules under PEFT's names, and the largest |stored - D|.

    `quantised`: module -> the values that training had under its blocks, instead of the checkpoint's.
    """
    arrays, largest = {}, 0.0
    trained_in, selection = plan.delta.weight_dtype, plan.delta.selection
    for name, blocks in plan.delta.block_arrays.items():
        grid, indices = selection.grids[name], selection.block_indices[name]
        before = quantised.get(name)
        if before is None:
            before = cast(grid.split(read_matrix(checkpoint, plan.parts[name]))[*indices.T], trained_in)
        change = cast(cast(blocks, trained_in), "float64") - cast(before, "float64")
        # Rounded to the dtype, but held in one that numpy has.
        stored = cast(cast(change, dtype), "float32")
        if not np.isfinite(change).all():
            raise SMTError(f"the base has NaN or infinity in `{name}`, under blocks of the delta. Repair the base.")
        error = float(abs(stored - change).max())
        if not np.isfinite(error):
            raise SMTError(f"the change of `{name}` is too large for {dtype}; use float32 or bfloat16.")
        largest = max(largest, error)
        b, a = factors(grid, indices, stored)
        arrays |= {f"{PREFIX}{name}.lora_A.weight": cast(a, dtype), f"{PREFIX}{name}.lora_B.weight": cast(b, dtype)}
    return arrays, largest


def _refuse_experts(delta: Delta) -> None:
    """Raise `SMTError` if a delta has blocks in matrices of experts, which are not modules that PEFT can adapt."""
    modules = delta.fingerprint.checksums | delta.fingerprint.codes
    # The base lacks weights with new tokens, too, but their names do not end in a number.
    others = [name for name in delta.block_arrays if f"{name}.weight" not in modules]
    experts = [name for name in others if name.rpartition(".")[2].isdecimal()]
    if experts:
        raise SMTError(
            f"`{experts[0]}` is the matrix of an expert, and an adapter has one rank for all experts of a module, "
            "which few servers take. Merge instead (smt merge), or patch the server (delta_patches)."
        )


def _ranks(delta: Delta, max_rank: int) -> dict[str, int]:
    """Return module name -> rank. Raise `SMTError` if one is above `max_rank`, or a module is not a linear."""
    indices = delta.selection.block_indices
    grids = delta.selection.grids
    other = next((name for name in indices if grids[name].kernel or grids[name].embedding), None)
    if other is not None:
        kind = "an embedding" if grids[other].embedding else "a convolution"
        raise SMTError(
            f"`{other}` is {kind}, and an adapter is written for linears only. Merge the delta instead "
            "(smt merge), or load it with from_delta."
        )
    touched = {name: delta.selection.grids[name].touched(found) for name, found in indices.items() if len(found)}
    ranks = {name: min(lines) for name, lines in touched.items()}
    over = [name for name in ranks if ranks[name] > max_rank]
    if over:
        worst = max(over, key=lambda name: ranks[name])
        rows, columns = touched[worst]
        raise SMTError(
            f"{len(over)} of {len(ranks)} modules need a LoRA rank above max_rank={max_rank}; the blocks of `{worst}` "
            f"touch {rows} rows and {columns} columns. Train with SMTConfig(rank_cap={max_rank}) or a smaller budget "
            "of granularity='row', raise --max-rank if your server allows it, or merge instead (smt merge)."
        )
    return ranks


def _log(ranks: Mapping[str, int], saved: list[str], error: float, dtype: str, files: list[Path], advice: str) -> None:
    least, most = min(ranks.values()), max(ranks.values())
    spread = f"rank {most}" if least == most else f"ranks {least} to {most}"
    sizes = [path.stat().st_size / 2**20 for path in files]
    logger.info(
        "LoRA adapter of %d modules with %s: %.1f MiB; the delta: %.1f MiB. %s%s%s",
        len(ranks),
        spread,
        *sizes,
        f"{dtype} rounds the change of a weight by at most {error:.2g}." if error else "The change is exact.",
        f" Whole, as modules_to_save, which some servers do not take: {', '.join(saved)}." if saved else "",
        advice,
    )
