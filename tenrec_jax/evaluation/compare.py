"""Two runs on the same rows: which of their differences are real.

Both runs' predictions are read from the files that they left. Users are drawn with replacement, the same ones for both runs, and every
metric's difference is taken in each draw: a difference is called real where its 95 % interval excludes 0.
"""

import argparse
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.predictions import Predictions, read_predictions
from tenrec_jax.evaluation.statistics import BinarySample, Estimate, MeanSample, Sample, paired_differences
from tenrec_jax.evaluation.tables import aligned, number
from tenrec_jax.evaluation.user_metrics import retrieval_metrics
from tenrec_jax.files import json_text

FILES = {"test": "eval/predictions.parquet", "validation": "eval/val_predictions.parquet"}
MUST_AGREE = ("protocol", "data_sha256", "split_sha256", "part", "exclude_seen", "catalogue")
EXAMPLES = """examples:
  tenrec-jax compare runs/before runs/after                       on the test rows
  tenrec-jax compare runs/before runs/after --part validation     to choose between the two
  tenrec-jax compare runs/before runs/other_split --force         side by side, no differences
"""


@dataclass(frozen=True)
class Difference:
    """One metric of both runs; `difference` is second less first, None where the runs cannot be paired."""

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
    """Two runs compared.

    Attributes:
        names: of the runs. users: that both have, in retrieval and in ranking.
        mismatches: what of the runs differs that must not; then no difference was taken.
        metrics: every metric that both have.
        left_out: what was not compared, and why.
    """

    names: tuple[str, str]
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
    first: Path, second: Path, *, part: str = "test", force: bool = False, seed: int = 0, resamples: int = 1000
) -> Comparison:
    """Compare two workdirs.

    Args:
        first, second: of the runs.
        part: "test" or "validation".
        force: show runs side by side that cannot be paired.
        seed, resamples: of the bootstrap over the users that both have.

    Raises:
        UserError: predictions are missing, or the runs are not of the same rows and protocol, which is named, and not `force`.
    """
    runs = read_predictions(first / FILES[part]), read_predictions(second / FILES[part])
    names = (str(first), str(second))
    one, other = (dataclasses.asdict(run.origin) for run in runs)
    mismatches = tuple(
        f"{key}: {one[key]} in {first}, {other[key]} in {second}" for key in MUST_AGREE if one[key] != other[key]
    )
    if mismatches and not force:
        listed = "\n  ".join(mismatches)
        raise UserError(
            f"The runs cannot be compared, since they differ in\n  {listed}\n--force shows them side by side, without differences."
        )
    if mismatches:
        values = [_values(run) for run in runs]
        shared = [name for name in values[0] if name in values[1]]
        rows = tuple(Difference(name, values[0][name], values[1][name], None) for name in shared)
        return Comparison(names, {}, mismatches, rows, ())
    return _paired(names, *runs, seed=seed, resamples=resamples)


def _paired(
    names: tuple[str, str], first: Predictions, second: Predictions, *, seed: int, resamples: int
) -> Comparison:
    metrics: list[Difference] = []

    def add(prefix: str, before: Sample, after: Sample, users: int) -> None:
        found = paired_differences(before, after, users, seed=seed, resamples=resamples)
        metrics.extend(
            Difference(f"{prefix} {name}", before.values[name], after.values[name], difference)
            for name, difference in found.items()
        )

    users, left_out = dict[str, int](), list[str]()
    common = np.intersect1d(first.user[first.ranked], second.user[second.ranked])
    if len(common):
        add("retrieval", _retrieval_sample(first, common), _retrieval_sample(second, common), len(common))
        users["retrieval"] = len(common)
    elif not (len(first.ranked) and len(second.ranked)):
        left_out.append("retrieval: not both runs retrieve")
    before, after = _binary_samples(first), _binary_samples(second)
    if before and after:
        users["ranking"] = len(np.unique(first.user))
        for action, sample in before.items():
            add(action, sample, after[action], users["ranking"])
    else:
        left_out.append("ranking: not both runs have a ranker")
    return Comparison(names, users, (), tuple(metrics), tuple(left_out))


def _retrieval_sample(run: Predictions, users: np.ndarray | None = None) -> MeanSample:
    found, values = retrieval_metrics(run.user[run.ranked], run.item[run.ranked], run.places)
    kept = slice(None) if users is None else np.searchsorted(found, users)
    return MeanSample({name: value_U[kept] for name, value_U in values.items()})


def _binary_samples(run: Predictions) -> dict[str, BinarySample]:
    """By action, over all users of the run in rising order of their ids; empty without a ranker."""
    if run.score_RA is None:
        return {}
    ids, user_R = np.unique(run.user, return_inverse=True)
    columns = zip(run.origin.actions, run.labels_RA.T, run.score_RA.T, strict=True)
    return {action: BinarySample(label_R, score_R, user_R, len(ids)) for action, label_R, score_R in columns}


def _values(run: Predictions) -> dict[str, float]:
    """Every metric of a run on its own users."""
    samples: dict[str, Sample] = dict(_binary_samples(run))
    if len(run.ranked):
        samples = {"retrieval": _retrieval_sample(run), **samples}
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
            "One seed a run: intervals tell how the choice of users matters, not how the seed of training does.",
            *(f"not compared: {reason}" for reason in comparison.left_out),
        ]
    )


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
    parser.add_argument("run_a", type=Path, metavar="RUN_A", help="workdir of a run")
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help="workdir of another one")
    parser.add_argument(
        "--part", choices=tuple(FILES), default="test", help="rows to compare on (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="show side by side what cannot be compared")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    found = compare(options.run_a, options.run_b, part=options.part, force=options.force)
    print(json_text(found.to_json()) if options.json else text(found), end="" if options.json else "\n")
