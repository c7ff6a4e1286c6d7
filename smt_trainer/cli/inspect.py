"""`smt inspect PATH [OTHER]`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smt_trainer.cli.options import add_command, add_json, meanings
from smt_trainer.cli.output import BLOCKS, blocks, fact, table, write
from smt_trainer.config import SMTConfig
from smt_trainer.errors import SMTError

RANGES = 4
KEYS = {
    "kind": "delta, scores or selection",
    "base": "name of the base, or null",
    "selection": BLOCKS,
    "config": "fields of SMTConfig",
    "fingerprint": "of a delta's base",
    "weight_dtype": "of a delta",
    "quantization": "of a delta's base, or null",
    "whole": "tensor that a delta holds whole -> its parameters",
    "scores": "number, least and largest",
    "pictures": "files drawn",
}
KEYS_OF_TWO = {
    "total": "numbers of blocks in PATH (first), in OTHER (second) and in both (shared), Jaccard index and Spearman's "
    "rank correlation of scores, or null",
    "projections": "the same by projection",
}


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = add_command(commands, "inspect", run, "show what a delta, a selection or a scores file holds")
    parser.add_argument(
        "path",
        metavar="PATH",
        help="delta folder or checkpoint of SMTTrainer, selection (.json, or the folder of smt select) or scores "
        "(.safetensors)",
    )
    parser.add_argument("other", metavar="OTHER", nargs="?", help="another one: show how much their blocks agree")
    parser.add_argument(
        "--plot", type=Path, metavar="FOLDER", help="folder for all pictures, each with its numbers as CSV"
    )
    add_json(parser, KEYS, f". With OTHER: {meanings(KEYS_OF_TWO)}")


def run(arguments: argparse.Namespace) -> None:
    """Print an artefact's base, configuration and blocks, or what two artefacts share."""
    artefact = _load(arguments.path)
    if arguments.other is not None:
        if arguments.plot:
            raise SMTError("--plot draws one artefact; inspect each of the two separately.")
        _compare(arguments, artefact, _load(arguments.other))
        return
    selection = _chosen(artefact)
    pictures: list[Path] = []
    if arguments.plot is not None:
        from smt_trainer.plotting import plot_all

        pictures = plot_all(selection, arguments.plot, getattr(artefact, "scores", None))
    result = _result(artefact, selection) | {"pictures": list(map(str, pictures))}
    write(arguments, result, _lines(result, selection, arguments.plot))


def _load(path: str):
    """Load what lies at a path: a `BlockScores`, a `BlockSelection` or a `Delta`."""
    from smt_trainer.delta.delta import Delta
    from smt_trainer.delta.folder import DELTA_FILE
    from smt_trainer.selection.block_scores import BlockScores
    from smt_trainer.selection.block_selection import SELECTION_FILE, BlockSelection

    if Path(path, SELECTION_FILE).is_file() and not Path(path, DELTA_FILE).is_file():
        return BlockSelection.load(path)
    kinds = {".safetensors": BlockScores.load, ".json": BlockSelection.load}
    return kinds.get(Path(path).suffix, Delta.load)(path)


def _chosen(artefact):
    """Return the selection that an artefact holds or gives."""
    from smt_trainer.selection.block_scores import BlockScores

    return artefact.select() if isinstance(artefact, BlockScores) else getattr(artefact, "selection", artefact)


def _result(artefact, selection) -> dict[str, Any]:
    """Return the result under `KEYS` without pictures, with None for what this kind of artefact does not have."""
    from smt_trainer.delta.delta import Delta
    from smt_trainer.selection.block_scores import BlockScores

    found: dict[str, Any] = dict.fromkeys(KEYS) | {
        "kind": "selection",
        "base": selection.base_model,
        "selection": blocks(selection),
        "config": selection.config.to_dict(),
    }
    if isinstance(artefact, Delta):
        found |= {
            "kind": "delta",
            "fingerprint": artefact.fingerprint.digest,
            "weight_dtype": artefact.weight_dtype,
            "quantization": artefact.quantization,
            "whole": {name: values.size for name, values in artefact.whole_arrays.items()},
        }
    if isinstance(artefact, BlockScores):
        ends = [score for scores in artefact.scores.values() for score in (scores.min().item(), scores.max().item())]
        number = sum(grid.num_blocks for grid in artefact.grids.values())
        found |= {"kind": "scores", "scores": {"number": number, "least": min(ends), "largest": max(ends)}}
    return found


