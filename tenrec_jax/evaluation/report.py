"""The report of a run: `report.html`, one file that needs nothing else, and the test results as text for a console.

Nothing is measured here: every number is read from the files that the run left.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.figures import Estimate, can_draw, interval_plot, learning_curve, recall_curve
from tenrec_jax.evaluation.page import bullets, document, facts, folded, heading, paragraph, table
from tenrec_jax.evaluation.tables import aligned, number
from tenrec_jax.files import read_json, write_text
from tenrec_jax.training.metrics_writer import METRICS, TIMINGS, read_lines

HEADLINE = ("recall@10", "ndcg@10", "hit@1", "mrr")
RANKING_METRICS = ("auc", "gauc", "log_loss", "ece", "pcoc")
FEW_POSITIVES = 50


class Run(NamedTuple):
    """The files of a workdir, read."""

    config: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    stages: dict[str, Any]
    validation: dict[str, Any]
    test: dict[str, Any]
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]


class Comparison(NamedTuple):
    """The model beside a baseline in one metric: `standing` is above, overlap, below or undefined."""

    metric: str
    baseline: str
    standing: str


def write_report(workdir: Path) -> Path:
    """Write `report.html` from what a run left in its workdir.

    Returns:
        The path of the report.

    Raises:
        UserError: a file of the run is missing.
    """
    names = ("config.json", "env.json", "data.json", "stages.json", "eval/val.json", "eval/test.json")
    for name in names:
        if not (workdir / name).is_file():
            raise UserError(f"{workdir / name} is missing: the run is not finished. Run its command again.")
    config, environment, data, stages, validation, test = (read_json(workdir / name) for name in names)
    lines = (read_lines(workdir / name) for name in (METRICS, TIMINGS))
    run = Run(config, environment, data, stages, validation, test, *lines)
    sections = {
        "What was run": _what_was_run(run),
        "Data": _data(run),
        "Retrieval": _retrieval(run),
        "Ranking": _ranking(run),
        "Index": paragraph(f"Search over the item vectors: {_index(run.test)}."),
        "Learning curves": _learning(run),
        "Speed": _speed(run),
        "Limits and warnings": bullets(_limits(run)),
        "Configuration": folded("All settings", json.dumps(run.config, indent=2, ensure_ascii=False)),
    }
    path = workdir / "report.html"
    write_text(path, document(f"Run {run.config['name']}", verdict(run.test), sections))
    return path


def results_table(test: Mapping[str, Any]) -> str:
    """The main results of `eval/test.json` as text, at most 100 characters wide."""
    synthetic = ", synthetic twin" if test["is_synthetic"] else ""
    lines = [f"test: {test['protocol']}, seed {test['seed']}, data {test['data_sha256'][:12]}{synthetic}", ""]
    scorers = _scorers(test, "retrieval")
    lines += aligned([["retrieval", *scorers], *([metric, *_cells(scorers, metric)] for metric in HEADLINE)])
    rows = [["ranking", "", "auc", "gauc"]]
    for action in test.get("ranking", {}):
        for place, (name, metrics) in enumerate(_scorers(test, "ranking", action).items()):
            rows.append(["" if place else action, name, _interval(metrics["auc"]), _interval(metrics["gauc"])])
    lines += ["", *(aligned(rows) if "ranking" in test else ["ranking: this run has no ranker"])]
    return "\n".join([*lines, "", f"index: {_index(test)}"])


def comparisons(test: Mapping[str, Any]) -> list[Comparison]:
    """Recall@10 and NDCG@10 of retrieval, AUC and GAUC of each action, each against every baseline."""
    parts = [("", ("recall@10", "ndcg@10"), _scorers(test, "retrieval"))]
    parts += [(f"{action} ", ("auc", "gauc"), _scorers(test, "ranking", action)) for action in test.get("ranking", {})]
    found = []
    for prefix, metrics, scorers in parts:
        (_, model), *baselines = scorers.items()
        for metric in metrics:
            found += [Comparison(prefix + metric, name, _standing(model[metric], b[metric])) for name, b in baselines]
    return found


def verdict(test: Mapping[str, Any]) -> str:
    """One sentence: where the model is above its baselines with 95 % intervals that do not overlap, and where not."""
    found = comparisons(test)
    rows = "synthetic test rows" if test["is_synthetic"] else "the test rows"
    above = sum(comparison.standing == "above" for comparison in found)
    if above == len(found):
        return f"On {rows} the model is above every baseline in each of {above} comparisons, and no 95 % intervals overlap."
    words = {"overlap": "the 95 % intervals overlap", "below": "it is below", "undefined": "no interval is defined"}
    rest = [
        f"{text} in {', '.join(names)}"
        for standing, text in words.items()
        if (names := [f"{c.metric} against {c.baseline}" for c in found if c.standing == standing])
    ]
    start = f"On {rows} the model is above its baseline, intervals apart, in {above} of {len(found)} comparisons"
    return f"{start}; {'; '.join(rest)}."


def _standing(model: Estimate, baseline: Estimate) -> str:
    low, high, floor, ceiling = model["low"], model["high"], baseline["low"], baseline["high"]
    if low is None or high is None or floor is None or ceiling is None:
        return "undefined"
    return "above" if low > ceiling else "below" if high < floor else "overlap"


def _scorers(results: Mapping[str, Any], stage: str, action: str = "") -> dict[str, Mapping[str, Any]]:
    """Metrics by scorer, the model first: of retrieval, or of one action."""
    found = {"ranker" if action else "model": results[stage]}
    found |= {name.replace("_", " "): entry[stage] for name, entry in results["baselines"].items() if stage in entry}
    return {name: entry[action] for name, entry in found.items()} if action else found


def _what_was_run(run: Run) -> str:
    test, environment = run.test, run.environment
    versions = {"python": environment["python"], **environment["packages"]}
    values = {
        "Command": shlex.join(environment["command"]),
        "Protocol": test["protocol"],
        "Seed": test["seed"],
        "Data hash": test["data_sha256"],
        "Split hash": test["split_sha256"],
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Devices": ", ".join(environment["devices"]),
        "Platform": environment["platform"],
    }
    rows = [[stage, f"{record['seconds']:,.2f}"] for stage, record in run.stages.items()]
    return facts(values) + table("Time by stage", ["stage", "seconds"], rows)


def _data(run: Run) -> str:
    data, manifest = run.data, run.data["manifest"]
    counts, actions = manifest["counts"], manifest["actions"]
    values = {"Source": data["source"], "Kind": manifest["kind"]}
    values["Origin"] = "synthetic twin" if data["is_synthetic"] else "real log"
    # Beside rows, users and items the counts tell what is odd about the log.
    values |= {key.replace("_", " ").capitalize(): f"{counts[key]:,}" for key in counts if key not in actions}
    values |= {f"Rows, {part}": f"{rows:,}" for part, rows in data["rows"].items()}
    values["Users left out"] = f"{data['users_left_out']:,}"
    rows = [[action, f"{counts[action]:,}", _percent(counts[action] / counts["rows"])] for action in actions]
    return facts(values) + table("Actions", ["action", "rows", "share of all rows"], rows)


def _retrieval(run: Run) -> str:
    scorers, counts = _scorers(run.test, "retrieval"), run.test["counts"]
    columns = scorers | {"model, validation": run.validation["retrieval"]}
    rows = [[metric, *_cells(columns, metric)] for metric in run.test["retrieval"]]
    caption = f"Test rows of {counts['users']:,} users, ranking {counts['catalogue']:,} items"
    at_10 = {name: {"recall@10": metrics["recall@10"]} for name, metrics in scorers.items()}
    curves = {
        name: {int(key.removeprefix("recall@")): metrics[key] for key in metrics if key.startswith("recall@")}
        for name, metrics in scorers.items()
    }
    hint = "" if can_draw() else paragraph("Figures need matplotlib: pip install 'tenrec_jax[plot]' shows them.")
    return (
        paragraph("In brackets: 95 % interval, from a bootstrap over users.")
        + table(caption, ["metric", *columns], rows)
        + hint
        + _side_by_side(
            interval_plot("recall", "Recall@10 with 95 % intervals", at_10),
            recall_curve("curve", "Recall@k by the length k of the list, with 95 % intervals", curves),
        )
    )


def _ranking(run: Run) -> str:
    if "ranking" not in run.test:
        return paragraph("This run has no ranker.")
    markup, scorers = "", {action: _scorers(run.test, "ranking", action) for action in run.test["ranking"]}
    for action, entry in run.test["ranking"].items():
        columns = scorers[action] | {"ranker, validation": run.validation["ranking"][action]}
        rows = [[metric, *_cells(columns, metric)] for metric in RANKING_METRICS]
        caption = (
            f"{action}: {entry['positives']:,} positives in {entry['rows']:,} test rows of {entry['users']:,} users"
        )
        markup += heading(action) + table(caption, ["metric", *columns], rows)
    plots = []
    for metric in ("auc", "gauc"):
        names = next(iter(scorers.values()))
        series = {name: {action: scorers[action][name][metric] for action in scorers} for name in names}
        title = f"{metric.upper()} with 95 % intervals; the dotted line is chance"
        plots.append(interval_plot(metric, title, series, mark=0.5))
    return markup + paragraph("–: popularity orders items and predicts no probability.") + _side_by_side(*plots)


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
    return table("Last values", ["metric", "step", "value"], rows) + _side_by_side(*plots)


def _speed(run: Run) -> str:
    """What each stage's windows of steps tell: in the middle, and at the end."""
    rows = [
        [f"{stage} {key}", _figure(median(curve.values())), _figure(curve[max(curve)])]
        for stage, timings in _by_stage(run.timings).items()
        for key, curve in timings.items()
    ]
    if not rows:
        return paragraph("timings.jsonl holds no line.")
    return table("By windows of steps", ["figure", "median", "last"], rows)


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
        shares = ", ".join(f"{action} {_percent(entry['gauc_coverage'])}" for action, entry in ranking.items())
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


def _index(test: Mapping[str, Any]) -> str:
    index = test["index"]
    recalls = [f"{key.removesuffix('_vs_exact')} {number(index[key])}" for key in index if key.endswith("_vs_exact")]
    size = f"{index['items']:,} items, {index['queries']:,} queries"
    return f"{index['kind']}, {', '.join(recalls)} against exact search ({size})"


def _side_by_side(*plots: str) -> str:
    return f'<div class="figures">\n{"".join(plots)}</div>\n' if any(plots) else ""


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.2f} %"


def _interval(estimate: Estimate) -> str:
    if estimate["value"] is None:
        return "n/a"
    return f"{number(estimate['value'])} [{number(estimate['low'])}, {number(estimate['high'])}]"


def _cells(scorers: Mapping[str, Mapping[str, Any]], metric: str) -> list[str]:
    return [_interval(metrics[metric]) if metric in metrics else "–" for metrics in scorers.values()]
