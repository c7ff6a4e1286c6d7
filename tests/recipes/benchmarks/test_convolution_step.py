"""The benchmark of a step of convolutions, on a tiny model; and its committed result."""

import json
from pathlib import Path

import images

from recipes.benchmarks.convolution_step import markdown, measure

RESULTS = Path(__file__).parents[3] / "recipes" / "benchmarks" / "results"


def tiny_resnet(labels: int):
    return images.resnet(num_labels=labels)


def test_rows_take_flops_between_none_and_all_and_keep_nothing_more():
    results = json.loads(json.dumps(measure(tiny_resnet, 2, 32, (0.05,), rounds=2)))
    frozen, rows, full = results["steps"].values()
    assert frozen["trainable"] == 0 < rows["trainable"] < full["trainable"]
    assert frozen["flops"] < rows["flops"] < full["flops"]
    assert frozen["saved_bytes"] == rows["saved_bytes"] <= full["saved_bytes"]
    assert f"| rows, 5 % | {rows['trainable']:,} | {rows['flops'] / frozen['flops']:.3f} |" in markdown(results)


def test_the_committed_report_is_that_of_the_committed_figures():
    results = json.loads((RESULTS / "convolution_step.json").read_text(encoding="utf-8"))
    assert (RESULTS / "convolution_step.md").read_text(encoding="utf-8") == markdown(results)
