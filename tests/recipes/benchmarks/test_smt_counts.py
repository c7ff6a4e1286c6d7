"""The counts of SMT's tables: the committed ones beside the paper's percentages, and some of them again."""

import json
from pathlib import Path

import pytest

from recipes.benchmarks.smt_counts import SHAPES, build, count_adapters, count_blocks, count_groups, markdown
from smt_trainer.model.targets import count_parameters

RESULTS = Path(__file__).parents[3] / "recipes" / "benchmarks" / "results"


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((RESULTS / "smt_counts.json").read_text(encoding="utf-8"))


def percentage(trained: int, parameters: int) -> float:
    return round(100 * trained / parameters, 2)


@pytest.mark.parametrize(("model", "parameters"), [("LLaMA-7B", 6_738_415_616), ("LLaMA-13B", 13_015_864_320)])
def test_models_have_as_many_parameters_as_the_published_ones(model, parameters):
    assert count_parameters(build(model)) == parameters


def test_percentages_are_those_of_the_paper_both_ways(committed):
    for one in committed["smt"]:
        assert percentage(one["trained"], one["parameters"]) == one["paper"]
        printed = one["printed"] * 256 * 256
        assert percentage(printed, one["parameters"] + printed) == one["paper"]
        assert one["trained"] == one["blocks"] * 256 * 256


def test_table_4_divides_table_6(committed):
    whole = {one["blocks"] for one in committed["table_6"]}
    assert whole == {sum(one["blocks"].values()) for one in committed["table_4"]} == {864}


def test_adapters_of_table_2_are_the_paper_s_but_for_its_slip(committed):
    known = [one for one in committed["adapters"] if one["known"]]
    printed = {
        (one["model"], one["method"]): percentage(one["trained"], one["parameters"] + one["trained"]) for one in known
    }
    wrong = [(one["model"], one["method"]) for one in known if printed[one["model"], one["method"]] != one["paper"]]
    assert len(known) == 8 and wrong == [("LLaMA2-7B", "DoRA")]
    assert printed["LLaMA2-7B", "DoRA"] == 0.43


def test_counting_again_gives_the_committed_counts(committed):
    one = committed["smt"][0]
    assert count_blocks(one["model"], one["paper"]) | {"tables": one["tables"]} == one
    assert count_groups(0.21, 0.63) in committed["table_4"]
    nearest = next(one for one in committed["adapters"] if not one["known"])
    again = count_adapters(nearest["model"], nearest["method"], None, nearest["paper"])
    assert again | {"tables": nearest["tables"]} == nearest


def test_the_committed_report_is_that_of_the_committed_figures(committed):
    assert SHAPES.keys() == {one["model"] for one in committed["smt"]}
    assert (RESULTS / "smt_counts.md").read_text(encoding="utf-8") == markdown(committed)
