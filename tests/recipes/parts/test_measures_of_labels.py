import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.parts import measures_of_labels as measures
from recipes.parts.bootstrap import difference

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30)


def outputs_of(predicted):
    return np.array([[0.0, 1.0] if one else [1.0, 0.0] for one in predicted])


@given(pairs)
def test_f1_and_matthews_are_those_of_their_definitions(found):
    predicted, true = (np.array(column, int) for column in zip(*found, strict=True))
    outputs = outputs_of(predicted)
    both = int((predicted & true).sum())
    precision = both / predicted.sum() if predicted.sum() else 0.0
    recall = both / true.sum() if true.sum() else 0.0
    harmonic = 2 * precision * recall / (precision + recall) if both else 0.0
    assert measures.f1(outputs, true) == pytest.approx(harmonic)
    # Matthews' is Pearson's correlation of the two binary variables.
    assert measures.matthews(outputs, true) == pytest.approx(measures.pearson(predicted[:, None], true), abs=1e-12)


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
def test_pearson_is_numpys_and_spearman_sees_only_the_order(found):
    outputs, labels = (np.array(column, float) for column in zip(*found, strict=True))
    constant = len(set(outputs)) == 1 or len(set(labels)) == 1
    expected = 0.0 if constant else np.corrcoef(outputs, labels)[0, 1]
    assert measures.pearson(outputs[:, None], labels) == pytest.approx(expected, abs=1e-9)
    stretched = np.exp(outputs)[:, None]
    assert measures.spearman(stretched, labels) == pytest.approx(measures.spearman(outputs[:, None], labels), abs=1e-12)


def test_spearman_gives_equal_values_the_mean_of_their_ranks():
    # Ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3.
    assert measures.spearman(np.array([[1.0], [2.0], [2.0], [3.0]]), np.arange(4)) == pytest.approx(4.5 / 22.5**0.5)


def test_accuracy_worst_class_and_losses():
    outputs, labels = np.array([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [0, 2, 0]]), np.array([0, 1, 1, 0])
    assert measures.accuracy(outputs, labels) == 0.75
    assert measures.worst_class(outputs, labels) == 0.5
    right, wrong = math.log(1 + 2 * math.exp(-2)), math.log(math.exp(2) + 2)
    assert measures.cross_entropy(outputs, labels) == pytest.approx((3 * right + wrong) / 4)
    assert measures.squared_error(outputs[:, :1], labels) == pytest.approx((4 + 1 + 1 + 0) / 4)


def test_a_difference_has_an_interval_around_it_and_none_from_itself():
    labels = np.arange(200) % 2
    right, half = outputs_of(labels), outputs_of(np.where(np.arange(200) < 100, labels, 1 - labels))
    value, low, high = difference(measures.accuracy, half, right, labels, seed=1)
    assert value == -0.5
    # The standard error of a share of one half is 0.5 / sqrt(200).
    assert (low, high) == pytest.approx((-0.5 - 1.96 * 0.0354, -0.5 + 1.96 * 0.0354), abs=0.02)
    assert difference(measures.f1, half, half, labels, seed=1) == (0, 0, 0)
