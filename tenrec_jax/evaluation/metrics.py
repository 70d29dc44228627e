"""Classification and ranking metrics: NumPy arrays in, floats out, exact in the presence of ties.

Binary metrics take flat arrays `labels` [R] (0/1 or bool) and `scores` [R], and `where` (bool [R]), which picks the
rows that count; the values of the other rows are never looked at. Ranking metrics take the 1-based rank of each query's
one target. A metric that is undefined on the given rows is NaN; no value is ever invented for it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.errors import UserError

_BLOCK = 1 << 18  # elements of a block: what is computed of one stays in the cache
_GROUP_BITS = 31  # of a sort key, above 32 bits of the score and one of the label

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


class Calibration(NamedTuple):
    """ECE, PCOC and the reliability curve: per bin with rows, rising, mean probability, share of positives and rows."""

    ece: float
    pcoc: float
    predicted: Floats
    observed: Floats
    rows: NDArray[np.int64]


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
    if np.count_nonzero(positive) + np.count_nonzero(labels == 0) < len(labels):
        row = int(np.argmin(positive | (labels == 0)))
        raise UserError(f"selected row {row}: label {labels[row]} is neither 0 nor 1")
    if len(scores) and np.isnan(scores.max()):  # the maximum is NaN if any is; no mask is made of sound scores
        row = int(np.argmax(np.isnan(scores)))
        raise UserError(f"selected row {row}: the score is NaN; look for a diverged model")
    return positive, scores, groups


def auc(labels: Array, scores: Array, *, where: Array | None = None, groups: Array | None = None) -> float:
    """Area under the ROC curve: P(positive above negative) + P(tie)/2 over all pairs (Mann-Whitney U, mid-ranks).

    Each class is sorted once, in the type of the scores; pairs are counted in integers, so the value is exact. Memory
    beyond the arguments: one copy of the selected scores and two bytes a row.

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
    negatives, positives = scores[~positive], scores[positive]
    if not len(negatives) or not len(positives):
        return float("nan")
    negatives.sort()
    positives.sort()
    few, many = (positives, negatives) if len(positives) <= len(negatives) else (negatives, positives)
    twice_above = 0  # exact: twice the number of pairs in which the element of `few` is above, ties counting one
    for start in range(0, len(few), _BLOCK):
        block = few[start : start + _BLOCK]
        low, high = np.searchsorted(many, block[0], "left"), np.searchsorted(many, block[-1], "right")
        twice_above += 2 * int(low) * len(block)
        for side in ("left", "right"):
            twice_above += int(np.searchsorted(many[low:high], block, side).sum(dtype=np.int64))
    pairs = len(few) * len(many)
    return (twice_above if few is positives else 2 * pairs - twice_above) / (2 * pairs)


