"""The report of a study: what each arm reached, how it was tuned, and where it ran."""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

from recipes.parts.reporting import command
from recipes.studies.parts.charts import draw
from recipes.studies.parts.comparison import difference
from recipes.studies.parts.store import Store
from recipes.studies.parts.study import PROTOCOLS, Arm, Study
from smt_trainer.files import write_text


def write_report(study: Study, store: Store, folder: Path) -> None:
    """Write `<study>.md` and its picture from the results so far."""
    results = {arm: finished(arm, study.task, store) for arm in study.arms}
    if any(results.values()):
        draw(study, results, folder / f"{study.name}.png")
    write_text(folder / f"{study.name}.md", markdown(study, results, store))


def finished(arm: Arm, task: str, store: Store) -> list[dict]:
    """Return the results of the arm's final runs that are there, in the order of the seeds."""
    if arm.method == "none":
        runs = [arm.untuned(task)]
    else:
        rate = arm.tuning(task, store).rate
        runs = [] if rate is None else arm.final(task, rate)
    return [store[run] for run in runs if run in store]


def markdown(study: Study, results: dict[Arm, list[dict]], store: Store) -> str:
    """Return the text of the report."""
    missing = sum(1 for _ in study.missing(store))
    lines = [f"# {study.name}: {study.question}\n", _protocol(study)]
    if missing:
        lines.append(f"Not finished: at least {missing} runs are missing (`python -m recipes.queue {study.name}`).\n")
    done = {arm: found for arm, found in results.items() if found}
    if done:
        lines += [f"![{study.name}]({study.name}.png)\n", *_outcomes(done), ""]
    lines += [*_tuning(study, store), "", *_circumstances(list(done.values()), store)]
    return "\n".join(lines) + "\n"


def columns(result: dict) -> list[tuple[str, str]]:
    """Return the measures and question sets of a result, in order."""
    return [(measure, name) for measure, sets in result["means"].items() for name in sets]


def _protocol(study: Study) -> str:
    steps, batch, measure, sets = PROTOCOLS[study.task]
    judged = " and ".join(sets) or "all sets"
    return (
        f"Task `{study.task}`, SmolLM2-135M-Instruct: {steps} steps of {batch} records, linear decay, AdamW without "
        f"weight decay, the same records in the same order for all arms of a seed. Rates are tuned on validation "
        f"questions ({measure} on {judged}) with a seed of their own.\n"
    )


def _outcomes(done: dict[Arm, list[dict]]) -> Iterator[str]:
    wanted = columns(next(iter(done.values()))[0])
    yield "Means over seeds ± standard deviation. Accuracies in %, losses in nats per token.\n"
    yield "| arm | trained | rate | seeds | " + " | ".join(f"{measure}: {name}" for measure, name in wanted) + " |"
    yield "|---|---:|---:|---:|" + "---:|" * len(wanted)
    for arm, found in done.items():
        trained, rate = found[0].get("trained_parameters"), found[0]["run"]["rate"]
        cells = [_cell(measure, name, found) for measure, name in wanted]
        facts = [arm.label, f"{trained:,}" if trained else "", f"{rate:g}" if rate else "", str(len(found))]
        yield "| " + " | ".join([*facts, *cells]) + " |"
    trained_arms = [arm for arm in done if arm.method != "none"]
    if len(trained_arms) < 2:
        return
    first, *others = trained_arms
    yield f"\nAgainst {first.label} (paired by question and seed, ± 95 % interval):\n"
    yield "| arm | " + " | ".join(f"{measure}: {name}" for measure, name in wanted) + " |"
    yield "|---|" + "---:|" * len(wanted)
    for arm in others:
        seeds = min(len(done[first]), len(done[arm]))
        cells = [_difference(measure, name, done[first][:seeds], done[arm][:seeds]) for measure, name in wanted]
        yield "| " + " | ".join([arm.label, *cells]) + " |"


def is_share(measure: str, name: str) -> bool:
    """Return whether a value is a share of 1, reported in %."""
    return measure.startswith("accuracy") or name == "science"


def _cell(measure: str, name: str, found: list[dict]) -> str:
    values = [result["means"][measure][name] for result in found]
    scale, digits = (100, 1) if is_share(measure, name) else (1, 3)
    spread = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{spread}"


def _difference(measure: str, name: str, first: list[dict], second: list[dict]) -> str:
    rows = ([result["values"][measure][name] for result in each] for each in (first, second))
    value, half_width = difference(*rows)
    scale, digits = (100, 1) if is_share(measure, name) else (1, 3)
    return f"{scale * value:+.{digits}f} ± {scale * half_width:.{digits}f}"


def _tuning(study: Study, store: Store) -> Iterator[str]:
    yield "## Tuning\n"
    yield "| arm | rate | what tuning minimises, by rate |"
    yield "|---|---:|---|"
    for arm in study.arms:
        if arm.method == "none":
            continue
        found = arm.tuning(study.task, store)
        rate = "not known yet" if found.rate is None else f"{found.rate:g}"
        if found.at_edge:
            rate += ", at the edge"
        if arm.rate_of is not None:
            yield f"| {arm.label} | {rate} | as {arm.rate_of.label} |"
        else:
            losses = ", ".join(f"{each:g}: {loss:.3f}" for each, loss in found.losses.items())
            yield f"| {arm.label} | {rate} | {losses} |"


def _circumstances(groups: list[list[dict]], store: Store) -> Iterator[str]:
    results = [result for group in groups for result in group]
    yield "| | |"
    yield "|---|---|"
    if results:
        yield f"| hardware | {', '.join(sorted({result['hardware'] for result in results}))} |"
        versions = sorted({", ".join(f"{k} {v}" for k, v in result["versions"].items()) for result in results})
        yield f"| versions | {'; '.join(versions)} |"
        yield f"| time of the final runs | {sum(result['seconds'] for result in results) / 3600:.2f} h |"
    yield f"| runs | [{store.path.name}]({store.path.name}) |"
    yield f"| command | `{command('recipes.studies')}` |"
