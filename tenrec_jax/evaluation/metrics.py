"""Classification and ranking metrics: NumPy arrays in, floats out, exact in the presence of ties.

Binary metrics take flat arrays `labels` [R] (0/1 or bool) and `scores` [R], and `where` (bool [R]), which picks the
rows that count; the values of the other rows are never looked at. Ranking metrics take the 1-based rank of each query's
one target. A metric that is undefined on the given rows is NaN; no value is ever invented for it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.errors import UserError

_BLOCK = 1 << 20  # elements of a temporary array: bounds the memory of every function here

Array = np.ndarray
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class GroupedAuc(NamedTuple):
    """GAUC with what it rests on: coverage is the share of the rows that lie in groups having both labels."""

    value: float
    coverage: float
    groups_used: int
    groups_skipped: int


class AucByGroup(NamedTuple):
    """One entry per group, in rising order of its id: rows, positives and AUC (NaN where one label is absent)."""

    groups: NDArray[np.integer]
    rows: NDArray[np.int64]
    positives: NDArray[np.int64]
    auc: Floats


def select_rows(
    labels: Array, scores: Array, where: Array | None = None, groups: Array | None = None
) -> tuple[Bools, Array, Array]:
    """The rows that count, checked: positives (bool), scores, groups (all zero when None).

    Raises:
        ValueError: arrays that are not flat or differ in length, or a mask that is not bool.
        UserError: a label other than 0 and 1, or a NaN score.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    groups = np.broadcast_to(np.int8(0), labels.shape) if groups is None else np.asarray(groups)
    if labels.ndim != 1 or not labels.shape == scores.shape == groups.shape:
        shapes = f"labels {labels.shape}, scores {scores.shape}, groups {groups.shape}"
        raise ValueError(f"labels, scores and groups must be flat arrays of one length, got {shapes}")
    if where is not None:
        where = np.asarray(where)
        if where.dtype != bool or where.shape != labels.shape:
            raise ValueError(f"where must be bool {labels.shape}, got {where.dtype} {where.shape}")
        labels, scores, groups = labels[where], scores[where], groups[where]
    positive = labels if labels.dtype == bool else labels == 1
    known = positive | (labels == 0)
    if not known.all():
        row = int(np.argmin(known))
        raise UserError(f"selected row {row}: label {labels[row]} is neither 0 nor 1")
    missing = np.isnan(scores)
    if missing.any():
        raise UserError(f"selected row {int(np.argmax(missing))}: the score is NaN; look for a diverged model")
    return positive, scores, groups


def auc(labels: Array, scores: Array, *, where: Array | None = None, groups: Array | None = None) -> float:
    """Area under the ROC curve: P(positive above negative) + P(tie)/2 over all pairs (Mann-Whitney U, mid-ranks).

    Args:
        labels: 0/1 [R].
        scores: any real numbers [R], infinities included; only their order matters. A constant scorer gets exactly 0.5.
        where: rows that count, bool [R].
        groups: group ids [R]; with them only pairs within a group are compared: the value of `grouped_auc`.

    Returns:
        A value in [0, 1], or NaN when one of the two classes is absent.

    Raises:
        UserError: a label other than 0 and 1, or a NaN score.
    """
    if groups is not None:
        return grouped_auc(labels, scores, groups=groups, where=where).value
    positive, scores, _ = select_rows(labels, scores, where)
    negatives, positives = np.sort(scores[~positive]), np.sort(scores[positive])
    if not len(negatives) or not len(positives):
        return float("nan")
    few, many = (positives, negatives) if len(positives) <= len(negatives) else (negatives, positives)
    twice_above = 0  # exact: twice the number of pairs in which the element of `few` is above, ties counting one
    for start in range(0, len(few), _BLOCK):
        block = few[start : start + _BLOCK]
        for side in ("left", "right"):
            twice_above += int(np.searchsorted(many, block, side).sum(dtype=np.int64))
    pairs = len(few) * len(many)
    return (twice_above if few is positives else 2 * pairs - twice_above) / (2 * pairs)


