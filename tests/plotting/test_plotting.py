"""Pictures of selections and scores: they draw what the selection holds and what the rows for CSV say."""

import builtins
import csv
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import mixture
from reference import cell_shares

from smt_trainer import (
    BlockSelection,
    SMTError,
    plot_experts,
    plot_layers,
    plot_overlap,
    plot_scores,
    plot_selection,
    plot_shares,
)
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.names import by_projection
from smt_trainer.plotting import (
    OverlapPoint,
    expert_rows,
    layer_rows,
    plot_all,
    score_rows,
    selection_rows,
    share_rows,
    write_csv,
)
from smt_trainer.plotting.block_map import trained_share
from smt_trainer.plotting.histogram import cut
from smt_trainer.plotting.style import strips
from smt_trainer.selection.choose import select_blocks

pytest.importorskip("matplotlib")

POINTS = [
    OverlapPoint(score, steps, "longest warm-up", seed, steps / 10 - 0.1 * number, 0.05, steps / 20)
    for score in ("grad_l1", "grad_signed")
    for number, seed in enumerate("ab")
    for steps in (1, 5, 10)
]


@pytest.fixture
def selection(llama):
    return tiny.choose(llama)


@pytest.fixture
def scores(selection):
    """Scores over three powers of ten, some of them 0; the selection holds the highest."""
    drawn = {name: torch.rand(grid.shape) for name, grid in selection.grids.items()}
    return {
        name: torch.where(values < 0.2, 0.0, 1000**values).index_put(
            torch.from_numpy(selection.block_indices.get(name, np.empty((0, 2), np.int64))).unbind(1),
            torch.tensor(2000.0),
        )
        for name, values in drawn.items()
    }


def rows_selection(rows: int, columns: int, chosen: set[int], block=(1, 1)) -> BlockSelection:
    """Make a selection of some blocks, by flat position, in one module."""
    grid = BlockGrid(rows * block[0], columns * block[1], *block)
    indices = torch.tensor([divmod(position, columns) for position in sorted(chosen)])
    return BlockSelection({"layers.0.q": grid}, {"layers.0.q": indices}, 1000, tiny.config())


# ---- the block map ----


def test_each_weight_is_drawn_with_its_trained_blocks_filled(selection):
    figure = plot_selection(selection)
    drawn = {image.get_gid(): np.asarray(image.get_array()) for axis in figure.axes for image in axis.images}
    assert list(drawn) == [name for names in by_projection(selection.grids).values() for name in names]
    for name, cells in drawn.items():
        assert cells.shape == selection.grids[name].shape
        assert np.argwhere(cells).tolist() == selection.block_indices.get(name, torch.empty(0, 2)).tolist()


def test_a_weight_has_its_own_proportions_and_each_layer_its_number(selection):
    figure = plot_selection(selection)
    for axis, (projection, names) in zip(figure.axes, by_projection(selection.grids).items(), strict=True):
        out, into = selection.grids[names[0]].weight_shape
        left, right, bottom, top = axis.images[0].get_extent()
        assert (bottom - top) / (right - left) == out / into
        width, height = axis.get_window_extent().size
        across, down = (abs(np.diff(limits)[0]) for limits in (axis.get_xlim(), axis.get_ylim()))
        assert width / across == pytest.approx(height / down)
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1"]
        assert axis.get_title(loc="left").startswith(
            f"{projection}: {selection.blocks_by_projection()[projection]} of "
        )
    assert figure.get_suptitle() == "12 trained blocks of 16x16 weights, 4.39% of the model"
    one = plot_selection(rows_selection(2, 2, {1}))
    assert one.get_suptitle() == "1 trained block of 1x1 weights, 0.10% of the model"


@given(data=st.data(), rows=st.integers(1, 30), columns=st.integers(1, 30), most=st.tuples(*[st.integers(1, 12)] * 2))
def test_a_cell_stands_for_its_blocks(data, rows, columns, most):
    chosen = data.draw(st.sets(st.integers(0, rows * columns - 1), min_size=1))
    selection = rows_selection(rows, columns, chosen)
    share = trained_share(selection, "layers.0.q", *most)
    assert all(length <= limit for length, limit in zip(share.shape, most, strict=True))
    np.testing.assert_array_equal(share, cell_shares(rows, columns, chosen, most))


def test_thousands_of_rows_are_drawn_as_cells_with_a_scale():
    figure = plot_selection(rows_selection(2304, 1, {5, 6, 2303}, block=(1, 768)))
    tile, scale = figure.axes
    cells = np.asarray(tile.images[0].get_array())
    assert len(cells) < 400 and np.count_nonzero(cells) == 2
    assert scale.get_ylabel() == "share trained"


