"""The three readers under attack: the files that they read, and how the content that they accept is used."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save_file
from torch import nn

from recipes.benchmarks.parts import mutations
from smt_trainer import BlockScores, BlockSelection, Overlap, SMTConfig, SMTError, convert_to_smt, load_delta
from smt_trainer.arrays import as_array
from smt_trainer.cli import main
from smt_trainer.delta.delta import DELTA_FILE, MANIFEST, Delta
from smt_trainer.manifest import CHECKSUM, sealed
from smt_trainer.merging.merge import merge_checkpoint
from smt_trainer.model.targets import count_parameters, find_targets, target_grids
from smt_trainer.selection.block_scores import MANIFEST as SCORES_MANIFEST
from smt_trainer.selection.dependency_search import Dependency

REFUSED, SAME, FORGED = "refused", "accepted, same content", "accepted with a forged checksum"


class Small(nn.Module):
    """Two layers of two linears and a norm; it has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 4), "norm": nn.LayerNorm(8)})
            for _ in range(2)
        )


@dataclass(frozen=True)
class Reader:
    """A kind of file and how it is read.

    Attributes:
        path: the file, which each case overwrites.
        read: reads the file and returns an artefact: a delta, a selection or scores.
        content: returns the content of an artefact, for comparison.
        use: uses an artefact as the library does.
        mutations: ways to damage the file, without and with a checksum that fits.
    """

    path: Path
    read: Callable[[], Any]
    content: Callable[[Any], Any]
    use: Callable[[Any], None]
    mutations: tuple[list, list]


