"""What holds for any delta of a checkpoint in `folder / "base"`, in `folder / "delta"`."""

import tiny
from weight_patches import apply_patches

from smt_trainer import Delta, compose_deltas, merge_checkpoint, unmerge
from smt_trainer.export.patches import delta_patches


def assert_patches_merge(folder, **limits) -> None:
    """Assert that the delta's patches, under their names, make the merged checkpoint of the base."""
    merge_checkpoint(folder / "base", folder / "delta", folder / "merged")
    state = tiny.saved_tensors(folder / "base")
    apply_patches(state, delta_patches(folder / "base", folder / "delta", **limits))
    tiny.assert_same(state, tiny.saved_tensors(folder / "merged"))


def assert_composed_and_unmerged_exactly(folder) -> None:
    """Assert that the delta composed alone is itself, and that merging it can be undone."""
    merge_checkpoint(folder / "base", folder / "delta", folder / "merged")
    compose_deltas(folder / "base", [folder / "delta"], folder / "same")
    tiny.assert_same(Delta.load(folder / "same").blocks, Delta.load(folder / "delta").blocks)
    unmerge(folder / "base", folder / "delta", folder / "merged", folder / "unmerged")
    tiny.assert_same(tiny.saved_tensors(folder / "unmerged"), tiny.saved_tensors(folder / "base"))
