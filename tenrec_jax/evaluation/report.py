"""The report of a run: `report.html`, one file that needs nothing else, and the test results as text for a console.

Nothing is measured here: every number is read from the files that the run left.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tenrec_jax import stages
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.figures import Estimate
from tenrec_jax.evaluation.page import document
from tenrec_jax.evaluation.report_sections import Run, run_sections
from tenrec_jax.evaluation.result_sections import ORACLE, index_line, scorers_of
from tenrec_jax.evaluation.stats_report import JSON_FILE
from tenrec_jax.evaluation.tables import aligned, interval
from tenrec_jax.files import read_json, write_text
from tenrec_jax.retrieval.base import TUNING_FILE
from tenrec_jax.stages import METRICS
from tenrec_jax.training.metrics_writer import TIMINGS, read_lines

HEADLINE = ("recall@10", "ndcg@10", "hit@1", "mrr")


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
    run = read_run(workdir)
    path = workdir / "report.html"
    write_text(path, document(f"Run {run.config['name']}", verdict(run.test), run_sections(run)))
    return path


def read_run(workdir: Path) -> Run:
    """The files of a finished run.

    Raises:
        UserError: one of them is missing.
    """
    names = ("config.json", "env.json", "data.json", "stages.json", "eval/val.json", "eval/test.json")
    for name in names:
        if not (workdir / name).is_file():
            raise UserError(f"{workdir / name} is missing: the run is not finished. Run its command again.")
    config, environment, data, _, validation, test = (read_json(workdir / name) for name in names)
    optional = ("eval/test_details.json", f"table/{JSON_FILE}", f"recommender/index/{TUNING_FILE}")
    details, table_stats, tuning = (
        read_json(workdir / name) if (workdir / name).is_file() else {} for name in optional
    )
    metrics, timings = (read_lines(workdir / name) for name in (METRICS, TIMINGS))
    return Run(
        config,
        environment,
        data,
        stages.read(workdir),
        validation,
        test,
        details,
        table_stats,
        tuning,
        metrics,
        timings,
    )


def results_table(test: Mapping[str, Any]) -> str:
    """The main results of `eval/test.json` as text, at most 100 characters wide."""
    synthetic = ", synthetic twin" if test["is_synthetic"] else ""
    lines = [f"test: {test['protocol']}, seed {test['seed']}, data {test['data_sha256'][:12]}{synthetic}", ""]
    scorers = scorers_of(test, "retrieval")
    rows = [[metric, *(interval(entry[metric]) for entry in scorers.values())] for metric in HEADLINE]
    lines += aligned([["retrieval", *scorers], *rows])
    rows = [["ranking", "", "auc", "gauc"]]
    for action in test.get("ranking", {}):
        for place, (name, metrics) in enumerate(scorers_of(test, "ranking", action).items()):
            rows.append(["" if place else action, name, interval(metrics["auc"]), interval(metrics["gauc"])])
    lines += ["", *(aligned(rows) if "ranking" in test else ["ranking: this run has no ranker"])]
    return "\n".join([*lines, "", f"index: {index_line(test)}"])


def comparisons(test: Mapping[str, Any]) -> list[Comparison]:
    """Recall@10 and NDCG@10 of retrieval, AUC and GAUC of each action, each against every baseline."""
    parts = [("", ("recall@10", "ndcg@10"), scorers_of(test, "retrieval"))]
    parts += [
        (f"{action} ", ("auc", "gauc"), scorers_of(test, "ranking", action)) for action in test.get("ranking", {})
    ]
    found = []
    for prefix, metrics, scorers in parts:
        (_, model), *baselines = ((name, entry) for name, entry in scorers.items() if name != ORACLE)
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
