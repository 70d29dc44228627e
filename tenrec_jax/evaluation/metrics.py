"""Classification and ranking metrics: NumPy arrays in, floats out, exact in the presence of ties.

Binary metrics take flat arrays `labels` [R] (0/1 or bool) and `scores` [R], and `where` (bool [R]), which picks the
rows that count; the values of the other rows are never looked at. Ranking metrics take the 1-based rank of each query's
one target, metrics of lists recommended items [U, K]. A metric that is undefined on the given rows is NaN; no value is
ever invented for it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.data.stats import concentration
from tenrec_jax.evaluation.group_auc import AucByGroup, auc_by_group
from tenrec_jax.evaluation.places import (
    Places,
    gains,
    hit_rate_at_k,
    hits,
    map_at_k,
    mrr,
    ndcg_at_k,
    places_of,
    precision_at_k,
    ranks_of,
    recall_at_k,
    reciprocal_ranks,
)
from tenrec_jax.evaluation.rows import Array, Bools, Floats, select_probabilities, select_rows

__all__ = [
    "AucByGroup",
    "Calibration",
    "GroupedAuc",
    "Places",
    "auc",
    "auc_by_group",
    "calibration",
    "coverage",
    "equal_mass_bins",
    "gains",
    "gini",
    "grouped_auc",
    "hit_rate_at_k",
    "hits",
    "log_loss",
    "map_at_k",
    "mrr",
    "ndcg_at_k",
    "novelty",
    "places_of",
    "precision_at_k",
    "ranks_of",
    "recall_at_k",
    "reciprocal_ranks",
    "row_losses",
    "select_probabilities",
    "select_rows",
    "self_information",
]

_BLOCK = 1 << 18  # elements of a block: what is computed of one stays in the cache


class GroupedAuc(NamedTuple):
    """GAUC with what it rests on: coverage is the share of the rows that lie in groups having both labels."""

    value: float
    coverage: float
    groups_used: int
    groups_skipped: int


class Calibration(NamedTuple):
    """ECE, PCOC and the reliability curve: per bin with rows, rising, mean probability, share of positives and rows."""

    ece: float
    pcoc: float
    predicted: Floats
    observed: Floats
    rows: NDArray[np.int64]


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


def coverage(items_UK: Array, num_items: int) -> float:
    """Share of the catalogue's items 1..N that stand in at least one list; 0 in a list is no item."""
    return np.count_nonzero(_times_listed(items_UK, num_items)) / num_items


def gini(items_UK: Array, num_items: int) -> float:
    """Gini coefficient of how often each of the catalogue's items is listed: 0 if all are alike, near 1 if few have all places.

    NaN without a listed item.
    """
    times_N = _times_listed(items_UK, num_items)
    return concentration(times_N).gini if times_N.any() else float("nan")


def self_information(counts_N1: Array) -> Floats:
    """Bits of surprise of each item [N+1]: -log2 of its share of the training rows, with one row more for each item (Laplace's rule), so
    that new items have a finite value. Entry 0, no item, is 0.
    """
    bits_N1 = np.zeros(len(counts_N1))
    bits_N1[1:] = np.log2(counts_N1[1:].sum() + len(counts_N1) - 1) - np.log2(counts_N1[1:] + 1.0)
    return bits_N1


def novelty(items_UK: Array, counts_N1: Array) -> float:
    """Mean self-information of listed items in bits (Zhou et al. 2010): high where lists hold what few have seen. NaN without any."""
    listed = items_UK[items_UK > 0]
    return float(self_information(counts_N1)[listed].mean()) if len(listed) else float("nan")


def _times_listed(items_UK: Array, num_items: int) -> NDArray[np.int64]:
    items = np.asarray(items_UK).ravel()
    if items.size and not (items.min() >= 0 and items.max() <= num_items):
        raise ValueError(
            f"lists hold items from {items.min()} to {items.max()}; the catalogue has 1..{num_items}, 0 is none"
        )
    return np.bincount(items, minlength=num_items + 1)[1:]
