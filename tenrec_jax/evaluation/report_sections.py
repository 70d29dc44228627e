"""The sections of a run's report on what was run and what it is worth, each from what the run's files say."""

import json
import shlex
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from tenrec_jax.evaluation.figures import figures, learning_curve
from tenrec_jax.evaluation.page import bullets, facts, folded, paragraph, table
from tenrec_jax.evaluation.result_sections import index_search, ranking, retrieval, slices, two_stage
from tenrec_jax.evaluation.tables import number, percent

FEW_POSITIVES = 50


class Run(NamedTuple):
    """The files of a workdir, read; `details`, `table_stats` and `tuning` (of the index) are empty where there are none."""

    config: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    stages: dict[str, Any]
    validation: dict[str, Any]
    test: dict[str, Any]
    details: dict[str, Any]
    table_stats: dict[str, Any]
    tuning: dict[str, Any]
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]


def run_sections(run: Run) -> dict[str, str]:
    """The sections by heading."""
    return {
        "What was run": _what_was_run(run),
        "Data": _data(run),
        "Retrieval": retrieval(run.test, run.validation),
        "Ranking": ranking(run.test, run.validation, run.details),
        "Both stages together": two_stage(run.test),
        "By kind of user and item": slices(run.details),
        "Index": index_search(run.test, run.tuning),
        "Learning curves": _learning(run),
        "Speed": _speed(run),
        "Limits and warnings": bullets([*_warnings(run), *_limits(run)]),
        "Configuration": folded("All settings", json.dumps(run.config, indent=2, ensure_ascii=False)),
    }


def _what_was_run(run: Run) -> str:
    test, environment = run.test, run.environment
    versions = {"python": environment["python"], **environment["code"]}
    values = {
        "Command": shlex.join(environment["command"]),
        "Protocol": test["protocol"],
        "Seed": test["seed"],
        "Data hash": test["data_sha256"],
        "Split hash": test["split_sha256"],
        **_selection(test),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Devices": ", ".join(environment["devices"]),
        "Platform": environment["platform"],
    }
    rows = [[stage, f"{record['seconds']:,.2f}"] for stage, record in run.stages.items()]
    return facts(values) + table("Time by stage", ["stage", "seconds"], rows)


def _data(run: Run) -> str:
    data, manifest = run.data, run.data["manifest"]
    counts, actions = manifest["counts"], manifest["actions"]
    values = {"Source": data["source"], "Kind": manifest["log_kind"]}
    values["Origin"] = "synthetic twin" if data["is_synthetic"] else "real log"
    # Beside rows, users and items the counts tell what is odd about the log.
    values |= {key.replace("_", " ").capitalize(): f"{counts[key]:,}" for key in counts if key not in actions}
    values |= {f"Rows, {part}": f"{rows:,}" for part, rows in data["rows"].items()}
    values["Users left out"] = f"{data['users_left_out']:,}"
    rows = [[action, f"{counts[action]:,}", percent(counts[action] / counts["rows"])] for action in actions]
    return facts(values) + table("Actions", ["action", "rows", "share of all rows"], rows)


def _learning(run: Run) -> str:
    rows, plots = [], []
    for place, (stage, metrics) in enumerate(_by_stage(run.metrics).items()):
        rows += [[f"{stage} {key}", f"{(last := max(curve)):,}", number(curve[last])] for key, curve in metrics.items()]
        groups: dict[str, dict[str, dict[int, float]]] = {"loss": {}, "norms": {}, "validation metrics": {}}
        for key, curve in metrics.items():
            if not key.endswith("learning_rate"):
                kind = "validation metrics" if key.startswith("validation/") else "loss"
                groups["norms" if key.endswith("_norm") else kind][key] = curve
        for title, chosen in groups.items():
            if chosen:
                plots.append(learning_curve(f"learning{place}-{title[:4]}", f"{stage}: {title} by step", chosen))
    if not rows:
        return paragraph("metrics.jsonl holds no line.")
    return table("Last values", ["metric", "step", "value"], rows) + figures(*plots)


