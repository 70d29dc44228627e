"""One configuration trained from several seeds: the mean of each metric over the runs, and its spread.

An interval of one run says how the choice of users matters; the spread over seeds says how the luck of training does. A difference that
is smaller than the spread is none.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.tables import aligned, number
from tenrec_jax.files import json_text, read_json

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
    """One metric over runs: `scorer` is "model" or a baseline; `deviation` is the sample standard deviation."""

    scorer: str
    metric: str
    values: tuple[float, ...]
    mean: float
    deviation: float


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
    configs = [_flat(_read(run / "config.json")) for run in runs]
    problems = [
        f"{key}: {first.get(key)} in {runs[0]}, {other.get(key)} in {run}"
        for values, keys in (
            (results, MUST_AGREE),
            (configs, sorted({key for config in configs for key in config} - {*MAY_DIFFER})),
        )
        for first in values[:1]
        for run, other in zip(runs[1:], values[1:], strict=True)
        for key in keys
        if first.get(key) != other.get(key)
    ]
    if problems:
        raise UserError("These runs are not one configuration from several seeds:\n  " + "\n  ".join(problems))
    seeds = [result["seed"] for result in results]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"The runs' seeds are {seeds}: the same seed gives the same run, and no spread.")
    found = [dict(_metrics(result)) for result in results]
    return [
        Spread(*key, values, float(np.mean(values)), float(np.std(values, ddof=1)))
        for key in found[0]
        if all(key in other for other in found)
        for values in [tuple(metrics[key] for metrics in found)]
    ]


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
    print(json_text([vars(spread) for spread in spreads]).rstrip() if options.json else text(spreads, options.runs))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is not there: give the workdir of a finished run.")
    return read_json(path)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _metrics(results: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """By scorer and name; those that are not defined are left out."""
    for scorer, entry in {"model": results, **results["baselines"]}.items():
        for stage in entry:
            if stage == "ranking":
                groups = {f"{action} ": values for action, values in entry[stage].items()}
            elif stage.startswith("retrieval"):
                groups = {f"{stage} ": entry[stage]}
            else:
                continue
            for prefix, values in groups.items():
                for name, estimate in values.items():
                    if isinstance(estimate, Mapping) and estimate["value"] is not None:
                        yield (scorer, f"{prefix}{name}"), estimate["value"]
