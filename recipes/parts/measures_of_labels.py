"""Measures of predicted labels. N examples, C classes; the outputs z are [N, C] or, for a regression, [N, 1].

Predicted class: argmax of z. With n_tp, n_fp, n_fn, n_tn the numbers of true and false positives and
negatives of class 1,

    F1       = 2 n_tp / (2 n_tp + n_fp + n_fn)
    Matthews = (n_tp n_tn - n_fp n_fn) / sqrt((n_tp + n_fp) (n_tp + n_fn) (n_tn + n_fp) (n_tn + n_fn)), and 0 for 0 / 0
    Pearson  = covariance / product of the standard deviations;   Spearman = Pearson of the ranks, means for ties
    loss     = mean cross-entropy in nats, or mean squared error
"""

from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata

# Outputs [N, C] and labels [N] -> value.
Measure = Callable[[np.ndarray, np.ndarray], float]


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of examples whose class is predicted correctly."""
    return float((outputs.argmax(1) == labels).mean())


def worst_class(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the accuracy on the examples of the class where it is lowest (SPSFT, table 1)."""
    right = outputs.argmax(1) == labels
    return float(min(right[labels == label].mean() for label in np.unique(labels)))


def f1(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the harmonic mean of precision and recall of class 1; 0 if neither labels nor predictions have it."""
    true_positive, false_positive, false_negative, _ = _counts(outputs, labels)
    return 2 * true_positive / max(1, 2 * true_positive + false_positive + false_negative)


def matthews(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return Matthews' correlation of predicted and true class, for two classes."""
    tp, fp, fn, tn = _counts(outputs, labels)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / product**0.5 if product else 0.0


def pearson(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the correlation of the outputs and the labels; 0 if either is constant."""
    return _correlation(outputs[:, 0], labels)


def spearman(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the correlation of the ranks of outputs and labels; 0 if either is constant."""
    return _correlation(rankdata(outputs[:, 0]), rankdata(labels))


def cross_entropy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean negative log-likelihood of the right class."""
    outputs = outputs.astype(np.float64)
    outputs = outputs - outputs.max(1, keepdims=True)
    return float((np.log(np.exp(outputs).sum(1)) - outputs[np.arange(len(labels)), labels]).mean())


def squared_error(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean squared error of a regression."""
    return float(np.square(outputs[:, 0].astype(np.float64) - labels).mean())


def _counts(outputs: np.ndarray, labels: np.ndarray) -> list[int]:
    predicted, true = outputs.argmax(1) == 1, labels == 1
    return [int(pair.sum()) for pair in (predicted & true, predicted & ~true, ~predicted & true, ~predicted & ~true)]


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    first, second = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (first, second))
    product = float(np.sqrt(np.square(first).sum() * np.square(second).sum()))
    return float(first @ second) / product if product else 0.0