def make_readers(folder: Path) -> dict[str, Reader]:
    """Write one file of each kind, and the base of the delta, and return how to read them."""
    torch.manual_seed(0)
    model = Small()
    save_file(model.state_dict(), _made(folder / "base") / "model.safetensors")
    config = SMTConfig(target_modules=["q_proj", "v_proj"], block_size=2, budget=9, score="random", train_norm=True)
    grids = target_grids(find_targets(model, config), config)
    values = {name: torch.rand(grid.shape) for name, grid in grids.items()}
    selection = BlockScores(grids, values, count_parameters(model), config, "some/base").select()
    Delta.of(convert_to_smt(small_like(model), selection)).save(folder / "delta")
    selection.save(folder / "selection.json")
    _scores(model).save(folder / "scores.safetensors")

    def use_delta(delta: Delta) -> None:
        _use_selection(folder / "delta", selection)(delta.selection)
        load_delta(small_like(model), folder / "delta", merge=True)
        merge_checkpoint(folder / "base", folder / "delta", folder / "merged")

    def cleaned(use: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(artefact: Any) -> None:
            try:
                use(artefact)
            finally:
                shutil.rmtree(folder / "merged", ignore_errors=True)

        return call

    in_bytes = [mutations.flip_bits, mutations.flip_in_front, mutations.truncate, mutations.move_run, mutations.nest]
    stored, scored = folder / "delta" / DELTA_FILE, folder / "scores.safetensors"
    for path in (stored, scored):
        # safetensors writes metadata in an order of its own, which differs from run to run.
        header, body = mutations.split(path.read_bytes())
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        path.write_bytes(mutations.join(header, body))
    return {
        "delta": Reader(
            stored,
            lambda: Delta.load(folder / "delta"),
            lambda found: (
                *(found.selection.to_dict(), _lists(found.blocks), _lists(found.whole)),
                *(found.fingerprint, found.weight_dtype, found.architecture, found.unnamed),
            ),
            cleaned(use_delta),
            (
                [*in_bytes, mutations.edit_header, mutations.edit_manifest(MANIFEST)],
                [mutations.edit_manifest(MANIFEST, _seal), _swap_tensors(MANIFEST)],
            ),
        ),
        "selection": Reader(
            folder / "selection.json",
            lambda: BlockSelection.load(folder / "selection.json"),
            lambda found: found.to_dict(),
            _use_selection(folder / "selection.json", selection),
            ([*in_bytes, mutations.edit_document()], [mutations.edit_document(_seal)]),
        ),
        "scores": Reader(
            scored,
            lambda: BlockScores.load(scored),
            lambda found: (
                *(list(found.grids.items()), _lists(found.scores), found.num_parameters, found.config),
                *(found.base_model, [(one.source, one.reader, one.pairs.tolist()) for one in found.dependencies]),
            ),
            _use_scores(scored),
            (
                [*in_bytes, mutations.edit_header, mutations.edit_manifest(SCORES_MANIFEST)],
                [mutations.edit_manifest(SCORES_MANIFEST, _seal), _swap_tensors(SCORES_MANIFEST)],
            ),
        ),
    }


def attack(reader: Reader, original: bytes, expected: Any, rng: random.Random) -> tuple[str, str]:
    """Damage the file in one way and read it; return the mutation's name and the outcome.

    Raises:
        AssertionError: other content was accepted although the checksum was not forged.
        Exception: any error but `SMTError` that reading, or using what was accepted, raised.
    """
    forged = rng.random() < 0.3
    mutate = rng.choice(reader.mutations[forged])
    reader.path.write_bytes(mutate(original, rng))
    try:
        found = reader.read()
    except SMTError:
        return mutate.__qualname__, REFUSED
    if not forged:
        assert reader.content(found) == expected, "other content was accepted"
        return mutate.__qualname__, SAME
    with contextlib.suppress(SMTError):
        reader.use(found)
    return mutate.__qualname__, FORGED


def small_like(model: nn.Module) -> nn.Module:
    """Return a small model with the values of another one."""
    other = Small()
    other.load_state_dict(model.state_dict())
    return other


def _scores(model: nn.Module) -> BlockScores:
    """Return scores of rows that have dependent columns."""
    config = SMTConfig(target_modules=["v_proj"], granularity="row", budget=3, score="random", train_dependents=True)
    grids = target_grids(find_targets(model, config), config)
    columns = target_grids({"layers.1.q_proj": model.get_submodule("layers.1.q_proj")}, SMTConfig(granularity="column"))
    pairs = torch.tensor([[0, 1], [2, 7]], dtype=torch.int32)
    dependencies = [Dependency("layers.0.v_proj", "layers.1.q_proj", pairs, columns["layers.1.q_proj"])]
    values = {name: torch.rand(grid.shape) for name, grid in grids.items()}
    return BlockScores(grids, values, count_parameters(model), config, "some/base", dependencies)


def _use_selection(path: Path, other: BlockSelection) -> Callable[[BlockSelection], None]:
    def use(selection: BlockSelection) -> None:
        _inspect(path)
        with contextlib.suppress(SMTError):
            Overlap.of(selection, other)
        Overlap.of(selection, selection)
        convert_to_smt(Small(), selection)

    return use


def _use_scores(path: Path) -> Callable[[BlockScores], None]:
    def use(scores: BlockScores) -> None:
        _inspect(path)
        Overlap.of(scores, scores)
        scores.check_model(Small(), SMTConfig(target_modules=["v_proj"], granularity="row"))

    return use


def _inspect(path: Path) -> None:
    """Run `smt inspect`, and check that its output is safe for a terminal."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()):
        main(["inspect", str(path.parent if path.name == DELTA_FILE else path)])
    assert all(line.isprintable() for line in output.getvalue().splitlines()), "escape sequences were printed"


def _seal(manifest: Any, data: bytes) -> Any:
    """Recompute the checksum over a manifest and the tensors in its file, if it still has one."""
    if not isinstance(manifest, dict) or CHECKSUM not in manifest:
        return manifest
    del manifest[CHECKSUM]
    return sealed(manifest, {} if data[:1] == b"{" else _arrays(load(data)))


def _swap_tensors(key: str):
    """Return a mutation that changes a tensor's dtype, shape or name, or drops it, and renews the checksum."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        header, _ = mutations.split(data)
        manifest, tensors = json.loads(header["__metadata__"][key]), dict(sorted(load(data).items()))
        name = rng.choice(list(tensors))
        tensor = tensors.pop(name)
        dtype = rng.choice([torch.int32, torch.float16, torch.float64, torch.bool, torch.int64, torch.uint8])
        changed = [tensor.to(dtype), tensor.flatten(), tensor[:1], tensor[:0], tensor.new_full((3, 2), -1), 0 / tensor]
        renamed = rng.choice([name, name, "stranger", f"{name} > x", next(iter(tensors))])
        if rng.random() < 0.9:
            tensors[renamed] = rng.choice(changed).contiguous()
        parts, place = {}, 0
        body = b""
        for part, value in tensors.items():
            content = value.view(-1).view(torch.uint8).numpy().tobytes()
            kind = {torch.float32: "F32", torch.int32: "I32", torch.float16: "F16", torch.float64: "F64"}
            kind |= {torch.bool: "BOOL", torch.int64: "I64", torch.uint8: "U8"}
            offsets = [place, place + len(content)]
            parts[part] = {"dtype": kind[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
            body, place = body + content, offsets[1]
        manifest.pop(CHECKSUM)
        metadata = header["__metadata__"] | {key: json.dumps(sealed(manifest, _arrays(tensors)))}
        return mutations.join({"__metadata__": metadata, **parts}, body)

    return mutate


def _arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: as_array(tensor) for name, tensor in tensors.items()}


def _lists(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in sorted(tensors.items())}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
