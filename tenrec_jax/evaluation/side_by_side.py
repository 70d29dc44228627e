"""Several runs on one page: a file that needs nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.figures import figures, interval_plot
from tenrec_jax.evaluation.page import bullets, document, heading, paragraph, table
from tenrec_jax.evaluation.report import read_run, verdict
from tenrec_jax.evaluation.report_sections import Run
from tenrec_jax.evaluation.result_sections import RANKING_METRICS
from tenrec_jax.evaluation.tables import interval, number
from tenrec_jax.files import flat, write_text

MUST_AGREE = ("protocol", "data_sha256", "split_sha256")


def write_side_by_side(workdirs: Sequence[Path], out: Path) -> Path:
    """Write one page of several runs, and return its path.

    Raises:
        UserError: a run is not finished, or named twice.
    """
    names = [str(workdir) for workdir in workdirs]
    if len(set(names)) < len(names):
        raise UserError(f"A run is named twice: {', '.join(names)}.")
    runs = dict(zip(names, map(read_run, workdirs), strict=True))
    different = [key for key in MUST_AGREE if len({run.test[key] for run in runs.values()}) > 1]
    if different:
        first = f"The runs differ in {', '.join(different)}: their numbers cannot be compared."
    else:
        first = (
            "The runs have the same rows and protocol. tenrec-jax compare says which of two runs' differences are real."
        )
    sections = {
        "Runs": _runs(runs) + bullets([f"{name}: {verdict(run.test)}" for name, run in runs.items()]),
        "Retrieval": _metrics("retrieval", {name: run.test["retrieval"] for name, run in runs.items()}),
        "Ranking": _ranking(runs),
        "Both stages together": _both(runs),
        "Settings that differ": _settings(runs),
    }
    write_text(out, document(f"{len(runs)} runs", first, sections))
    return out


def _runs(runs: Mapping[str, Run]) -> str:
    rows = [
        [
            name,
            run.test["protocol"],
            str(run.test["seed"]),
            run.test["data_sha256"][:12],
            run.test["split_sha256"][:12],
            f"{run.test['counts']['users']:,}",
            f"{sum(stage['seconds'] for stage in run.stages.values()):,.0f}",
        ]
        for name, run in runs.items()
    ]
    return table("Test rows", ["run", "protocol", "seed", "data", "split", "users", "seconds"], rows)


def _metrics(title: str, results: Mapping[str, Mapping[str, Any]], names: Sequence[str] = ()) -> str:
    names = names or list(dict.fromkeys(name for metrics in results.values() for name in metrics))
    rows = [[name, *(interval(m[name]) if name in m else "–" for m in results.values())] for name in names]
    return table(f"{title}, with 95 % intervals", ["metric", *results], rows)


def _ranking(runs: Mapping[str, Run]) -> str:
    ranked = {name: run.test["ranking"] for name, run in runs.items() if "ranking" in run.test}
    if not ranked:
        return paragraph("None of the runs has a ranker.")
    markup = ""
    actions = list(dict.fromkeys(action for ranking in ranked.values() for action in ranking))
    for action in actions:
        having = {name: ranking[action] for name, ranking in ranked.items() if action in ranking}
        markup += heading(action) + _metrics(action, having, RANKING_METRICS)
    shared = [action for action in actions if all(action in ranking for ranking in ranked.values())]
    series = {name: {action: ranking[action]["auc"] for action in shared} for name, ranking in ranked.items()}
    return markup + figures(
        interval_plot("auc", "AUC with 95 % intervals; the dotted line is chance", series, mark=0.5)
    )


def _both(runs: Mapping[str, Run]) -> str:
    found = {name: run.test["two_stage"] for name, run in runs.items() if "two_stage" in run.test}
    if not found:
        return paragraph("None of the runs measured both stages together.")
    ways = next(iter(found.values()))["recall"]
    rows = [
        [way, *(interval(entry["recall"][way]) if entry["recall"].get(way) else "–" for entry in found.values())]
        for way in ways
    ]
    rows += [
        [f"{stage}, ms", *(number(entry["milliseconds"][stage]) for entry in found.values())]
        for stage in next(iter(found.values()))["milliseconds"]
    ]
    return table("Share of the clicked items, and time of one user", ["", *found], rows)


def _settings(runs: Mapping[str, Run]) -> str:
    settings = {name: flat(run.config) for name, run in runs.items()}
    keys = list(dict.fromkeys(key for values in settings.values() for key in values))
    shown = {key: [repr(values.get(key, "(absent)")) for values in settings.values()] for key in keys}
    rows = [[key, *values] for key, values in shown.items() if len(set(values)) > 1]
    return table("Settings", ["setting", *runs], rows) if rows else paragraph("All settings are equal.")
