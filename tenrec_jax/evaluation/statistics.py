"""95 % intervals by a user-level bootstrap: whole users are drawn with replacement, since the rows of a user depend.

A resample is a vector of multiplicities, how often each user was drawn (multinomial). Every metric is then a function
of weighted sums, so no row is ever copied. Intervals are percentile intervals (Efron and Tibshirani 1993, chapter 13).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.evaluation import metrics

_BLOCK_BYTES = 1 << 26  # of one block of multiplicities
_ECE_BINS = 15

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A metric on the sample and its 95 % interval.

    `value` is NaN where the metric is undefined; then so is the interval. The interval is taken over the resamples in
    which the metric is defined, and is NaN with fewer than two users, from which no spread can be told.
    """

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """The three numbers; None, for JSON has no such numbers, where one is NaN or infinite."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


@dataclass(frozen=True)
class BinaryEstimates:
    """The binary metrics of one action; `gauc_coverage` is the share of rows of users having both labels."""

    auc: Estimate
    gauc: Estimate
    log_loss: Estimate
    ece: Estimate
    pcoc: Estimate
    gauc_coverage: float
    rows: int
    users: int


def resample_counts(num_users: int, *, seed: int, resamples: int) -> Iterator[Floats]:
    """Blocks [b, U] of multiplicities, `resamples` rows in all: how often each user was drawn in U draws.

    The numbers depend on the seed, the number of users and the place of the resample alone.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    generator = np.random.default_rng(seed)
    step = max(1, _BLOCK_BYTES // (8 * max(1, num_users)))
    for start in range(0, resamples, step):
        block = np.empty((min(step, resamples - start), num_users))
        for counts in block:
            counts[:] = np.bincount(generator.integers(0, num_users, size=num_users), minlength=num_users)
        yield block


def bootstrap_mean(per_user_sum_U: Floats, per_user_count_U: NDArray, *, seed: int, resamples: int = 1000) -> Estimate:
    """The ratio (sum of sums) / (sum of counts) over users, with its interval.

    Args:
        per_user_sum_U: sum of a metric over the user's queries or rows [U].
        per_user_count_U: their number [U]. An entry of count 0 (such as id 0, "unknown") is no user of the sample.
        seed: of the resampling.
        resamples: number of bootstrap resamples.

    Raises:
        ValueError: arrays of other shapes, a negative count, a sum that is NaN or -inf, or not 0 where the count is 0.
    """
    sums, counts = np.asarray(per_user_sum_U, np.float64), np.asarray(per_user_count_U, np.float64)
    if sums.ndim != 1 or sums.shape != counts.shape:
        raise ValueError(f"sums and counts must be flat arrays of one length, got {sums.shape} and {counts.shape}")
    if not np.all(counts >= 0) or not np.all(sums > -np.inf) or np.any(sums[counts == 0] != 0):
        raise ValueError("counts must be >= 0, sums neither NaN nor -inf, and 0 for a user whose count is 0")
    used = counts > 0
    sums, counts = sums[used], counts[used]
    value = float(sums.sum() / counts.sum()) if len(sums) else math.nan
    columns = np.stack([sums, counts], axis=1)
    draws = [_weighted_sums(block, columns) for block in resample_counts(len(sums), seed=seed, resamples=resamples)]
    return _estimate(value, _ratio(np.concatenate(draws)), len(sums))


def bootstrap_means(values: Mapping[str, Floats], *, seed: int, resamples: int = 1000) -> dict[str, Estimate]:
    """Means over users of several per-user values [U] each, by name: `bootstrap_mean` with counts of 1, on the same draws for all."""
    sample, num_users = MeanSample(values), len(next(iter(values.values())))
    blocks = [sample.draw(block) for block in resample_counts(num_users, seed=seed, resamples=resamples)]
    return {
        name: _estimate(value, np.concatenate([block[name] for block in blocks]), num_users)
        for name, value in sample.values.items()
    }


def bootstrap_binary(
    labels_R: NDArray, scores_R: NDArray, user_R: NDArray, *, seed: int, resamples: int = 1000
) -> BinaryEstimates:
    """AUC, GAUC, log loss, ECE (15 equal-mass bins) and PCOC of predicted probabilities, with user-level intervals.

    The bins of the ECE are those of the whole sample. As a mean of absolute values the ECE is larger in resamples than
    in the sample: its interval measures spread and may lie above the value.

    Args:
        labels_R: 0/1 [R].
        scores_R: probabilities [R].
        user_R: user ids [R], any integers in any order.
        seed: of the resampling.
        resamples: number of bootstrap resamples.

    Raises:
        UserError: a score that is no probability, or a label other than 0 and 1.
    """
    users, user_R = np.unique(np.asarray(user_R), return_inverse=True)
    sample = BinarySample(labels_R, scores_R, user_R, len(users))
    blocks = [sample.draw(block) for block in resample_counts(len(users), seed=seed, resamples=resamples)]
    drawn = {name: np.concatenate([block[name] for block in blocks]) for name in sample.values}
    return BinaryEstimates(
        **{name: _estimate(value, drawn[name], len(users)) for name, value in sample.values.items()},
        gauc_coverage=sample.gauc_coverage,
        rows=len(user_R),
        users=len(users),
    )


class Sample(Protocol):
    """Metrics of a sample of users, and what they become where each user counts as often as he was drawn."""

    @property
    def values(self) -> Mapping[str, float]:
        """Of the sample, by name."""

    def draw(self, counts_BU: Floats) -> Mapping[str, Floats]:
        """Of resamples [b], by name, under multiplicities [b, U]."""


class MeanSample:
    """Means over users of per-user values [U] each, by name."""

    def __init__(self, values: Mapping[str, Floats]) -> None:
        self._columns = np.stack(list(values.values()), axis=1)
        means = self._means(self._columns.sum(axis=0))
        self.values: dict[str, float] = dict(zip(values, means.tolist(), strict=True))

    def draw(self, counts_BU: Floats) -> dict[str, Floats]:
        """See `Sample`; the multiplicities add up to the number of users."""
        return dict(zip(self.values, self._means(counts_BU @ self._columns).T, strict=True))

    def _means(self, sums: Floats) -> Floats:
        users = len(self._columns)
        return sums / users if users else np.full(sums.shape, np.nan)


class MeanOfRuns:
    """The means of several runs' metrics, each of the same users: one configuration from several seeds, say."""

    def __init__(self, runs: Sequence[Sample]) -> None:
        self._runs = runs
        self.values = {name: float(np.mean([run.values[name] for run in runs])) for name in runs[0].values}

    def draw(self, counts_BU: Floats) -> dict[str, Floats]:
        """See `Sample`."""
        drawn = [run.draw(counts_BU) for run in self._runs]
        return {name: np.mean([run[name] for run in drawn], axis=0) for name in self.values}


class BinarySample:
    """The metrics of `bootstrap_binary`.

    Args:
        labels_R, scores_R: as there.
        user_R: numbers of users, from 0 to `num_users` - 1.
        num_users: U.
    """

    def __init__(self, labels_R: NDArray, scores_R: NDArray, user_R: NDArray, num_users: int) -> None:
        positive, probabilities, user_R = metrics.select_probabilities(labels_R, scores_R, groups=user_R)
        grouped = metrics.grouped_auc(positive, probabilities, groups=user_R)
        calibration = metrics.calibration(positive, probabilities, bins=_ECE_BINS)
        self._columns = _columns_per_user(positive, probabilities, user_R, num_users)
        self._pooled = _PooledAuc(positive, probabilities, user_R)
        self.gauc_coverage = grouped.coverage
        self.values = {
            "auc": metrics.auc(positive, probabilities),
            "gauc": grouped.value,
            "log_loss": metrics.log_loss(positive, probabilities),
            "ece": calibration.ece,
            "pcoc": calibration.pcoc,
        }

    def draw(self, counts_BU: Floats) -> dict[str, Floats]:
        """See `Sample`."""
        sums = _weighted_sums(counts_BU, self._columns)
        rows, positives, predicted, loss, weighted_auc, auc_rows = sums[:, :6].T
        gaps = np.abs(sums[:, 6:]).sum(axis=1)
        return {
            "auc": self._pooled(counts_BU),
            "gauc": _ratio(np.stack([weighted_auc, auc_rows], axis=1)),
            "log_loss": _ratio(np.stack([loss, rows], axis=1)),
            "ece": _ratio(np.stack([gaps, rows], axis=1)),
            "pcoc": _ratio(np.stack([predicted, positives], axis=1)),
        }


def paired_differences(
    first: Sample, second: Sample, num_users: int, *, seed: int, resamples: int = 1000
) -> dict[str, Estimate]:
    """Second less first in every metric, with the interval of the difference: both are measured on the same draws of the same users, so
    that what is hard for both about a user cancels.
    """
    drawn: dict[str, list[Floats]] = {name: [] for name in first.values}
    for block in resample_counts(num_users, seed=seed, resamples=resamples):
        before, after = first.draw(block), second.draw(block)
        for name, differences in drawn.items():
            differences.append(_difference(after[name], before[name]))
    values = {name: float(_difference(second.values[name], value)) for name, value in first.values.items()}
    return {name: _estimate(values[name], np.concatenate(drawn[name]), num_users) for name in values}


def _difference(after: Floats | float, before: Floats | float) -> Floats:
    """NaN where both are infinite."""
    with np.errstate(invalid="ignore"):
        return np.subtract(after, before)


class _PooledAuc:
    """The pooled AUC of resamples: rows are sorted by score once; a resample only changes their weights."""

    def __init__(self, positive: NDArray[np.bool_], scores: Floats, user_R: NDArray) -> None:
        order = np.argsort(scores, kind="stable")
        positive, scores, users = positive[order], scores[order], user_R[order]
        self._positive_users, self._negative_users = users[positive], users[~positive]
        # Per positive: how many negatives lie strictly below, and how many not above. Both hold for every resample.
        self._below = np.searchsorted(scores[~positive], scores[positive], "left")
        self._up_to = np.searchsorted(scores[~positive], scores[positive], "right")

    def __call__(self, counts_BU: Floats) -> Floats:
        """AUC [b] under multiplicities [b, U]; NaN where a class is absent. Sums of integers below 2**53 are exact."""
        result = np.empty(len(counts_BU))
        weight_up_to = np.zeros(len(self._negative_users) + 1)
        for index, counts in enumerate(counts_BU):
            np.cumsum(counts[self._negative_users], out=weight_up_to[1:])
            weights = counts[self._positive_users]
            pairs = weights.sum() * weight_up_to[-1]
            twice_above = weights @ (weight_up_to[self._below] + weight_up_to[self._up_to])
            result[index] = twice_above / (2 * pairs) if pairs else np.nan
        return result


def _columns_per_user(positive: NDArray[np.bool_], probabilities: Floats, user_R: NDArray, num_users: int) -> Floats:
    """Sums per user [U, 6 + bins]: rows, positives, probabilities, losses, rows * AUC, rows with an AUC, and by bin
    of the ECE the sum of (probability - label)."""

    def per_user(weights: NDArray | None = None) -> Floats:
        return np.bincount(user_R, weights, minlength=num_users).astype(np.float64)

    by_user = metrics.auc_by_group(positive, probabilities, user_R)
    used = ~np.isnan(by_user.auc)
    bins = metrics.equal_mass_bins(probabilities, _ECE_BINS)
    cells = np.bincount(user_R * _ECE_BINS + bins, probabilities - positive, minlength=num_users * _ECE_BINS)
    sums = (
        per_user(),
        per_user(positive),
        per_user(probabilities),
        per_user(metrics.row_losses(positive, probabilities)),
        np.where(used, by_user.rows * by_user.auc, 0.0),
        by_user.rows * used,
    )
    return np.column_stack([*sums, cells.reshape(num_users, _ECE_BINS)])


def _weighted_sums(counts_BU: Floats, columns_UM: Floats) -> Floats:
    """Sum over users of multiplicity * column [b, M]; an infinite entry counts only where its user was drawn."""
    infinite = np.isinf(columns_UM)
    sums = counts_BU @ np.where(infinite, 0.0, columns_UM)
    if infinite.any():
        sums[counts_BU @ infinite > 0] = np.inf
    return sums


def _ratio(parts_BM: Floats) -> Floats:
    """First column / second column [b]; NaN where the second is zero."""
    ratio = np.full(len(parts_BM), np.nan)
    np.divide(parts_BM[:, 0], parts_BM[:, 1], out=ratio, where=parts_BM[:, 1] > 0)
    return ratio


def _estimate(value: float, resampled: Floats, num_users: int) -> Estimate:
    """The value with the 2.5 % and 97.5 % order statistics; none is interpolated, as losses may be infinite."""
    defined = np.sort(resampled[~np.isnan(resampled)])
    if math.isnan(value) or num_users < 2 or not len(defined):
        return Estimate(value, math.nan, math.nan)
    low, high = (defined[math.ceil(share * len(defined)) - 1] for share in (0.025, 0.975))
    return Estimate(value, float(low), float(high))
