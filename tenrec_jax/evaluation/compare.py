"""Two runs on the same rows, or two configurations from several seeds each: which of their differences are real.

The runs' predictions are read from the files that they left. Users are drawn with replacement, the same ones for both sides, and every
metric's difference is taken in each draw: a difference is called real where its 95 % interval excludes 0. A side of several runs has the
mean of their metrics, in every draw.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.predictions import Predictions, read_predictions
from tenrec_jax.evaluation.statistics import (
    BinarySample,
    Estimate,
    MeanOfRuns,
    MeanSample,
    Sample,
    paired_differences,
)
from tenrec_jax.evaluation.tables import aligned, number
from tenrec_jax.evaluation.user_metrics import retrieval_metrics
from tenrec_jax.files import json_text

FILES = {"test": "eval/predictions.parquet", "validation": "eval/val_predictions.parquet"}
MUST_AGREE = ("protocol", "data_sha256", "split_sha256", "part", "exclude_seen", "catalogue")
EXAMPLES = """examples:
  tenrec-jax compare runs/before runs/after                       on the test rows
  tenrec-jax compare runs/before runs/after --part validation     to choose between the two
  tenrec-jax compare runs/before runs/other_split --force         side by side, no differences
  tenrec-jax compare runs/a_0,runs/a_1 runs/b_0,runs/b_1          means over seeds
