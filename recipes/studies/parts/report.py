"""The report of a study: what each arm reached, how it was tuned, and where it ran."""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

from recipes.parts.markdown import table
from recipes.parts.provenance import command
from recipes.studies.parts.charts import draw
from recipes.studies.parts.comparison import difference
from recipes.studies.parts.protocol import PROTOCOLS
from recipes.studies.parts.store import Store
from recipes.studies.parts.study import Arm, Study
from smt_trainer.files import write_text


def write_report(study: Study, store: Store, folder: Path) -> None:
    """Write `<study>.md` and its picture from the results so far."""
    results = {arm: finished(arm, study.task, store) for arm in study.arms}
    if any(results.values()):
        draw(study, results, folder / f"{study.name}.png")
    write_text(folder / f"{study.name}.md", markdown(study, results, store))


def finished(arm: Arm, task: str, store: Store) -> list[dict]:
    """Return the results of the arm's final runs that are done, in the order of the seeds."""
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
        lines += [f"![{study.name}]({study.name}.png)\n", *_outcomes(done)]
    lines += [*_tuning(study, store), _circumstances([one for found in done.values() for one in found], store)]
    return "\n".join(lines)


def columns(result: dict) -> list[tuple[str, str]]:
    """Return the measures and question sets of a result, in order."""
    return [(measure, name) for measure, sets in result["means"].items() for name in sets]


def _protocol(study: Study) -> str:
    protocol = PROTOCOLS[study.task]
    judged = " and ".join(protocol.sets) or "all sets"
    steps = "steps" if any(arm.records for arm in study.arms) else f"{protocol.steps} steps"
    return (
        f"Task `{study.task}`, SmolLM2-135M-Instruct: {steps} of {protocol.batch} records, linear decay, AdamW without "
        f"weight decay, in bfloat16 but for what is trained unless said otherwise; the same records in the same order "
        f"for all arms of a seed. Full fine-tuning is in float32. Rates are tuned on validation "
        f"questions ({protocol.measure} on {judged}) with a seed of their own.\n"
    )


def _outcomes(done: dict[Arm, list[dict]]) -> Iterator[str]:
    wanted = columns(next(iter(done.values()))[0])
    headings = [f"{measure}: {name}" for measure, name in wanted]
    yield "Means over seeds ± standard deviation. Accuracies in %, losses in nats per token.\n"
    rows = []
    for arm, found in done.items():
        trained, rate = found[0].get("trained_parameters"), found[0]["run"]["rate"]
        facts = [arm.label, f"{trained:,}" if trained else "", f"{rate:g}" if rate else "", str(len(found))]
        rows.append([*facts, *(_cell(measure, name, found) for measure, name in wanted)])
    yield table("|".join(["arm", "trained", "rate", "seeds", *headings]), rows)
    first, *others = [arm for arm in done if arm.method != "none"] or [None]
    if others:
        yield f"Against {first.label} (paired by question and seed, ± 95 % interval):\n"
        yield table("|".join(["arm", *headings]), [_against(done[first], arm, done[arm], wanted) for arm in others])


def _against(first: list[dict], arm: Arm, found: list[dict], wanted: list[tuple[str, str]]) -> list[str]:
    by_seed = [{result["run"]["seed"]: result for result in each} for each in (first, found)]
    common = sorted(set.intersection(*map(set, by_seed)))
    if not common:
        return [arm.label, *("" for _ in wanted)]
    pair = [[results[seed] for seed in common] for results in by_seed]
    return [arm.label, *(_difference(measure, name, *pair) for measure, name in wanted)]


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
