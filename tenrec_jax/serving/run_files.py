"""What a run left beside its recommender: the curves of its training, and its results."""

import json
from pathlib import Path
from typing import Any

from tenrec_jax.files import read_json
from tenrec_jax.stages import METRICS

RESULTS, MAX_POINTS = Path("eval", "test.json"), 500


def run_of(recommender: Path) -> dict[str, Any] | None:
    """The run in whose folder a recommender lies, as `RunAnswer` has it; None where it lies in none.

    Raises:
        UserError: a file of the run is damaged.
    """
    workdir = recommender.parent
    if not (workdir / METRICS).is_file():
        return None
    results = workdir / RESULTS
    return {
        "name": workdir.name,
        "curves": _curves(workdir / METRICS),
        "results": read_json(results) if results.is_file() else None,
    }


def _curves(path: Path) -> list[dict[str, Any]]:
    curves: dict[tuple[str, str], dict[str, Any]] = {}
    # A run that goes on may be writing the last line.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    for line in map(json.loads, lines):
        stage, step = line.pop("stage"), line.pop("step")
        for metric, value in line.items():
            curve = curves.setdefault((stage, metric), {"stage": stage, "metric": metric, "steps": [], "values": []})
            curve["steps"].append(step)
            curve["values"].append(value)
    return [curve | {key: _thinned(curve[key]) for key in ("steps", "values")} for curve in curves.values()]


def _thinned(points: list[Any]) -> list[Any]:
    """Every n-th, so that a page can draw them, and the last."""
    every = -(-len(points) // MAX_POINTS)
    return points[::-1][::every][::-1]
