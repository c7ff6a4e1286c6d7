"""`smt inspect DELTA`."""

from __future__ import annotations

import argparse


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = commands.add_parser("inspect", help="say what a delta holds")
    parser.add_argument("delta", help="delta folder, or a checkpoint of SMTTrainer")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print base, configuration and the blocks of each module."""
    from smt_trainer.delta import Delta

    delta = Delta.read(arguments.delta)
    selection, config = delta.selection, delta.selection.config
    print(f"base         {selection.base_model or 'not recorded'}")
    print(f"fingerprint  {delta.fingerprint[:16]}, weights in {str(delta.weight_dtype).removeprefix('torch.')}")
    print(f"chosen by    score={config.score}, scope={config.scope}, budget={config.budget}")
    print(f"blocks       {selection.summary()}")
    if delta.whole:
        numel = sum(tensor.numel() for tensor in delta.whole.values())
        print(f"whole        {', '.join(delta.whole)} ({numel:,} parameters)")
    width = max(map(len, selection.block_indices))
    print(f"\n{'module':<{width}}  {'weight':>13}  {'block':>9}  blocks")
    for name, indices in selection.block_indices.items():
        grid = selection.grids[name]
        weight, block = ("x".join(map(str, shape)) for shape in (grid.weight_shape, grid.block_shape))
        print(f"{name:<{width}}  {weight:>13}  {block:>9}  {len(indices)} of {grid.num_blocks}")
