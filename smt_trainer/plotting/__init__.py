"""Pictures of selections and scores (matplotlib, from the extra `plot`), and their numbers as rows for CSV."""

from smt_trainer.plotting.block_map import plot_selection
from smt_trainer.plotting.experts import plot_experts
from smt_trainer.plotting.folder import plot_all
from smt_trainer.plotting.histogram import ScoreRow, score_rows
from smt_trainer.plotting.layers import plot_layers
from smt_trainer.plotting.overlap import plot_overlap
from smt_trainer.plotting.scores import plot_scores
from smt_trainer.plotting.shares import plot_shares
from smt_trainer.plotting.tables import (
    ExpertRow,
    LayerRow,
    OverlapPoint,
    SelectionRow,
    ShareRow,
    expert_rows,
    layer_rows,
    selection_rows,
    share_rows,
    write_csv,
)

__all__ = [
    "ExpertRow",
    "LayerRow",
    "OverlapPoint",
    "ScoreRow",
    "SelectionRow",
    "ShareRow",
    "expert_rows",
    "layer_rows",
    "plot_all",
    "plot_experts",
    "plot_layers",
    "plot_overlap",
    "plot_scores",
    "plot_selection",
    "plot_shares",
    "score_rows",
    "selection_rows",
    "share_rows",
    "write_csv",
]
