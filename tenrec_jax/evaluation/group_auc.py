"""The AUC within each group, such as a user."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.evaluation.rows import Array, Floats, select_rows

_GROUP_BITS = 31  # of a sort key, above 32 bits of the score and one of the label
_PART_ROWS = 1 << 19  # fewer rows are not worth a thread
_SAMPLE = 1 << 12

Keys = NDArray[np.uint64]


class AucByGroup(NamedTuple):
    """One entry per group, in rising order of its id: rows, positives and AUC (NaN where one label is absent)."""

    groups: NDArray[np.integer]
    rows: NDArray[np.int64]
    positives: NDArray[np.int64]
    auc: Floats


def auc_by_group(labels: Array, scores: Array, groups: Array, where: Array | None = None) -> AucByGroup:
    """The AUC within each group, all groups in one pass; mid-ranks for ties.

    One sort of 64-bit keys (group, score, label) puts the rows of a group side by side and, among equal scores, the
    negatives first. A positive then stands above or level with the negatives of its group that come before it; half of
    the tied pairs are taken off. Everything is counted in integers, so the values are exact. Groups are independent: the
    cores share them, by ranges of their numbers.
    """
    positive, scores, groups = select_rows(labels, scores, where, groups)
    if not len(groups):
        return AucByGroup(groups, np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    ids, keys = _group_codes(groups)
    keys <<= np.uint64(32)
    keys |= _order_codes(scores)
    keys <<= np.uint64(1)
    keys |= positive
    found = _count_in_parts(keys, min(os.cpu_count() or 1, len(keys) // _PART_ROWS))
    return found._replace(groups=ids(found.groups))


def _count_in_parts(keys: Keys, parts: int) -> AucByGroup:
    """As `_count`, in about so many threads."""
    borders = _borders(keys, parts)
    if not len(borders):
        return _count(keys)
    bounds = [np.uint64(0), *borders, np.uint64(2**64 - 1)]

    def count(low: np.uint64, high: np.uint64) -> AucByGroup:
        return _count(keys[(keys >= low) & (keys < high)])

    with ThreadPoolExecutor(len(bounds) - 1) as pool:
        found = pool.map(count, bounds[:-1], bounds[1:])
        return AucByGroup(*map(np.concatenate, zip(*found, strict=True)))


def _borders(keys: Keys, parts: int) -> Keys:
    """Keys at which groups begin, that divide the rows into about equal parts; found in a sample."""
    if parts < 2:
        return np.zeros(0, np.uint64)
    group = np.sort(keys[:: max(1, len(keys) // _SAMPLE)] >> np.uint64(33))
    return np.unique(group[np.arange(1, parts) * len(group) // parts]) << np.uint64(33)


def _count(keys: Keys) -> AucByGroup:
    """What the keys of whole groups tell, with the numbers of the groups; sorts them in place."""
    if not len(keys):
        return AucByGroup(keys, np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
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
    return AucByGroup(keys[starts] >> np.uint64(33), rows, positives, area)


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