def auc_by_group(labels: Array, scores: Array, groups: Array, where: Array | None = None) -> AucByGroup:
    """The AUC within each group, all groups in one pass; mid-ranks for ties.

    One sort of 64-bit keys (group, score, label) puts the rows of a group side by side and, among equal scores, the
    negatives first. A positive then stands above or level with the negatives of its group that come before it; half of
    the tied pairs are taken off. Everything is counted in integers, so the values are exact.
    """
    positive, scores, groups = select_rows(labels, scores, where, groups)
    if not len(groups):
        return AucByGroup(groups, np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    ids, keys = _group_codes(groups)
    keys <<= np.uint64(32)
    keys |= _order_codes(scores)
    keys <<= np.uint64(1)
    keys |= positive
    keys.sort()
    change = keys[1:] ^ keys[:-1]
    starts = np.append(0, 1 + np.flatnonzero(change >= np.uint64(1 << 33)))
    tied_at = 1 + np.flatnonzero(change == 1)  # first positives with the score of the negatives before them
    at = np.flatnonzero(keys.astype(np.uint8) & 1)  # the places of the positives
    bounds = np.append(np.searchsorted(at, starts), len(at))
    rows, positives = np.diff(starts, append=len(keys)), np.diff(bounds)
    # Before the i-th positive, at place p, stand p - i negatives; those of the groups before do not count.
    places = np.append(0, np.cumsum(at))[bounds]
    not_below = np.diff(places - bounds * (bounds - 1) // 2) - positives * (starts - bounds[:-1])
    tied_negatives = tied_at - np.searchsorted(keys, keys[tied_at - 1], "left")
    tied_positives = np.searchsorted(keys, keys[tied_at], "right") - tied_at
    group_of_tie = np.searchsorted(starts, tied_at, "right") - 1
    tied = np.bincount(group_of_tie, tied_negatives * tied_positives, minlength=len(starts))
    pairs = positives * (rows - positives)
    area = np.full(len(starts), np.nan)
    np.divide(2 * not_below - tied, 2 * pairs, out=area, where=pairs > 0)
    return AucByGroup(ids(keys[starts] >> np.uint64(33)), rows, positives, area)


def _group_codes(groups: Array) -> tuple[Callable[[Array], Array], NDArray[np.uint64]]:
    """Numbers below 2**31 in the order of the ids, uint64 [R], and the way back from numbers to ids."""
    low = groups.min()
    if np.issubdtype(groups.dtype, np.integer) and int(groups.max()) - int(low) < 1 << _GROUP_BITS:
        modulo = np.uint64(int(low) % 2**64)
        codes = groups.astype(np.uint64)
        codes -= modulo
        return lambda found: (found + modulo).astype(groups.dtype), codes
    distinct, places = np.unique(groups, return_inverse=True)
    return lambda found: distinct[found], places.astype(np.uint64)


def _order_codes(scores: Array) -> NDArray[np.uint32]:
    """Integers [R] in the order of the scores, equal where these are equal.

    What float32 holds exactly is read as bits: they rise with positive numbers and fall with negative ones. Other
    scores are numbered by their distinct values, which takes a sort.
    """
    with np.errstate(over="ignore"):
        narrow = scores.astype(np.float32, copy=False)
    if not np.can_cast(scores.dtype, np.float32) and not (scores.dtype.kind == "f" and np.array_equal(narrow, scores)):
        return np.unique(scores, return_inverse=True)[1].astype(np.uint32)
    bits = (narrow + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 is 0.0
    flip = bits.view(np.int32) >> 31
    flip |= np.int32(-(1 << 31))
    bits ^= flip.view(np.uint32)
    return bits


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


def select_probabilities(
    labels: Array, scores: Array, where: Array | None = None, groups: Array | None = None
) -> tuple[Bools, Floats, Array]:
    """As `select_rows`; a score outside [0, 1] is a UserError that names its row."""
    positive, scores, groups = select_rows(labels, scores, where, groups)
    outside = (scores < 0) | (scores > 1)
    if outside.any():
        row = int(np.argmax(outside))
        raise UserError(f"selected row {row}: {scores[row]} is no probability; pass sigmoid(logit), not the logit")
    return positive, scores.astype(np.float64), groups


def row_losses(positive: Bools, probabilities: Floats) -> Floats:
    """Negative log-likelihood of each row in nats, unclipped: certain and wrong costs infinity."""
    with np.errstate(divide="ignore"):
        return 0.0 - np.where(positive, np.log(probabilities), np.log1p(-probabilities))


def log_loss(labels: Array, scores: Array, *, where: Array | None = None, groups: Array | None = None) -> float:
    """Mean negative log-likelihood in nats of probabilities; nothing is clipped, so it may be infinite.

    Args:
        labels: 0/1 [R].
        scores: probabilities [R].
        where: rows that count, bool [R].
        groups: group ids [R]; with them the mean over groups of each one's mean, so that every group weighs the same.

    Returns:
        The mean, or NaN without rows.

    Raises:
        UserError: a probability that is NaN or outside [0, 1], or a label other than 0 and 1.
    """
    positive, probabilities, selected = select_probabilities(labels, scores, where, groups)
    if not len(positive):
        return float("nan")
    weights = np.ones(len(positive)) if groups is None else _row_weights(selected)
    return float((row_losses(positive, probabilities) * weights).sum()) / float(weights.sum())


def _row_weights(groups: Array) -> Floats:
    """Weights of rows by which every group weighs the same: one over the rows of the row's group."""
    _, number, rows = np.unique(groups, return_inverse=True, return_counts=True)
    return 1 / rows[number]


def equal_mass_bins(probabilities: Floats, bins: int) -> NDArray[np.int64]:
    """A bin number in [0, bins) per row. Bins hold equal numbers of rows, except that equal values share one bin."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if not len(probabilities):
        return np.zeros(0, np.int64)
    firsts = np.arange(1, bins) * len(probabilities) // bins
    edges = np.sort(probabilities)[firsts]
    return np.searchsorted(edges, probabilities, side="right")


def calibration(
    labels: Array, scores: Array, *, where: Array | None = None, groups: Array | None = None, bins: int = 15
) -> Calibration:
    """Do predicted probabilities agree with frequencies? ECE, PCOC and the reliability curve, by `equal_mass_bins`.

    ECE = sum over bins of (share of rows) * |mean probability - share of positives| (Naeini et al. 2015, with bins of
    equal mass); PCOC = mean probability / share of positives, 1 if unbiased.

    Args:
        labels: 0/1 [R].
        scores: probabilities [R].
        where: rows that count, bool [R].
        groups: group ids [R]; with them rows are weighted so that every group weighs the same, in all means and shares.
            The bins stay those of the rows.
        bins: at most this many.

    Returns:
        ECE is NaN without rows and PCOC without a positive; the curve leaves out bins without rows.

    Raises:
        UserError: a probability that is NaN or outside [0, 1], or a label other than 0 and 1.
    """
    positive, probabilities, selected = select_probabilities(labels, scores, where, groups)
    weights = np.ones(len(positive)) if groups is None else _row_weights(selected)
    number = equal_mass_bins(probabilities, bins)
    rows = np.bincount(number)
    used = rows > 0
    mass = np.bincount(number, weights)[used]
    gaps = np.bincount(number, weights * (probabilities - positive))[used]
    predicted = np.bincount(number, weights * probabilities)[used]
    observed = np.bincount(number, weights * positive)[used]
    ece = float(np.abs(gaps).sum()) / float(mass.sum()) if len(mass) else float("nan")
    pcoc = float(predicted.sum()) / float(observed.sum()) if positive.any() else float("nan")
    return Calibration(ece, pcoc, predicted / mass, observed / mass, rows[used])


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
    if np.isnan(scores.max(initial=-np.inf)):
        row = first_row + int(np.argmax(np.isnan(scores.max(axis=1))))
        raise UserError(f"row {row}: a score is NaN; look for a diverged model")
    of_target = np.take_along_axis(scores, target[:, None], axis=1)
    above, level = scores > of_target, scores >= of_target
    own: Array | int = 1  # the target is level with itself
    if exclude is not None:
        above &= ~exclude
        level &= ~exclude
        own = 1 - np.take_along_axis(exclude, target[:, None], axis=1)[:, 0].astype(np.int32)
    # Adding bytes and then rows once is faster than counting Trues along an axis twice.
    twice = np.add(above.view(np.int8), level.view(np.int8)).sum(axis=1, dtype=np.int32)
    return 1 + (twice - own) / 2


def hits(ranks: Array, k: int) -> Floats:
    """1 where rank <= k, else 0, per query. A mid-rank counts as it stands: 1.5 is a miss at k = 1, a hit at k = 2."""
    return (_checked_ranks(ranks, k) <= k).astype(np.float64)


def gains(ranks: Array, k: int) -> Floats:
    """1 / log2(rank + 1) where rank <= k, else 0, per query: DCG@k, and NDCG@k, since one target's ideal DCG is 1."""
    ranks = _checked_ranks(ranks, k)
    return np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0)


def reciprocal_ranks(ranks: Array, k: int | None = None) -> Floats:
    """1 / rank per query; 0 for an infinite rank, and beyond k where it is given."""
    ranks = _checked_ranks(ranks, 1 if k is None else k)
    return np.where(ranks <= (np.inf if k is None else k), 1 / ranks, 0.0)


def recall_at_k(ranks: Array, k: int) -> float:
    """Share of targets found: mean of `hits`. Ranks are >= 1, possibly half-integer, or inf (not retrieved) [B].

    NaN without queries, as all means here.
    """
    return _mean(hits(ranks, k))


def hit_rate_at_k(ranks: Array, k: int) -> float:
    """Share of queries with a target among the first k; equal to `recall_at_k`, as each query has one target."""
    return _mean(hits(ranks, k))


def precision_at_k(ranks: Array, k: int) -> float:
    """Share of targets among the first k places, mean over queries: `recall_at_k` / k, as each query has one target."""
    return _mean(hits(ranks, k)) / k


def ndcg_at_k(ranks: Array, k: int) -> float:
    """Mean of `gains`: NDCG@k with the standard discount 1 / log2(rank + 1) and one relevant item per query."""
    return _mean(gains(ranks, k))


def mrr(ranks: Array, k: int | None = None) -> float:
    """Mean reciprocal rank over all queries; uncut, or 0 for ranks beyond k."""
    return _mean(reciprocal_ranks(ranks, k))


def map_at_k(ranks: Array, k: int) -> float:
    """Mean average precision at k. With one target the only precision averaged is that at its rank: `mrr` cut at k."""
    return mrr(ranks, k)


def _checked_ranks(ranks: Array, k: int) -> Floats:
    ranks = np.asarray(ranks, dtype=np.float64)
    if ranks.ndim != 1 or not np.all(ranks >= 1):
        raise ValueError(f"ranks must be a flat array of numbers >= 1, got shape {ranks.shape}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return ranks


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")