@given(st.lists(st.integers(), min_size=1, max_size=200), st.integers(1, 40))
def test_strips_hold_all_items_in_as_few_runs_as_possible(items, most):
    runs = strips(items, most)
    assert [item for run in runs for item in run] == items
    assert max(map(len, runs)) <= most and len(runs) == -(-len(items) // most)


# ---- layers and shares ----


def test_each_layer_of_each_projection_shows_its_trained_blocks(selection):
    axis = plot_layers(selection).axes[0]
    rows = layer_rows(selection)
    assert [text.get_text() for text in axis.texts] == [str(row.trained or "·") for row in rows]
    np.testing.assert_allclose(axis.collections[0].get_array().ravel(), [row.trained / row.blocks for row in rows])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["q_proj", "k_proj", "v_proj"]


def test_layers_without_a_target_have_no_cell(selection):
    grids = {name: grid for name, grid in selection.grids.items() if name != "model.layers.1.self_attn.k_proj"}
    part = replace(
        selection,
        grids=grids,
        block_indices={name: indices for name, indices in selection.block_indices.items() if name in grids},
    )
    cells = np.ma.getmaskarray(plot_layers(part).axes[0].collections[0].get_array())
    assert np.argwhere(cells).tolist() == [[1, 1]]


def test_the_bars_are_the_shares_of_trained_and_of_targeted_weights(selection):
    trained, targeted = plot_shares(selection).axes[0].containers
    rows = share_rows(selection)
    assert [bar.get_width() for bar in trained] == [row.share_of_trained for row in rows]
    assert [bar.get_width() for bar in targeted] == [row.share_of_targets for row in rows] == [0.5, 0.25, 0.25]
    assert sum(row.share_of_trained for row in rows) == pytest.approx(1)


def test_the_rows_add_up_to_the_selection(selection, scores):
    blocks = sum(grid.num_blocks for grid in selection.grids.values())
    assert len(selection_rows(selection)) == selection.num_blocks
    for rows in (layer_rows(selection), share_rows(selection), score_rows(scores, selection)):
        assert sum(row.trained for row in rows) == selection.num_blocks
        assert sum(row.blocks for row in rows) == blocks
        for projection, count in selection.blocks_by_projection().items():
            assert sum(row.trained for row in rows if row.projection == projection) == count
    assert sum(row.trained_weights for row in share_rows(selection)) == selection.trainable_parameters


def test_projections_of_one_name_are_told_apart_and_experts_are_not():
    t5 = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    t5 += [
        "decoder.block.0.layer.1.EncDecAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.q",
        "decoder.block.0.v",
    ]
    assert by_projection(t5) == {
        "encoder.SelfAttention.q": t5[:1],
        "decoder.SelfAttention.q": t5[1:2],
        "decoder.EncDecAttention.q": t5[2:4],
        "v": t5[4:],
    }
    experts = [f"layers.{layer}.experts.{expert}.up" for layer in range(2) for expert in range(3)]
    assert by_projection(experts) == {"up": experts}


# ---- scores ----


def test_the_histogram_is_cut_between_two_bars(selection, scores):
    figure = plot_scores(scores, selection)
    lowest = cut(scores, selection)
    assert f"reached by {selection.num_blocks} of 64 blocks" in figure.get_suptitle()
    assert figure.axes[0].get_xscale() == "log"
    for axis, (projection, names) in zip(figure.axes, by_projection(scores).items(), strict=True):
        every, trained = (patch.get_data() for patch in axis.patches[:2])
        assert lowest in every.edges and lowest in axis.lines[0].get_xdata()
        assert sum(every.values) == sum(int((scores[name] > 0).sum()) for name in names)
        assert sum(trained.values) == sum(every.values[every.edges[:-1] >= lowest])
        assert sum(trained.values) == selection.blocks_by_projection()[projection]
        zeros = sum(int((scores[name] == 0).sum()) for name in names)
        assert (f"{zeros} with a score of 0" in axis.get_title(loc="left")) == (zeros > 0)


def test_scores_of_one_magnitude_are_on_a_linear_axis(selection):
    scores = {name: 1 + torch.rand(grid.shape) for name, grid in selection.grids.items()}
    figure = plot_scores(scores, select_blocks(scores, selection.grids, selection.config, selection.num_parameters))
    assert figure.axes[0].get_xscale() == "linear"
    widths = np.diff(figure.axes[0].patches[0].get_data().edges)[1:]
    np.testing.assert_allclose(widths, widths[0])


@given(
    st.lists(st.floats(0, 2**100, width=32), min_size=12, max_size=12).filter(any),
    st.integers(1, 12),
)
def test_every_score_lies_in_one_interval(values, budget):
    grid = BlockGrid(3, 4, 1, 1)
    scores = {"layers.0.q": torch.tensor(values).reshape(3, 4)}
    selection = select_blocks(scores, {"layers.0.q": grid}, tiny.config(budget=budget), 12)
    rows = score_rows(scores, selection)
    assert sum(row.blocks for row in rows) == 12 and sum(row.trained for row in rows) == budget
    for row in rows:
        inside = [value for value in values if row.low <= value < row.high or row.low == row.high == value]
        assert len(inside) == row.blocks


def test_scores_of_another_model_are_refused(selection, scores):
    scores["model.layers.0.self_attn.q_proj"] = torch.ones(2, 2)
    with pytest.raises(
        SMTError, match=r"`model.layers.0.self_attn.q_proj` has scores of shape \(2, 2\) and a grid of \(4"
    ):
        plot_scores(scores, selection)


# ---- overlap ----


def test_a_line_is_the_mean_over_seeds_beside_chance():
    overlap, correlation = plot_overlap(POINTS).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in overlap.lines}
    for score in ("grad_l1", "grad_signed"):
        np.testing.assert_allclose(lines[f"{score}, longest warm-up"], [[1, 0.05], [5, 0.45], [10, 0.95]])
    assert lines["random blocks"] == [[1, 0.05], [5, 0.05], [10, 0.05]]
    np.testing.assert_allclose(correlation.lines[0].get_xydata(), [[1, 0.05], [5, 0.25], [10, 0.5]])


