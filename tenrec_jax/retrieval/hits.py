"""Hits of a search, and the packed keys in which the best of them are kept: rising keys are falling scores, then rising item ids."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]
Keys = NDArray[np.uint64]

NO_KEY = np.uint64(2**64 - 1)


class SearchResult(NamedTuple):
    """Hits per query: inner products [B, K] float32 (-inf: none) and dense item ids [B, K] int32 (0: none)."""

    scores_BK: Floats
    items_BK: Ids


Allowed = Callable[[Ids], NDArray[np.bool_]]


class AllowedHits(NamedTuple):
    """Hits of one query that a condition allows, best first: scores [C] and item ids [C]; and those refused before the last of them [R]."""

    scores_C: Floats
    items_C: Ids
    refused_R: Ids

    @classmethod
    def none(cls) -> "AllowedHits":
        """No hits."""
        return cls(np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.int32))

    @classmethod
    def of(cls, scores: Floats, items: Ids, allowed: Allowed, k: int) -> "AllowedHits":
        """The first k allowed among hits in order [n]."""
        kept = allowed(items)
        places = np.flatnonzero(kept)[:k]
        end = places[-1] + 1 if len(places) == k else len(items)
        return cls(scores[places], items[places], items[:end][~kept[:end]])


def is_among(items: Ids, ascending: Ids) -> NDArray[np.bool_]:
    """Which of a few items [n] are among many distinct ascending ones, by bisection: the time hardly grows with their number."""
    if not len(ascending):
        return np.zeros(len(items), bool)
    return ascending[np.minimum(np.searchsorted(ascending, items), len(ascending) - 1)] == items


def packed(scores: Floats, items: Ids) -> Keys:
    """The score's bits, made monotone, above the item id."""
    bits = (scores + np.float32(0)).view(np.uint32)  # the sum turns -0.0 into 0.0
    falling = ~bits ^ ((~(bits >> 31) + np.uint32(1)) | np.uint32(1 << 31))
    return (falling.astype(np.uint64) << np.uint64(32)) | items.astype(np.uint64)


def unpacked(keys: Keys) -> tuple[Floats, Ids]:
    """Scores and item ids of packed keys."""
    rising = ~(keys >> np.uint64(32)).astype(np.uint32)
    bits = rising ^ (((rising >> 31) - np.uint32(1)) | np.uint32(1 << 31))
    return bits.view(np.float32), (keys & np.uint64(2**32 - 1)).astype(np.uint32).view(np.int32)


def best_of(best: Keys, scores: Floats, items: Ids) -> Keys:
    """The best [B, K] keys of those held and of a block of scores [B, n]; only scores that may enter are packed."""
    worst = best.max(axis=1)
    bar = np.where(worst == NO_KEY, -np.inf, unpacked(worst)[0])
    # Twenty times as fast as nonzero of the matrix.
    row, column = np.divmod(np.flatnonzero(scores >= bar[:, None]), scores.shape[1])
    if not len(row):
        return best
    entering = np.bincount(row, minlength=len(best))
    place = np.arange(len(row)) - np.repeat(np.cumsum(entering) - entering, entering)
    candidates = np.full((len(best), best.shape[1] + entering.max()), NO_KEY)
    candidates[:, : best.shape[1]] = best
    candidates[row, best.shape[1] + place] = packed(scores[row, column], items[column])
    candidates.partition(best.shape[1] - 1, axis=1)
    return candidates[:, : best.shape[1]]


def sorted_hits(keys: Keys, k: int) -> SearchResult:
    """The first k of packed hits [B, n] in order, padded with "no item"."""
    result = np.full((len(keys), k), NO_KEY)
    kept = np.sort(keys, axis=1)[:, :k]
    result[:, : kept.shape[1]] = kept
    scores, items = unpacked(result)
    return SearchResult(np.where(result == NO_KEY, -np.inf, scores), np.where(result == NO_KEY, 0, items))


def share_found(found: SearchResult, truth: SearchResult) -> float:
    """Recall: the share of the true hits that were found, over all queries; a hit level with the last true one is one of them."""
    row = np.arange(len(truth.items_BK), dtype=np.int64)[:, None] << 32
    member = np.isin(found.items_BK + row, truth.items_BK + row)
    last = np.where(truth.items_BK > 0, truth.scores_BK, np.inf).min(axis=1, keepdims=True)
    tied = found.scores_BK >= last - 1e-6 * np.abs(last)
    return int(((member | tied) & (found.items_BK > 0)).sum()) / int((truth.items_BK > 0).sum())
