from recipes.parts.evaluation import Evaluation
from recipes.parts.measures import gain_text, table

BEFORE = Evaluation(
    {"accuracy": {"easy": [0.0, 0.0], "hard": [0.0, 1.0, 0.0, 0.0]}, "loss": {"easy": [2.0, 1.0], "hard": [1.0] * 4}},
    texts={},
)
AFTER = Evaluation(
    {"accuracy": {"easy": [1.0, 0.0], "hard": [0.0, 1.0, 0.0, 0.0]}, "loss": {"easy": [1.0, 0.5], "hard": [0.5] * 4}},
    texts={},
)


def test_a_table_has_a_row_for_each_set_and_columns_for_each_measure():
    assert table({"untuned": BEFORE, "tuned": AFTER}).splitlines() == [
        "| set | questions | untuned, accuracy | tuned, accuracy | untuned, loss | tuned, loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| easy | 2 | 0.0 | 50.0 | 1.500 | 0.750 |",
        "| hard | 4 | 25.0 | 25.0 | 1.000 | 0.500 |",
        "| **average** |  | **12.5** | **37.5** | **1.250** | **0.625** |",
    ]


def test_a_gain_has_its_interval_and_its_unit():
    # easy: d = 1, 0, variance 1/2 of two questions; hard: no difference.
    assert gain_text("accuracy", BEFORE, AFTER) == "+25.0 ± 49.0 points of accuracy"
    assert gain_text("loss", BEFORE, AFTER) == "-0.625 ± 0.245 nats of loss"
