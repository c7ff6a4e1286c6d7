"""Format measures: an accuracy in % with one digit, a loss with three."""

from collections.abc import Mapping

from recipes.parts import markdown
from recipes.parts.evaluation import Evaluation, paired_gain


def is_loss(measure: str) -> bool:
    """Tell whether smaller values are better; see `Task.measures`."""
    return measure.startswith("loss")


def value_text(measure: str, value: float) -> str:
    """Return the text of a mean, without its unit."""
    return f"{value:.3f}" if is_loss(measure) else f"{100 * value:.1f}"


def gain_text(measure: str, before: Evaluation, after: Evaluation) -> str:
    """Return the gain of the average of `measure` with its paired 95 % interval and unit."""
    gain, half_width = paired_gain(before.values[measure], after.values[measure])
    if is_loss(measure):
        return f"{gain:+.3f} ± {half_width:.3f} nats of {measure}"
    return f"{100 * gain:+.1f} ± {100 * half_width:.1f} points of {measure}"


def table(evaluations: Mapping[str, Evaluation]) -> str:
    """Return the means as a Markdown table: a row for each question set, the last for their unweighted average.

    Args:
        evaluations: heading of the columns ("untuned", "tuned") -> evaluation. All are on the same questions; the first
            has all measures.
    """
    some = next(iter(evaluations.values()))
    sizes = {name: len(values) for name, values in next(iter(some.values.values())).items()}
    columns = [
        (label, measure) for measure in some.values for label, each in evaluations.items() if measure in each.values
    ]
    rows = []
    for name, size in sizes.items():
        means = (value_text(measure, evaluations[label].means(measure)[name]) for label, measure in columns)
        rows.append([name, f"{size:,}", *means])
    averages = (value_text(measure, evaluations[label].average(measure)) for label, measure in columns)
    rows.append(["**average**", "", *(f"**{average}**" for average in averages)])
    return markdown.table("|".join(["set", "questions", *(f"{label}, {measure}" for label, measure in columns)]), rows)