def auc_by_group(labels: Array, scores: Array, groups: Array, where: Array | None = None) -> AucByGroup:
    """The AUC within each group by one sort of the rows by (group, score); mid-ranks for ties."""
    positive, scores, groups = select_rows(labels, scores, where, groups)
    order = np.lexsort((scores, groups))
    positive, scores, groups = positive[order], scores[order], groups[order]
    new_group = np.ones(len(order), dtype=bool)
    new_group[1:] = groups[1:] != groups[:-1]
    new_run = new_group.copy()
    new_run[1:] |= scores[1:] != scores[:-1]
    starts, runs = np.flatnonzero(new_group), np.flatnonzero(new_run)
    if not len(starts):
        return AucByGroup(groups, np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    rows = np.diff(starts, append=len(order))
    positives = np.add.reduceat(positive, starts, dtype=np.int64)
    run_length = np.diff(runs, append=len(order))
    midrank = np.repeat(runs + (run_length + 1) / 2, run_length) - np.repeat(starts, rows)
    rank_sum = np.add.reduceat(np.where(positive, midrank, 0.0), starts)
    pairs = (positives * (rows - positives)).astype(np.float64)
    area = np.full(len(starts), np.nan)
    np.divide(rank_sum - positives * (positives + 1) / 2, pairs, out=area, where=pairs > 0)
    return AucByGroup(groups[starts], rows, positives, area)


def grouped_auc(labels: Array, scores: Array, *, groups: Array, where: Array | None = None) -> GroupedAuc:
    """GAUC: the mean of the users' AUCs over users having both labels, each weighted by its number of rows.

    This is the impression-weighted definition (Zhu et al. 2017, Optimized Cost per Click in Taobao). A score that is a
    function of the user alone gets exactly 0.5. The value is NaN when no group has both labels.

    Args:
        labels: 0/1 [R].
        scores: real numbers [R].
        groups: group (user) ids [R], in any order.
        where: rows that count, bool [R].
    """
    by_group = auc_by_group(labels, scores, groups, where)
    used = ~np.isnan(by_group.auc)
    rows, total = int(by_group.rows[used].sum()), int(by_group.rows.sum())
    value = float(by_group.rows[used] @ by_group.auc[used]) / rows if rows else float("nan")
    coverage = rows / total if total else float("nan")
    return GroupedAuc(value, coverage, int(used.sum()), int((~used).sum()))


def select_probabilities(labels: Array, scores: Array, where: Array | None) -> tuple[Bools, Floats]:
    """As `select_rows`; a score outside [0, 1] is a UserError that names its row."""
    positive, scores, _ = select_rows(labels, scores, where)
    outside = (scores < 0) | (scores > 1)
    if outside.any():
        row = int(np.argmax(outside))
        raise UserError(f"selected row {row}: {scores[row]} is no probability; pass sigmoid(logit), not the logit")
    return positive, scores.astype(np.float64)


def row_losses(positive: Bools, probabilities: Floats) -> Floats:
    """Negative log-likelihood of each row in nats, unclipped: certain and wrong costs infinity."""
    with np.errstate(divide="ignore"):
        return 0.0 - np.where(positive, np.log(probabilities), np.log1p(-probabilities))


def log_loss(labels: Array, scores: Array, *, where: Array | None = None) -> float:
    """Mean negative log-likelihood in nats of probabilities [R]; nothing is clipped, so it may be infinite.

    Raises:
        UserError: a probability that is NaN or outside [0, 1], or a label other than 0 and 1.
    """
    losses = row_losses(*select_probabilities(labels, scores, where))
    return float(losses.mean()) if len(losses) else float("nan")


def equal_mass_bins(probabilities: Floats, bins: int) -> NDArray[np.int64]:
    """A bin number in [0, bins) per row. Bins hold equal numbers of rows, except that equal values share one bin."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if not len(probabilities):
        return np.zeros(0, np.int64)
    firsts = np.arange(1, bins) * len(probabilities) // bins
    edges = np.sort(probabilities)[firsts]
    return np.searchsorted(edges, probabilities, side="right")


def expected_calibration_error(labels: Array, scores: Array, *, where: Array | None = None, bins: int = 15) -> float:
    """ECE = sum over equal-mass bins of (share of rows) * |mean probability - share of positives|; NaN without rows."""
    positive, probabilities = select_probabilities(labels, scores, where)
    gaps = np.bincount(equal_mass_bins(probabilities, bins), weights=probabilities - positive)
    return float(np.abs(gaps).sum()) / len(positive) if len(positive) else float("nan")


def pcoc(labels: Array, scores: Array, *, where: Array | None = None) -> float:
    """Predicted over observed: mean probability / share of positives, 1 if unbiased; NaN without a positive."""
    positive, probabilities = select_probabilities(labels, scores, where)
    return float(probabilities.sum()) / int(positive.sum()) if positive.any() else float("nan")


def ranks_of(scores_BC: Array, target_B: Array, *, exclude: Array | None = None) -> Floats:
    """1-based rank of each row's target: 1 + (number above) + (number of others equal) / 2, by counting, no sort.

    Args:
        scores_BC: scores of C candidates [B, C]; higher is better.
        target_B: column of the target of each row, in [0, C).
        exclude: bool [B, C], candidates that do not compete; the target itself always does.

    Returns:
        float64 [B] in [1, C]; half-integers where an odd number of candidates tie with the target.

    Raises:
        ValueError: wrong shapes, or a target outside [0, C).
        UserError: a NaN score.
    """
    scores, target = np.asarray(scores_BC), np.asarray(target_B)
    if scores.ndim != 2 or target.shape != scores.shape[:1] or not np.issubdtype(target.dtype, np.integer):
        raise ValueError(f"need scores [B, C], integer targets [B]; got {scores.shape}, {target.dtype} {target.shape}")
    if exclude is not None:
        exclude = np.asarray(exclude)
        if exclude.dtype != bool or exclude.shape != scores.shape:
            raise ValueError(f"exclude must be bool {scores.shape}, got {exclude.dtype} {exclude.shape}")
    if np.any((target < 0) | (target >= scores.shape[1])):
        raise ValueError(f"targets must lie in [0, {scores.shape[1]})")
    ranks = np.empty(len(target))
    step = max(1, _BLOCK // max(1, scores.shape[1]))
    for start in range(0, len(target), step):
        rows = slice(start, start + step)
        ranks[rows] = _ranks_of_block(scores[rows], target[rows], None if exclude is None else exclude[rows], start)
    return ranks


def _ranks_of_block(scores: Array, target: Array, exclude: Array | None, first_row: int) -> Floats:
    missing = np.isnan(scores.max(axis=1))
    if missing.any():
        raise UserError(f"row {first_row + int(np.argmax(missing))}: a score is NaN; look for a diverged model")
    of_target = np.take_along_axis(scores, target[:, None], axis=1)
    above, equal = scores > of_target, scores == of_target
    np.put_along_axis(equal, target[:, None], False, axis=1)
    if exclude is not None:
        above &= ~exclude
        equal &= ~exclude
    return 1 + np.count_nonzero(above, axis=1) + np.count_nonzero(equal, axis=1) / 2


def hits(ranks: Array, k: int) -> Floats:
    """1 where rank <= k, else 0, per query. A mid-rank counts as it stands: 1.5 is a miss at k = 1, a hit at k = 2."""
    return (_checked_ranks(ranks, k) <= k).astype(np.float64)


def gains(ranks: Array, k: int) -> Floats:
    """1 / log2(rank + 1) where rank <= k, else 0, per query: DCG@k, and NDCG@k, since one target's ideal DCG is 1."""
    ranks = _checked_ranks(ranks, k)
    return np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0)