def _speed(run: Run) -> str:
    """What each stage's windows of steps tell: in the middle, and at the end."""
    rows = [
        [f"{stage} {key}", _figure(median(curve.values())), _figure(curve[max(curve)])]
        for stage, timings in _by_stage(run.timings).items()
        for key, curve in timings.items()
    ]
    training = (
        table("By windows of steps", ["figure", "median", "last"], rows)
        if rows
        else paragraph("timings.jsonl holds no line.")
    )
    evaluation = [[key.replace("_", " "), _figure(value)] for key, value in run.test.get("speed", {}).items()]
    return training + (table("Evaluation of the test rows", ["figure", "value"], evaluation) if evaluation else "")


def _by_stage(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """The curves of each stage: name -> step -> value."""
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for line in lines:
        for key in sorted(line.keys() - {"stage", "step"}):
            curves.setdefault(line["stage"], {}).setdefault(key, {})[line["step"]] = line[key]
    return curves


def _limits(run: Run) -> list[str]:
    users, left_out, unused = run.test["counts"]["users"], run.data["users_left_out"], run.data["rows"]["none"]
    lines = ["One seed: the intervals tell how the choice of users matters, not how the seed does."]
    lines.append("Intervals that overlap do not show that two scorers are equally good.")
    if run.test["is_synthetic"]:
        lines.append("The log is synthetic: the numbers show that the system works, not how good it is on real users.")
    lines.append(f"Retrieval is measured on {users:,} of {run.data['manifest']['counts']['users']:,} users.")
    if left_out or unused:
        lines.append(f"The protocol leaves out {left_out:,} users (too few clicks) and {unused:,} rows.")
    ranking = run.test.get("ranking", {})
    if ranking:
        shares = ", ".join(f"{action} {percent(entry['gauc_coverage'])}" for action, entry in ranking.items())
        lines.append(f"GAUC rests on users who have both labels. Their share of the test rows: {shares}.")
        lines.append("ECE grows with noise, and resampling adds noise: its interval may lie above its value.")
    else:
        lines.append("Without a ranker the final order is that of retrieval.")
    few = [
        f"{action} ({entry['positives']})" for action, entry in ranking.items() if entry["positives"] < FEW_POSITIVES
    ]
    if few:
        lines.append(f"Fewer than {FEW_POSITIVES} positive test rows, too few for a conclusion: {', '.join(few)}.")
    lines.append("n/a stands for a number that is not defined on these rows, or infinite.")
    return [*lines, "A stage that was resumed shows the seconds of its last part; the command is the latest one."]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _selection(test: Mapping[str, Any]) -> dict[str, str]:
    """How the run chose, and when it read its test rows."""
    chosen = {f"Choice of {stage}": how for stage, how in test.get("selection", {}).items()}
    if "test_opened" in test:
        chosen["Test rows read"] = ", ".join(reading["at"] for reading in test["test_opened"]["readings"])
    return chosen


def _warnings(run: Run) -> list[str]:
    """What weakens this run in particular: leaks, readings of the test part, and what was skipped."""
    lines = []
    opened = run.test.get("test_opened")
    if opened is None:
        lines.append("This run did not record when its test rows were read.")
    elif opened["times"] > 1:
        times = ", ".join(reading["at"] for reading in opened["readings"])
        lines.append(f"WARNING: the test rows were read {opened['times']} times: {times}.")
    if not run.table_stats:
        lines.append(
            "Leaks were not looked for: run tenrec-jax stats on the table folder of this run, then make this report again."
        )
    elif run.table_stats["flagged_columns"]:
        flagged = ", ".join(run.table_stats["flagged_columns"])
        lines.append(f"WARNING: columns that give the label away, and must not be inputs: {flagged}.")
    else:
        lines.append("No column of the log gives the label away (tenrec-jax stats).")
    for change in run.test.get("changes_while_running", []):
        kept, changed = ", ".join(change["kept"]) or "none", "; ".join(line.strip() for line in change["changed"])
        lines.append(f"WARNING: the run was changed on the way, after the stages: {kept}. What changed: {changed}.")
    lines += [f"Skipped: {reason}." for reason in run.test.get("skipped", [])]
    return lines