"""


@dataclass(frozen=True)
class Difference:
    """One metric of both sides; `difference` is second less first, None where they cannot be paired."""

    metric: str
    first: float
    second: float
    difference: Estimate | None

    @property
    def has_interval(self) -> bool:
        """Whether the difference has an interval: the metric is defined on these rows."""
        return self.difference is not None and math.isfinite(self.difference.low)

    @property
    def is_real(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return self.difference is not None and (self.difference.low > 0 or self.difference.high < 0)


@dataclass(frozen=True)
class Comparison:
    """Two runs compared, or two sides of several.

    Attributes:
        names: of the sides. runs: of each side. users: that all have, in retrieval and in ranking.
        mismatches: what of the runs differs that must not; then no difference was taken.
        metrics: every metric that both have.
        left_out: what was not compared, and why.
    """

    names: tuple[str, str]
    runs: tuple[int, int]
    users: dict[str, int]
    mismatches: tuple[str, ...]
    metrics: tuple[Difference, ...]
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = []
        for row in self.metrics:
            difference = None if row.difference is None else row.difference.to_json()
            rows.append(dataclasses.asdict(row) | {"difference": difference, "is_real": row.is_real})
        return dataclasses.asdict(self) | {"metrics": rows}


def compare(
    first: Sequence[Path],
    second: Sequence[Path],
    *,
    part: str = "test",
    force: bool = False,
    seed: int = 0,
    resamples: int = 1000,
) -> Comparison:
    """Compare two workdirs, or several of each side.

    Args:
        first, second: workdirs of the sides' runs.
        part: "test" or "validation".
        force: show sides next to each other that cannot be paired.
        seed, resamples: of the bootstrap over the users that all runs have.

    Raises:
        UserError: predictions are missing, a run is named twice on a side, or the runs are not of the same rows and protocol, which is
            named, and not `force`.
    """
    for side in (first, second):
        if len(set(side)) < len(side):
            raise UserError(f"A run is named twice on one side: {_name(side)}.")
    sides = tuple([read_predictions(run / FILES[part]) for run in side] for side in (first, second))
    origins = [
        (run, dataclasses.asdict(read.origin))
        for run, read in zip((*first, *second), (*sides[0], *sides[1]), strict=True)
    ]
    (name, one), *others = origins
    mismatches = tuple(
        f"{key}: {one[key]} in {name}, {other[key]} in {other_name}"
        for other_name, other in others
        for key in MUST_AGREE
        if one[key] != other[key]
    )
    if mismatches and not force:
        listed = "\n  ".join(mismatches)
        raise UserError(
            f"The runs cannot be compared, since they differ in\n  {listed}\n--force shows them side by side, without differences."
        )
    names, runs = (_name(first), _name(second)), (len(first), len(second))
    if mismatches:
        values = [_values(side) for side in sides]
        shared = [name for name in values[0] if name in values[1]]
        rows = tuple(Difference(name, values[0][name], values[1][name], None) for name in shared)
        return Comparison(names, runs, {}, mismatches, rows, ())
    users, metrics, left_out = _paired(*sides, seed=seed, resamples=resamples)
    return Comparison(names, runs, users, (), tuple(metrics), tuple(left_out))


def _name(side: Sequence[Path]) -> str:
    return ",".join(map(str, side))


def _paired(
    first: Sequence[Predictions], second: Sequence[Predictions], *, seed: int, resamples: int
) -> tuple[dict[str, int], list[Difference], list[str]]:
    """The numbers of users, the differences, and what was left out."""
    metrics: list[Difference] = []

    def add(prefix: str, before: Sample, after: Sample, users: int) -> None:
        found = paired_differences(before, after, users, seed=seed, resamples=resamples)
        metrics.extend(
            Difference(f"{prefix} {name}", before.values[name], after.values[name], difference)
            for name, difference in found.items()
        )

    runs, users, left_out = [*first, *second], dict[str, int](), list[str]()
    common = functools.reduce(np.intersect1d, [run.user[run.ranked] for run in runs])
    if len(common):
        before, after = (MeanOfRuns([_retrieval_sample(run, common) for run in side]) for side in (first, second))
        add("retrieval", before, after, len(common))
        users["retrieval"] = len(common)
    elif not all(len(run.ranked) for run in runs):
        left_out.append("retrieval: not all runs retrieve")
    if all(run.score_RA is not None for run in runs):
        users["ranking"] = len(np.unique(runs[0].user))
        of_second = _binary_samples(second)
        for action, sample in _binary_samples(first).items():
            add(action, sample, of_second[action], users["ranking"])
    else:
        left_out.append("ranking: not all runs have a ranker")
    return users, metrics, left_out


def _retrieval_sample(run: Predictions, users: np.ndarray | None = None) -> MeanSample:
    found, values = retrieval_metrics(run.user[run.ranked], run.item[run.ranked], run.places)
    kept = slice(None) if users is None else np.searchsorted(found, users)
    return MeanSample({name: value_U[kept] for name, value_U in values.items()})


def _binary_samples(side: Sequence[Predictions]) -> dict[str, MeanOfRuns]:
    """By action, over all users of the runs in rising order of their ids; empty where a run has no ranker."""
    samples: dict[str, list[BinarySample]] = {}
    for run in side:
        if run.score_RA is None:
            return {}
        ids, user_R = np.unique(run.user, return_inverse=True)
        for action, label_R, score_R in zip(run.origin.actions, run.labels_RA.T, run.score_RA.T, strict=True):
            samples.setdefault(action, []).append(BinarySample(label_R, score_R, user_R, len(ids)))
    return {action: MeanOfRuns(of_runs) for action, of_runs in samples.items()}


def _values(side: Sequence[Predictions]) -> dict[str, float]:
    """Every metric of a side, of each run on its own users."""
    samples: dict[str, Sample] = dict(_binary_samples(side))
    if all(len(run.ranked) for run in side):
        samples = {"retrieval": MeanOfRuns([_retrieval_sample(run) for run in side]), **samples}
    return {f"{stage} {name}": value for stage, sample in samples.items() for name, value in sample.values.items()}


def text(comparison: Comparison) -> str:
    """The comparison for a console."""
    lines = [f"A: {comparison.names[0]}", f"B: {comparison.names[1]}"]
    if comparison.mismatches:
        lines += [
            "",
            "WARNING: these runs are not comparable; no difference between them means anything. They differ in",
        ]
        lines += [f"  {mismatch}" for mismatch in comparison.mismatches]
        rows = [[row.metric, number(row.first), number(row.second)] for row in comparison.metrics]
        return "\n".join([*lines, "", *aligned([["metric", "A", "B"], *rows])])
    table = [["metric", "A", "B", "B - A", "95 % interval", ""]]
    for row in comparison.metrics:
        difference = row.difference
        if difference is not None:
            interval = f"[{_signed(difference.low)}, {_signed(difference.high)}]"
            mark = "real" if row.is_real else ""
            table.append([row.metric, number(row.first), number(row.second), _signed(difference.value), interval, mark])
    real, looked_at = (
        sum(row.is_real for row in comparison.metrics),
        sum(row.has_interval for row in comparison.metrics),
    )
    users = ", ".join(f"{count:,} in {stage}" for stage, count in comparison.users.items())
    return "\n".join(
        [
            *lines,
            f"paired by user, {users}",
            "",
            *aligned(table),
            "",
            f"{real} of {looked_at} differences are real: their interval excludes 0.",
            f"Many metrics are looked at: of {looked_at}, about {0.05 * looked_at:.0f} would be called real by chance between "
            "two runs that are equally good.",
            _about_seeds(comparison.runs),
            *(f"not compared: {reason}" for reason in comparison.left_out),
        ]
    )


def _about_seeds(runs: tuple[int, int]) -> str:
    if max(runs) == 1:
        return "One seed a run: intervals tell how the choice of users matters, not how the seed of training does."
    return f"Means over {runs[0]} and {runs[1]} runs: intervals tell how the choice of users matters; tenrec-jax seeds tells the spread."


def _signed(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else "n/a"


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `compare` to the command line."""
    parser = commands.add_parser(
        "compare",
        help="say which differences between two runs are real",
        description=(__doc__ or "").split("\n\n")[1],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run_a", type=_side, metavar="RUN_A", help="workdir of a run; of several, with commas between them"
    )
    parser.add_argument("run_b", type=_side, metavar="RUN_B", help="workdir of another one, or several likewise")
    parser.add_argument(
        "--part", choices=tuple(FILES), default="test", help="rows to compare on (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="show side by side what cannot be compared")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=_run)


def _side(text: str) -> tuple[Path, ...]:
    return tuple(map(Path, text.split(",")))


def _run(options: argparse.Namespace) -> None:
    found = compare(options.run_a, options.run_b, part=options.part, force=options.force)
    print(json_text(found.to_json()) if options.json else text(found), end="" if options.json else "\n")
