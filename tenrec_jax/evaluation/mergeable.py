"""Metrics of rows that come in parts: batches, or the shares of several processes.

Each record here is made of some rows by `of`, and `merge` makes of two records that of all their rows. Merging is associative and
commutative, and exact: a record depends on the multiset of rows alone, and a metric is a function of the record, so any division of the
rows into parts, merged in any order, gives the same number bit for bit. Nothing is binned or sampled.

    ExactMean      of numbers: an integer sum, of constant size
    LabelCounts    binary metrics: an entry for each distinct pair of group and score
    TargetPlaces   retrieval metrics of users: an entry for each target
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.evaluation import metrics
from tenrec_jax.evaluation.places import Places
from tenrec_jax.evaluation.rows import Array, Floats, select_probabilities
from tenrec_jax.evaluation.user_metrics import retrieval_metrics

_UNIT = 1126  # 2**-1126 divides every float64: 53 bits below the smallest exponent that frexp gives
_BLOCK = 1 << 24  # values whose halves of 27 bits float64 still adds exactly

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ExactMean:
    """The sum of finite numbers in units of 2**-1126, how many there are, and how many infinite ones (+inf) come on top."""

    units: int = 0
    count: int = 0
    infinite: int = 0

    @classmethod
    def of(cls, values: Array) -> "ExactMean":
        """Of any float64 numbers.

        Raises:
            ValueError: NaN or -inf among them.
        """
        values = np.asarray(values, np.float64).ravel()
        if np.isnan(values).any() or np.any(values == -np.inf):
            raise ValueError("the values must be numbers, or +inf")
        finite = values[values < np.inf]
        starts = range(0, len(finite), _BLOCK)
        units = sum(_units(finite[start : start + _BLOCK]) for start in starts)
        return cls(units, len(finite), len(values) - len(finite))

    def merge(self, other: "ExactMean") -> "ExactMean":
        """Of both."""
        return ExactMean(self.units + other.units, self.count + other.count, self.infinite + other.infinite)

    @property
    def total(self) -> float:
        """The sum, rounded once."""
        return math.inf if self.infinite else self.units / (1 << _UNIT)

    @property
    def value(self) -> float:
        """The mean, rounded once; NaN of nothing."""
        if self.infinite:
            return math.inf
        return self.units / (self.count << _UNIT) if self.count else math.nan


def _units(finite: Floats) -> int:
    mantissa, exponent = np.frexp(finite)
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    lowest = int(exponent.min(initial=0))
    high, low = (np.bincount(exponent - lowest, part) for part in (whole >> 26, whole & (2**26 - 1)))
    terms = enumerate(zip(high.tolist(), low.tolist(), strict=True), start=lowest - 53 + _UNIT)
    return sum(((int(high) << 26) + int(low)) << shift for shift, (high, low) in terms)


class BinaryValues(NamedTuple):
    """Metrics of `LabelCounts`; NaN where undefined."""

    auc: float
    gauc: float
    gauc_coverage: float
    log_loss: float
    ece: float
    pcoc: float
    rows: int


@dataclass(frozen=True, eq=False)
class LabelCounts:
    """How often each label occurs at each score of each group: `group`, `score` in rising order, `negatives`, `positives`, [K] each."""

    group: Ints
    score: Floats
    negatives: Ints
    positives: Ints

    @classmethod
    def of(cls, labels: Array, probabilities: Array, groups: Array | None = None) -> "LabelCounts":
        """Of rows; without groups all are of one.

        Raises:
            UserError: a label other than 0 and 1, or a score that is no probability.
        """
        positive, scores, group = select_probabilities(labels, probabilities, groups=groups)
        ones = positive.astype(np.int64)
        return _counted(group.astype(np.int64), scores + 0.0, 1 - ones, ones)  # -0.0 + 0.0 is 0.0

    def merge(self, other: "LabelCounts") -> "LabelCounts":
        """Of the rows of both."""
        parts = zip(self._columns, other._columns, strict=True)
        return _counted(*(np.concatenate(part) for part in parts))

    @property
    def _columns(self) -> tuple[Array, ...]:
        return self.group, self.score, self.negatives, self.positives

    def values(self, *, bins: int = 15) -> BinaryValues:
        """The metrics of `metrics.auc`, `grouped_auc`, `log_loss` and `calibration` on all rows."""
        rows = self.negatives + self.positives
        pooled = _counted(np.zeros_like(self.group), self.score, self.negatives, self.positives)
        area = pooled._areas()
        areas = self._areas()
        group_rows = np.add.reduceat(rows, _starts(self.group))
        used = ~np.isnan(areas)
        used_rows, all_rows = int(group_rows[used].sum()), int(rows.sum())
        # The counts of a pooled score, spelt out: the other metrics are those of the rows in rising order of score.
        labels = np.repeat(np.tile([False, True], len(pooled.score)), np.stack(pooled._columns[2:], axis=1).ravel())
        scores = np.repeat(pooled.score, pooled.negatives + pooled.positives)
        calibration = metrics.calibration(labels, scores, bins=bins)
        return BinaryValues(
            auc=float(area[0]) if len(area) else math.nan,
            gauc=float(group_rows[used] @ areas[used]) / used_rows if used_rows else math.nan,
            gauc_coverage=used_rows / all_rows if all_rows else math.nan,
            log_loss=ExactMean.of(metrics.row_losses(labels, scores)).value,
            ece=calibration.ece,
            pcoc=calibration.pcoc,
            rows=all_rows,
        )

    def _areas(self) -> Floats:
        """The AUC of each group, from pairs counted in integers."""
        starts = _starts(self.group)
        before = np.cumsum(self.negatives) - self.negatives
        below = before - np.repeat(before[starts], np.diff(starts, append=len(before)))
        twice_above = np.add.reduceat(self.positives * (2 * below + self.negatives), starts)
        pairs = np.add.reduceat(self.positives, starts) * np.add.reduceat(self.negatives, starts)
        return np.divide(twice_above, 2 * pairs, out=np.full(len(starts), np.nan), where=pairs > 0)


def _counted(group: Array, score: Array, negatives: Array, positives: Array) -> LabelCounts:
    """Entries of one group and score brought together."""
    order = np.lexsort((score, group))
    group, score, negatives, positives = group[order], score[order], negatives[order], positives[order]
    starts = _starts(group, score)
    return LabelCounts(
        group[starts], score[starts], np.add.reduceat(negatives, starts), np.add.reduceat(positives, starts)
    )


def _starts(*columns: Array) -> Ints:
    """Where the rows change."""
    is_first = np.ones(len(columns[0]), bool)
    if len(is_first):
        is_first[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(is_first)


@dataclass(frozen=True, eq=False)
class TargetPlaces:
    """Targets with their places, in rising order: `user`, `item`, `first`, `last`, [P] each."""

    user: Array
    item: Array
    first: Floats
    last: Floats

    @classmethod
    def of(cls, user_P: Array, item_P: Array, places: Places) -> "TargetPlaces":
        """Of targets in any order."""
        order = np.lexsort((places.last, places.first, item_P, user_P))
        return cls(user_P[order], item_P[order], places.first[order], places.last[order])

    def merge(self, other: "TargetPlaces") -> "TargetPlaces":
        """Of the targets of both."""
        user, item, first, last = (
            np.concatenate([getattr(self, name), getattr(other, name)]) for name in ("user", "item", "first", "last")
        )
        return TargetPlaces.of(user, item, Places(first, last))

    def values(self) -> dict[str, float]:
        """Means over users of `user_metrics.retrieval_metrics`."""
        _, values = retrieval_metrics(self.user, self.item, Places(self.first, self.last))
        return {name: ExactMean.of(value_U).value for name, value_U in values.items()}