def _lines(found: dict[str, Any], selection, plot: Path | None) -> Iterator[str]:
    yield fact("base", found["base"] or "not recorded")
    if found["kind"] == "delta":
        yield fact("fingerprint", f"{found['fingerprint'][:16]}, weights in {found['weight_dtype']}")
    if found["quantization"] is not None:
        from smt_trainer.delta.onto import in_words

        yield fact("quantised", in_words(found["quantization"]))
    if scores := found["scores"]:
        ends = f"{scores['least']:.4g} to {scores['largest']:.4g}"
        yield fact("scores", f"of {scores['number']:,} blocks, from {ends}; chosen by their own budget")
    said = ["score", "scope", "budget"]
    others = ("budget_of", "layer_cap", "rank_cap")
    said += [name for name in others if found["config"][name] != getattr(SMTConfig, name)]
    yield fact("chosen by", ", ".join(f"{name}={found['config'][name]}" for name in said))
    yield fact("blocks", selection.summary())
    if whole := found["whole"]:
        yield fact("whole", f"{', '.join(whole)} ({sum(whole.values()):,} parameters)")
    yield ""
    yield from _table(selection)
    if pictures := found["pictures"]:
        yield ""
        yield f"{', '.join(Path(picture).name for picture in pictures)} in {plot}"


def _table(selection) -> Iterator[str]:
    """Yield each projection's chosen blocks, by layers from bottom to top and in all, and their share of its blocks."""
    from smt_trainer.model.names import by_projection, layer_index

    def chosen(name: str) -> int:
        return len(selection.block_indices.get(name, ()))

    layers = sorted({layer_index(name) for name in selection.grids})
    length = -(-len(layers) // RANGES)
    ranges = [layers[start : start + length] for start in range(0, len(layers), length)]
    titles = [f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in ranges]
    titles = ["outside" if title == "-1" else title for title in titles]
    rows = {}
    for projection, names in {**by_projection(selection.grids), "all": list(selection.grids)}.items():
        counts = [sum(chosen(name) for name in names if layer_index(name) in part) for part in ranges]
        of, total = sum(selection.grids[name].num_blocks for name in names), sum(map(chosen, names))
        rows[projection] = [*(f"{count:,}" for count in (*counts, total, of)), f"{total / of:.3%}"]
    yield from table(["layers", *titles, "chosen", "of", "share"], rows)


def _compare(arguments: argparse.Namespace, first, second) -> None:
    """Print shared blocks, Jaccard index and any rank correlation of scores (Spearman's), by projection and in all."""
    from smt_trainer.selection.overlap import Overlap

    def numbers(part: Overlap) -> dict[str, Any]:
        return {name: getattr(part, name) for name in ("first", "second", "shared", "jaccard", "spearman")}

    found = Overlap.of(*(getattr(artefact, "selection", artefact) for artefact in (first, second)))
    parts = {projection: numbers(part) for projection, part in found.by_projection.items()}
    titles = "projection first second shared Jaccard".split() + ["Spearman"] * (found.spearman is not None)
    rows = {
        projection: [
            *(f"{part[name]:,}" for name in ("first", "second", "shared")),
            *(f"{part[name]:.3f}" for name in ("jaccard", "spearman") if part[name] is not None),
        ]
        for projection, part in {**parts, "all": numbers(found)}.items()
    }
    write(arguments, {"total": numbers(found), "projections": parts}, table(titles, rows))
