"""The report of a study: what each arm reached, how it was tuned, and where it ran."""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

from recipes.parts.markdown import table
from recipes.parts.provenance import command
from recipes.studies.parts.charts import draw
from recipes.studies.parts.outcomes import Outcomes
from recipes.studies.parts.protocol import PROTOCOLS
from recipes.studies.parts.store import Store
from recipes.studies.parts.study import TUNING_SEED, UNTUNED, Arm, Study
from smt_trainer.files import write_text


def write_report(study: Study, store: Store, folder: Path) -> None:
    """Write `<study>.md` and its picture from the results so far."""
    results = {arm: [store[run] for run in arm.reported(study.task, store)] for arm in study.arms}
    if any(results.values()):
        draw(study, Outcomes(results | untuned(study, store)), folder / f"{study.name}.png")
    write_text(folder / f"{study.name}.md", markdown(study, results, store))


def untuned(study: Study, store: Store) -> dict[Arm, list[dict]]:
    """Return the result of the untuned model, which other studies may have made, if this study has no such arm."""
    run = UNTUNED.untuned(study.task)
    asked = run in store and all(arm.method != "none" for arm in study.arms)
    return {UNTUNED: [store[run]]} if asked else {}


def markdown(study: Study, results: dict[Arm, list[dict]], store: Store) -> str:
    """Return the text of the report."""
    missing = sum(1 for _ in study.missing(store))
    lines = [f"# {study.name}: {study.question}\n", _protocol(study)]
    if missing:
        lines.append(f"Not finished: at least {missing} runs are missing (`python -m recipes.queue {study.name}`).\n")
    if any(results.values()):
        lines += [f"![{study.name}]({study.name}.png)\n", *_outcomes(Outcomes(results))]
    lines += [*_tuning(study, store), _circumstances([one for found in results.values() for one in found], store)]
    return "\n".join(lines)


def _protocol(study: Study) -> str:
    protocol = PROTOCOLS[study.task]
    judged = " and ".join(protocol.sets) or "all sets"
    steps = "steps" if any(arm.records for arm in study.arms) else f"{protocol.steps} steps"
    return (
        f"Task `{study.task}`, SmolLM2-135M-Instruct: {steps} of {protocol.batch} records, linear decay, AdamW without "
        "weight decay, gradients clipped at 1, in bfloat16 but for what is trained unless said otherwise; the same "
        "records in the same order for all arms of a seed. Full fine-tuning is in float32. Blocks are of 64x64 unless "
        f"said otherwise. Rates are tuned with seed {TUNING_SEED} on {protocol.validation} validation questions "
        f"({protocol.measure} on {judged}).\n"
    )


def _outcomes(outcomes: Outcomes) -> Iterator[str]:
    headings = [_heading(*column) for column in outcomes.columns]
    yield (
        f"Means over seeds ± standard deviation. Accuracies in %, losses in nats per token. {_questions(outcomes)} "
        "General text: passages of LAMBADA; science: questions of ARC-Easy. Neither is trained.\n"
    )
    rows = []
    for arm, found in outcomes.results.items():
        trained, rate = found[0].get("trained_parameters"), found[0]["run"]["rate"]
        facts = [arm.label, f"{trained:,}" if trained else "", f"{rate:g}" if rate else "", str(len(found))]
        rows.append([*facts, *(_cell(column, outcomes.means(arm, *column)) for column in outcomes.columns)])
    yield table("|".join(["arm", "trained", "rate", "seeds", *headings]), rows)
    first, *others = [arm for arm in outcomes.results if arm.method != "none"] or [None]
    if others:
        yield f"Against {first.label}, with the seeds of both (paired by template and seed, ± 95 % interval):\n"
        rows = [[arm.label, *(_difference(outcomes, first, arm, each) for each in outcomes.columns)] for arm in others]
        yield table("|".join(["arm", *headings]), rows)


def _heading(measure: str, name: str) -> str:
    if measure == "forgetting":
        return f"{name}: {'accuracy' if is_share(measure, name) else 'loss'}"
    return f"{measure}: {name}"


def _questions(outcomes: Outcomes) -> str:
    """Return a sentence on how many questions of how many templates there are in each set."""
    counts = {
        name: (len(templates), len(set(templates)))
        for (measure, name), templates in outcomes.templates.items()
        if measure == outcomes.columns[0][0]
    }
    each = [f"{asked} {name}" + f" of {kinds} templates" * (kinds < asked) for name, (asked, kinds) in counts.items()]
    return f"Questions: {', '.join(each)}. A template counts once."


def is_share(measure: str, name: str) -> bool:
    """Return whether a value is a share of 1, reported in %."""
    return measure.startswith("accuracy") or name == "science"


def _cell(column: tuple[str, str], values: list[float]) -> str:
    scale, digits = (100, 1) if is_share(*column) else (1, 3)
    spread = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{spread}"


def _difference(outcomes: Outcomes, first: Arm, second: Arm, column: tuple[str, str]) -> str:
    if not set(outcomes.seeds(first)) & set(outcomes.seeds(second)):
        return ""
    value, half_width = outcomes.difference(first, second, *column)
    scale, digits = (100, 1) if is_share(*column) else (1, 3)
    width = ", one seed" if half_width is None else f" ± {scale * half_width:.{digits}f}"
    return f"{scale * value:+.{digits}f}{width}"


def _tuning(study: Study, store: Store) -> Iterator[str]:
    yield "## Tuning\n"
    rows = []
    for arm in study.arms:
        if arm.method == "none":
            continue
        found = arm.tuning(study.task, store)
        rate = "not known yet" if found.rate is None else f"{found.rate:g}"
        if found.at_edge:
            rate += ", at the edge"
        tried = ", ".join(f"{each:g}: {loss:.3f}" for each, loss in found.losses.items())
        rows.append([arm.label, rate, f"as {arm.rate_of.label}" if arm.rate_of else tried])
    yield table("arm|rate|what tuning minimises, by rate", rows)


def _circumstances(results: list[dict], store: Store) -> str:
    rows = []
    if results:
        versions = {", ".join(f"{name} {number}" for name, number in one["versions"].items()) for one in results}
        rows += [
            ["hardware", ", ".join(sorted({result["hardware"] for result in results}))],
            ["versions", "; ".join(sorted(versions))],
            ["time of the final runs", f"{sum(result['seconds'] for result in results) / 3600:.2f} h"],
        ]
    rows += [["runs", f"[{store.path.name}]({store.path.name})"], ["command", f"`{command('recipes.studies')}`"]]
    return table("|", rows)
