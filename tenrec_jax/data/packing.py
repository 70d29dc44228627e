"""Packing timelines of many lengths into rows of one length, so that next to nothing is padding and one compiled step serves all.

Packing works on the histogram of lengths (Krell et al., 2021, arXiv:2107.02027, section 3.1), here by best fit from the longest on: its
cost depends on the number of distinct lengths, not on the number of timelines.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from typing import NamedTuple

import numpy as np

MAX_PADDING, MAX_GROWTH = 0.15, 8


class Packs(NamedTuple):
    """Rows and the places in them, for P timelines in R rows.

    Attributes:
        row_length: slots of a row.
        offset: the places of row r are offset[r]:offset[r + 1], [R + 1].
        start: first slot of each place in its row, ascending within a row, [P].
        length: slots of each place, [P].
    """

    row_length: int
    offset: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @property
    def rows(self) -> int:
        """R."""
        return len(self.offset) - 1

    @property
    def places(self) -> int:
        """The most places in a row."""
        return int(np.diff(self.offset).max(initial=0))

    @property
    def padding(self) -> float:
        """Share of the slots that hold nothing."""
        return 1 - float(self.length.sum()) / (self.rows * self.row_length)


def pack(lengths: np.ndarray, most: int, max_padding: float = MAX_PADDING) -> Packs:
    """Pack timelines into the shortest rows that keep padding low.

    Args:
        lengths: slots of each timeline, at least 1, [P].
        most: slots of a row, at most; the longest timeline is taken even if it is longer.
        max_padding: rows are lengthened, up to `MAX_GROWTH` times the longest timeline, until the share of padding is at most this.
    """
    counts = np.bincount(lengths)
    longest = len(counts) - 1
    packs = _pack(counts, longest)
    growth = 2
    while packs.padding > max_padding and growth <= MAX_GROWTH and growth * longest <= most:
        longer = _pack(counts, growth * longest)
        packs = longer if longer.padding < packs.padding else packs
        growth *= 2
    return packs


def _pack(counts: np.ndarray, row_length: int) -> Packs:
    """Best fit from the longest timelines on. `counts` is the number of timelines of each length."""
    patterns: dict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(
        list
    )  # by free slots: lengths in a row, number of rows
    spaces: list[int] = []  # the keys that have rows, ascending

    def put(pattern: tuple[int, ...], rows: int, space: int) -> None:
        if rows:
            if not patterns[space]:
                insort(spaces, space)
            patterns[space].append((pattern, rows))

    pattern: tuple[int, ...]
    for length in range(len(counts) - 1, 0, -1):
        left = int(counts[length])
        while left:
            place = bisect_left(spaces, length)
            if place == len(spaces):
                pattern, rows, space = (), left, row_length
            else:
                space = spaces[place]
                pattern, rows = patterns[space].pop()
                if not patterns[space]:
                    del spaces[place]
            copies = min(space // length, left)
            filled = min(rows, left // copies)
            put((*pattern, *(length,) * copies), filled, space - copies * length)
            left -= filled * copies
            # New rows are made as they are needed; those that were there go back.
            put(pattern, rows - filled if pattern else 0, space)
    return _laid_out([entry for space in sorted(patterns) for entry in patterns[space]], row_length)


def _laid_out(patterns: list[tuple[tuple[int, ...], int]], row_length: int) -> Packs:
    numbers = np.concatenate([np.full(rows, len(pattern)) for pattern, rows in patterns])
    length = np.concatenate([np.tile(np.asarray(pattern, np.int32), rows) for pattern, rows in patterns])
    offset = np.concatenate([[0], np.cumsum(numbers)])
    before = np.concatenate([[0], np.cumsum(length, dtype=np.int64)])[:-1]
    start = (before - np.repeat(before[offset[:-1]], numbers)).astype(np.int32)
    return Packs(row_length, offset, start, length)
