"""The picture of the README, drawn from the committed measurement."""

import json
import struct
from pathlib import Path

import pytest

from recipes.benchmarks.readme_chart import MEASUREMENT, PICTURE, draw, main

RESULTS = Path(__file__).parents[3] / "recipes" / "benchmarks" / "results"


def test_the_picture_has_its_size_and_is_written_to_the_folder_of_the_measurement(tmp_path):
    (tmp_path / MEASUREMENT).write_text((RESULTS / MEASUREMENT).read_text())
    main(["--results", str(tmp_path)])
    content = (tmp_path / PICTURE).read_bytes()
    assert content.startswith(b"\x89PNG") and struct.unpack(">II", content[16:24]) == (1350, 440)


def test_the_numbers_on_the_bars_are_those_of_the_report(tmp_path):
    summary = (RESULTS / MEASUREMENT).with_suffix(".md").read_text().partition("## In short")[2].partition("##")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in summary.splitlines() if line.startswith("| ")]
    expected = {(method, budget): (flops, memory) for method, budget, _, memory, _, flops, _ in rows[2:]}
    figure = draw(json.loads((RESULTS / MEASUREMENT).read_text()), tmp_path / "picture.png")
    shown = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["SMT", "LoRA", "DoRA", "full fine-tuning"]
    methods = [("SMT blocks", "0.84 %"), ("LoRA", "0.84 %"), ("DoRA", "0.84 %"), ("full fine-tuning", "")]
    assert list(zip(*shown, strict=True)) == [expected[method] for method in methods]
    for axis in figure.axes:
        widths = [bar.get_width() for bar in axis.patches]
        assert widths == pytest.approx([float(text.get_text()) for text in axis.texts], abs=5e-4)
        assert max(widths) < axis.get_xlim()[1] and axis.get_xlim()[0] == 0
