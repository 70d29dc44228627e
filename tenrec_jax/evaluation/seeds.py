"""One configuration trained from several seeds: the mean of each metric over the runs, and its spread.

An interval of one run says how the choice of users matters; the spread over seeds says how the luck of training does. A difference that
is smaller than the spread is none.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.results import SAMPLED
from tenrec_jax.evaluation.scorers import BOTH, MODEL
from tenrec_jax.evaluation.tables import aligned, number
from tenrec_jax.files import flat, json_text, read_json
from tenrec_jax.provenance import CONFIG

RETRIEVAL = "retrieval"
RESULTS = {"test": "eval/test.json", "validation": "eval/val.json"}
MUST_AGREE = ("protocol", "data_sha256", "split_sha256")
# Of a configuration, what may differ between the runs.
MAY_DIFFER = ("name", "seed")
EXAMPLES = """examples:
  tenrec-jax seeds runs/seed0 runs/seed1 runs/seed2
  tenrec-jax seeds runs/seed* --part validation --json
"""


@dataclass(frozen=True)
class Spread:
    """One metric over runs, of the model or of a baseline, by name."""

    scorer: str
    metric: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the runs."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        """The sample standard deviation."""
        return float(np.std(self.values, ddof=1))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"mean": self.mean, "deviation": self.deviation}


def over_seeds(runs: Sequence[Path], part: str = "test") -> list[Spread]:
    """Every metric that all runs have.

    Args:
        runs: workdirs of finished runs, at least two, that differ in nothing but seed and name.
        part: "test" or "validation".

    Raises:
        UserError: a run is not finished, or the runs differ in more, which is named.
    """
    if len(runs) < 2:
        raise UserError("A spread over seeds takes at least two runs.")
    results = [_read(run / RESULTS[part]) for run in runs]
    first, *others = (_what_must_agree(run, result) for run, result in zip(runs, results, strict=True))
    for run, other in zip(runs[1:], others, strict=True):
        problems = [
            f"{key}: {first.get(key)} in {runs[0]}, {other.get(key)} in {run}"
            for key in sorted({*first, *other})
            if first.get(key) != other.get(key)
        ]
        if problems:
            raise UserError("These runs are not one configuration from several seeds:\n  " + "\n  ".join(problems))
    seeds = [result["seed"] for result in results]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"The runs' seeds are {seeds}: the same seed gives the same run, and no spread.")
    found = [_metrics(result) for result in results]
    common = [key for key in found[0] if all(key in metrics for metrics in found)]
    return [Spread(*key, tuple(metrics[key] for metrics in found)) for key in common]


def text(spreads: Sequence[Spread], runs: Sequence[Path]) -> str:
    """A table for a console."""
    header = ["", "metric", "mean", "deviation", *(run.name for run in runs)]
    rows = [
        [spread.scorer, spread.metric, number(spread.mean), number(spread.deviation), *map(number, spread.values)]
        for spread in spreads
    ]
    return "\n".join(aligned([header, *rows]))


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `seeds` to the command line."""
    parser = commands.add_parser(
        "seeds",
        help="mean and spread of runs that differ in their seed alone",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="workdirs of finished runs")
    parser.add_argument(
        "--part", choices=tuple(RESULTS), default="test", help="rows of the metrics (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    spreads = over_seeds(options.runs, options.part)
    print(json_text([spread.to_json() for spread in spreads]).rstrip() if options.json else text(spreads, options.runs))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is not there: give the workdir of a finished run.")
    return read_json(path)


def _what_must_agree(run: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted key: data and split of a run's results, and its configuration but for what may differ."""
    config = _read(run / CONFIG)
    return flat({key: config[key] for key in config if key not in MAY_DIFFER}) | {
        key: results[key] for key in MUST_AGREE
    }


def _metrics(results: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """By scorer and name; those that are not defined are left out."""
    return {
        (scorer, f"{group} {name}"): estimate["value"]
        for scorer, entry in {MODEL: results, BOTH: results.get(BOTH, {}), **results["baselines"]}.items()
        for group, metrics in _groups(entry).items()
        for name, estimate in metrics.items()
        if isinstance(estimate, Mapping) and estimate["value"] is not None
    }


def _groups(entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A scorer's metrics of retrieval, of retrieval among sampled negatives, and of each action."""
    retrieval = {stage: entry[stage] for stage in (RETRIEVAL, SAMPLED) if stage in entry}
    return retrieval | entry.get("ranking", {})
