"""Where targets stand among scored candidates, and the ranking metrics of these places.

Candidates that score the same as a target can be ordered in many ways. `places_of` gives the first and the last place that the target
may then have, and metrics of `Places` are their mean over all these ways: what breaking ties at random gives in expectation. So a
constant scorer has exactly the hit rate of chance, k / C. Metrics of a plain array take each rank as it stands.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma

from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.rows import Array, Floats

_BLOCK = 1 << 18  # elements of a block: what is computed of one stays in the cache


class Places(NamedTuple):
    """First and last 1-based place of each target, float64 [B], equal where nothing ties; both infinite where it has none."""

    first: Floats
    last: Floats


Ranks = Places | NDArray


def ranks_of(scores_BC: Array, target_B: Array, *, exclude: Array | None = None) -> Floats:
    """1-based mid-rank of each row's target: the mean of its first and last place, see `places_of`.

    Returns:
        float64 [B] in [1, C]; half-integers where an odd number of candidates tie with the target.
    """
    first_B, last_B = places_of(scores_BC, target_B, exclude=exclude)
    return (first_B + last_B) / 2


def places_of(scores_BC: Array, target_B: Array, *, exclude: Array | None = None) -> Places:
    """The places of each row's target: 1 + (number above) to that + (number of others equal), by counting, no sort.

    Args:
        scores_BC: scores of C candidates [B, C]; higher is better.
        target_B: column of the target of each row, in [0, C).
        exclude: bool [B, C], candidates that do not compete; the target itself always does.

    Returns:
        Whole numbers in [1, C].

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
    places = Places(np.empty(len(target)), np.empty(len(target)))
    step = max(1, _BLOCK // max(1, scores.shape[1]))
    for start in range(0, len(target), step):
        rows = slice(start, start + step)
        block = _places_of_block(scores[rows], target[rows], None if exclude is None else exclude[rows], start)
        places.first[rows], places.last[rows] = block
    return places


def _places_of_block(scores: Array, target: Array, exclude: Array | None, first_row: int) -> Places:
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
    above_B = _row_counts(above)
    # Counting the Trues of a whole block costs next to nothing: mostly nothing ties.
    if np.count_nonzero(level) - np.count_nonzero(above) == np.sum(np.broadcast_to(own, above_B.shape)):
        return Places(1.0 + above_B, 1.0 + above_B)
    return Places(1.0 + above_B, 1.0 + _row_counts(level) - own)


def _row_counts(mask: Array) -> Array:
    # Adding bytes is faster than counting Trues along an axis.
    return mask.view(np.int8).sum(axis=1, dtype=np.int32)


def hits(ranks: Ranks, k: int) -> Floats:
    """Probability that the place is among the first k, per query: 1 or 0 where nothing ties."""
    first, last = _checked_ranks(ranks, k)
    reached = first <= k
    first, last = first[reached], last[reached]
    probability = np.zeros(len(reached))
    probability[reached] = (np.minimum(last, k) - first + 1) / (last - first + 1)
    return probability


def gains(ranks: Ranks, k: int) -> Floats:
    """Expected 1 / log2(place + 1), 0 beyond k, per query: DCG@k, and NDCG@k, since one target's ideal DCG is 1."""
    first, last = _checked_ranks(ranks, k)
    values = np.where(first <= k, 1 / np.log2(first + 1), 0.0)
    tied = np.flatnonzero((first < last) & (first <= k))
    if len(tied):
        sums = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])  # of the first 0, 1, ... k places
        low, high = first[tied].astype(np.int64), np.minimum(last[tied], k).astype(np.int64)
        values[tied] = (sums[high] - sums[low - 1]) / (last[tied] - first[tied] + 1)
    return values


def reciprocal_ranks(ranks: Ranks, k: int | None = None) -> Floats:
    """Expected 1 / place per query; 0 for an infinite one, and beyond k where it is given."""
    first, last = _checked_ranks(ranks, 1 if k is None else k)
    most = np.inf if k is None else k
    values = np.where(first <= most, 1 / first, 0.0)
    tied = np.flatnonzero((first < last) & (first <= most))
    low, high = first[tied], np.minimum(last[tied], most)
    # The digamma function has the sums of reciprocals: 1/a + ... + 1/b = digamma(b + 1) - digamma(a).
    values[tied] = (digamma(high + 1) - digamma(low)) / (last[tied] - low + 1)
    return values


def recall_at_k(ranks: Ranks, k: int) -> float:
    """Share of targets found: mean of `hits`. Ranks are `Places`, or numbers >= 1 or inf (not retrieved) [B].

    NaN without queries, as all means here.
    """
    return _mean(hits(ranks, k))


def hit_rate_at_k(ranks: Ranks, k: int) -> float:
    """Share of queries with a target among the first k; equal to `recall_at_k`, as each query has one target."""
    return _mean(hits(ranks, k))


def precision_at_k(ranks: Ranks, k: int) -> float:
    """Share of targets among the first k places, mean over queries: `recall_at_k` / k, as each query has one target."""
    return _mean(hits(ranks, k)) / k


def ndcg_at_k(ranks: Ranks, k: int) -> float:
    """Mean of `gains`: NDCG@k with the standard discount 1 / log2(rank + 1) and one relevant item per query."""
    return _mean(gains(ranks, k))


def mrr(ranks: Ranks, k: int | None = None) -> float:
    """Mean reciprocal rank over all queries; uncut, or 0 for ranks beyond k."""
    return _mean(reciprocal_ranks(ranks, k))


def map_at_k(ranks: Ranks, k: int) -> float:
    """Mean average precision at k. With one target the only precision averaged is that at its rank: `mrr` cut at k."""
    return mrr(ranks, k)


def _checked_ranks(ranks: Ranks, k: int) -> Places:
    first, last = ranks if isinstance(ranks, Places) else (ranks, ranks)
    first, last = np.asarray(first, np.float64), np.asarray(last, np.float64)
    if first.ndim != 1 or first.shape != last.shape or not np.all((first >= 1) & (last >= first)):
        raise ValueError(f"ranks must be flat arrays of numbers >= 1, got shapes {first.shape} and {last.shape}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return Places(first, last)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")
