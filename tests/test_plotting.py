"""Pictures of a selection."""

import builtins

import numpy as np
import pytest
import tiny

from smt_trainer import SMTError, plot_selection
from smt_trainer.plotting import CHOSEN, FROZEN


def drawn(figure) -> dict[str, np.ndarray]:
    """Projection -> the picture's cells."""
    return {axis.get_title(loc="left").partition(":")[0]: axis.images[0].get_array() for axis in figure.axes}


@pytest.fixture
def selection(llama):
    pytest.importorskip("matplotlib")
    return tiny.choose(llama)


def test_each_projection_shows_all_its_blocks_with_the_chosen_ones_filled(selection):
    counts = selection.blocks_by_projection()
    pictures = drawn(plot_selection(selection))
    assert list(pictures) == list(counts) == ["q_proj", "k_proj", "v_proj"]
    for projection, cells in pictures.items():
        grids = [grid for name, grid in selection.grids.items() if name.endswith(projection)]
        assert (cells == CHOSEN).sum() == counts[projection]
        assert ((cells == CHOSEN) | (cells == FROZEN)).sum() == sum(grid.num_blocks for grid in grids)


def test_a_block_is_drawn_at_its_place(selection):
    first = next(iter(selection.grids))
    cells = np.ma.getdata(drawn(plot_selection(selection))["q_proj"])
    rows, columns = selection.grids[first].shape
    chosen = np.argwhere(cells[:rows, :columns] == CHOSEN).tolist()
    assert chosen == selection.block_indices[first].tolist()


def test_the_titles_tell_counts_and_share(selection):
    figure = plot_selection(selection)
    assert "12 trained blocks of 16x16 weights, 4.39% of the model" in figure.get_suptitle()
    counts = selection.blocks_by_projection()
    assert f"q_proj: {counts['q_proj']} of 32 blocks" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize(("ending", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_the_picture_is_written_in_the_format_of_its_ending(ending, magic, selection, tmp_path):
    path = tmp_path / f"selection{ending}"
    plot_selection(selection, path)
    assert path.read_bytes().startswith(magic)


def test_without_matplotlib_the_command_to_install_it_is_told(selection, monkeypatch):
    importing = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SMTError, match=r"pip install 'smt_trainer\[plot\]'"):
        plot_selection(selection)
