"""The counts of SPSFT's tables: of a tiny model, and the committed ones beside the paper's."""

import json
from pathlib import Path

import images
import pytest
import torch

from recipes.benchmarks.parts.image_models import ResNeXt101, deit, resnet101, vit
from recipes.benchmarks.spsft_counts import TABLE_2, count_images, count_llama, markdown
from smt_trainer.model.targets import count_parameters

RESULTS = Path(__file__).parents[3] / "recipes" / "benchmarks" / "results"


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((RESULTS / "spsft_counts.json").read_text(encoding="utf-8"))


def test_rows_are_a_twentieth_of_the_convolutions_and_columns_come_on_top_of_half_of_it():
    (row,) = count_images("tiny", lambda labels: images.resnet(num_labels=labels), {"data": 7})
    model = images.resnet(num_labels=7)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    longest = max(module.weight[0].numel() for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    assert abs(row["rows"] - weights / 20) <= longest / 2
    assert row["dependents"] > weights / 40 - longest / 2
    assert row["heads"] == 7 * 33 and row["dense"] == count_parameters(model)


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(vit, 86_567_656), (deit, 87_338_192), (resnet101, 44_549_160), (ResNeXt101, 88_791_336)],
)
def test_models_have_as_many_parameters_as_the_published_ones(build, parameters):
    with torch.device("meta"):
        assert count_parameters(build(1000)) == parameters


def test_table_7_is_that_of_the_paper(committed):
    assert [round(one["trained"] / 1e6, 1) for one in committed["table_7"]] == [145.8, 78.6, 159.4, 92.3]
    one = committed["table_7"][1]
    assert count_llama(one["model"], one["modules"], one["rows"])["trained"] == one["trained"]


def test_dense_and_head_counts_of_table_2_are_those_of_the_paper(committed):
    for one in committed["table_2"]:
        dense, head, _ = TABLE_2[one["model"]][one["data"]]
        assert round(one["heads"] / 1e6, 1) == head
        exception = one["model"] == "ResNeXt101" and one["data"] != "Tiny-ImageNet"
        assert round(one["dense"] / 1e6, 1) == (86.9 if exception else dense)


def test_the_committed_report_is_that_of_the_committed_figures(committed):
    assert (RESULTS / "spsft_counts.md").read_text(encoding="utf-8") == markdown(committed)