def test_no_points_are_refused():
    with pytest.raises(SMTError, match="no points to draw"):
        plot_overlap([])


# ---- files ----

PICTURES = {
    "selection": lambda selection, scores, path: plot_selection(selection, path),
    "layers": lambda selection, scores, path: plot_layers(selection, path),
    "shares": lambda selection, scores, path: plot_shares(selection, path),
    "scores": lambda selection, scores, path: plot_scores(scores, selection, path),
    "overlap": lambda selection, scores, path: plot_overlap(POINTS, path),
}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(("ending", "magic"), [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".svg", b"<?xml")])
def test_the_picture_is_written_in_the_format_of_its_ending(picture, ending, magic, selection, scores, tmp_path):
    path = tmp_path / f"picture{ending}"
    PICTURES[picture](selection, scores, path)
    assert path.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("picture", PICTURES)
def test_all_text_lies_within_the_picture(picture, selection, scores):
    figure = PICTURES[picture](selection, scores, None)
    figure.draw_without_rendering()
    whole, drawn = figure.bbox, figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= whole.x1 and drawn.y1 <= whole.y1


def test_another_ending_is_refused(selection, tmp_path):
    with pytest.raises(SMTError, match=r"must end in \.png, \.pdf, \.svg, .*picture\.jpg"):
        plot_selection(selection, tmp_path / "picture.jpg")


def test_without_matplotlib_the_error_names_the_install_command(selection, monkeypatch):
    importing = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SMTError, match=r"pip install 'smt_trainer\[plot\]'"):
        plot_selection(selection)


def test_rows_are_read_back_from_their_csv(selection, tmp_path):
    rows = share_rows(selection)
    write_csv(rows, tmp_path / "shares.csv")
    with open(tmp_path / "shares.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["projection"] for row in read] == ["q_proj", "k_proj", "v_proj"]
    assert [float(row["share_of_trained"]) for row in read] == [row.share_of_trained for row in rows]
    with pytest.raises(SMTError, match="no rows to write"):
        write_csv([], tmp_path / "empty.csv")


# ---- experts ----


def test_each_expert_has_a_cell_with_the_share_of_its_blocks(tmp_path):
    selection = tiny.choose(mixture(), tiny.config(target_modules=["experts", "v_proj"], budget=60, score="random"))
    figure = plot_experts(selection)
    names = [name for name in selection.grids if "experts" in name]
    rows = expert_rows(selection)
    assert len(rows) == len(names) == 2 * 2 * 8
    assert sum(row.trained for row in rows) == sum(len(selection.block_indices.get(name, ())) for name in names)
    for axis, projection in zip(figure.axes, ("gate_up_proj", "down_proj"), strict=False):
        shares = np.asarray(axis.collections[0].get_array()).reshape(2, 8)
        for row in (row for row in rows if row.projection == projection):
            assert shares[row.layer, row.expert] == row.trained / row.blocks
    written = plot_all(selection, tmp_path)
    assert [path.stem for path in written] == ["selection", "layers", "shares", "experts"]
    drawn = (tmp_path / "selection.csv").read_text()
    assert "v_proj" in drawn and "experts" not in drawn


def test_where_all_targets_are_experts_there_is_no_block_map(tmp_path):
    selection = tiny.choose(mixture(), tiny.config(target_modules="experts", budget=60, score="random"))
    assert [path.stem for path in plot_all(selection, tmp_path)] == ["layers", "shares", "experts"]
