"""`smt inspect PATH [OTHER]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from smt_trainer.config import SMTConfig

RANGES = 4


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = commands.add_parser("inspect", help="show what a delta, a selection or a scores file holds")
    parser.add_argument(
        "path", help="delta folder or checkpoint of SMTTrainer, selection (.json) or scores (.safetensors)"
    )
    parser.add_argument("other", nargs="?", help="another one: show how much their blocks agree")
    parser.add_argument("--plot", type=Path, help="folder for all pictures, each with its numbers as CSV")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print an artefact's base, configuration and blocks, or what two artefacts share."""
    from smt_trainer.errors import SMTError

    artefact = _load(arguments.path)
    if arguments.other is not None:
        if arguments.plot:
            raise SMTError("--plot draws one artefact; inspect each of the two separately.")
        _print_overlap(artefact, _load(arguments.other))
        return
    selection = _describe(artefact)
    _print_table(selection)
    if arguments.plot is not None:
        from smt_trainer.plotting import plot_all

        pictures = plot_all(selection, arguments.plot, getattr(artefact, "scores", None))
        print(f"\n{', '.join(picture.name for picture in pictures)} in {arguments.plot}")


def _load(path: str):
    """Load what lies at a path: a `BlockScores`, a `BlockSelection` or a `Delta`."""
    from smt_trainer.delta.delta import Delta
    from smt_trainer.selection.block_scores import BlockScores
    from smt_trainer.selection.block_selection import BlockSelection

    kinds = {".safetensors": BlockScores.load, ".json": BlockSelection.load}
    return kinds.get(Path(path).suffix, Delta.load)(path)


def _selection(artefact):
    return getattr(artefact, "selection", artefact)


def _describe(artefact):
    """Print what an artefact is and how it was made; return the selection that it holds or gives."""
    from smt_trainer.delta.delta import Delta
    from smt_trainer.selection.block_scores import BlockScores

    selection = artefact.select() if isinstance(artefact, BlockScores) else _selection(artefact)
    config = selection.config
    print(f"base         {selection.base_model or 'not recorded'}")
    if isinstance(artefact, Delta):
        print(f"fingerprint  {artefact.base.digest[:16]}, weights in {artefact.weight_dtype}")
        if artefact.quantization is not None:
            from smt_trainer.delta.onto import in_words

            print(f"quantised    {in_words(artefact.quantization)}")
    if isinstance(artefact, BlockScores):
        found = [score for scores in artefact.scores.values() for score in (scores.min().item(), scores.max().item())]
        count = sum(grid.num_blocks for grid in artefact.grids.values())
        print(
            f"scores       of {count:,} blocks, from {min(found):.4g} to {max(found):.4g}; chosen by their own budget"
        )
    said = ["score", "scope", "budget"]
    others = ("budget_of", "layer_cap", "rank_cap")
    said += [name for name in others if getattr(config, name) != getattr(SMTConfig, name)]
    print(f"chosen by    {', '.join(f'{name}={getattr(config, name)}' for name in said)}")
    print(f"blocks       {selection.summary()}")
    if isinstance(artefact, Delta) and artefact.whole:
        numel = sum(tensor.numel() for tensor in artefact.whole.values())
        print(f"whole        {', '.join(artefact.whole)} ({numel:,} parameters)")
    return selection


def _print_table(selection) -> None:
    """Print each projection's chosen blocks, by layers from bottom to top and in all, and their share of its blocks."""
    from smt_trainer.model.names import by_projection, layer_index

    def chosen(name: str) -> int:
        return len(selection.block_indices.get(name, ()))

    layers = sorted({layer_index(name) for name in selection.grids})
    length = -(-len(layers) // RANGES)
    ranges = [layers[start : start + length] for start in range(0, len(layers), length)]
    titles = [f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in ranges]
    titles = ["outside" if title == "-1" else title for title in titles]
    rows = {
        projection: [sum(chosen(name) for name in names if layer_index(name) in part) for part in ranges]
        + [sum(map(chosen, names)), sum(selection.grids[name].num_blocks for name in names)]
        for projection, names in {**by_projection(selection.grids), "all": list(selection.grids)}.items()
    }
    width = max(map(len, [*rows, "layers"]))
    print(f"\n{'layers':<{width}}" + "".join(f"{title:>9}" for title in [*titles, "chosen", "of"]) + f"{'share':>10}")
    for projection, row in rows.items():
        print(f"{projection:<{width}}" + "".join(f"{count:>9,}" for count in row) + f"{row[-2] / row[-1]:>10.3%}")


def _print_overlap(first, second) -> None:
    """Print shared blocks, Jaccard index and any rank correlation of scores (Spearman's), by projection and in all."""
    from smt_trainer.selection.overlap import Overlap

    found = Overlap.of(_selection(first), _selection(second))
    width = max(map(len, [*found.by_projection, "projection"]))
    columns = "first second shared Jaccard".split() + (["Spearman"] if found.spearman is not None else [])
    print(f"{'projection':<{width}}" + "".join(f"{title:>10}" for title in columns))
    for projection, part in {**found.by_projection, "all": found}.items():
        counts = "".join(f"{count:>10,}" for count in (part.first, part.second, part.shared))
        rho = "" if part.spearman is None else f"{part.spearman:>10.3f}"
        print(f"{projection:<{width}}{counts}{part.jaccard:>10.3f}{rho}")