def reciprocal_ranks(ranks: Array) -> Floats:
    """1 / rank per query; 0 for an infinite rank."""
    return 1 / _checked_ranks(ranks, 1)


def recall_at_k(ranks: Array, k: int) -> float:
    """Share of targets found: mean of `hits`. Ranks are >= 1, possibly half-integer, or inf (not retrieved) [B]."""
    return _mean(hits(ranks, k))


def hit_rate_at_k(ranks: Array, k: int) -> float:
    """Share of queries with a target among the first k; equal to `recall_at_k`, as each query has one target."""
    return _mean(hits(ranks, k))


def ndcg_at_k(ranks: Array, k: int) -> float:
    """Mean of `gains`: NDCG@k with the standard discount 1 / log2(rank + 1) and one relevant item per query."""
    return _mean(gains(ranks, k))


def mrr(ranks: Array) -> float:
    """Mean reciprocal rank over all queries, uncut."""
    return _mean(reciprocal_ranks(ranks))


def _checked_ranks(ranks: Array, k: int) -> Floats:
    ranks = np.asarray(ranks, dtype=np.float64)
    if ranks.ndim != 1 or not np.all(ranks >= 1):
        raise ValueError(f"ranks must be a flat array of numbers >= 1, got shape {ranks.shape}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return ranks


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")
