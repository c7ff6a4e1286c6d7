"""Bootstrap interval of a difference between two models, for measures that are not means over examples, such as F1.

Both models predict the same N examples. B times, draw N of them with replacement and measure both models on the draw;
the interval holds the middle 95 % of the B differences. It does not cover other seeds of training.
"""

import numpy as np

from recipes.parts.measures_of_labels import Measure

DRAWS = 1000


def difference(
    measure: Measure, outputs: np.ndarray, reference: np.ndarray, labels: np.ndarray, seed: int
) -> tuple[float, float, float]:
    """Return the measure of `outputs` minus that of `reference`, and the ends of the 95 % interval.

    Args:
        outputs, reference: [N, C], outputs of two models for the same examples.
        labels: [N].
    """
    generator = np.random.default_rng(seed)
    draws = (generator.integers(len(labels), size=len(labels)) for _ in range(DRAWS))
    differences = [measure(outputs[draw], labels[draw]) - measure(reference[draw], labels[draw]) for draw in draws]
    low, high = np.quantile(differences, [0.025, 0.975])
    return measure(outputs, labels) - measure(reference, labels), float(low), float(high)
