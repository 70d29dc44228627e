"""Going over a long table in stretches that fit the memory."""

from collections.abc import Iterator

import numpy as np

BLOCK_ROWS = 1 << 22


def row_blocks(num_rows: int) -> Iterator[slice]:
    """Stretches of `BLOCK_ROWS` rows."""
    return (slice(start, min(start + BLOCK_ROWS, num_rows)) for start in range(0, num_rows, BLOCK_ROWS))


def user_blocks(offsets: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Stretches of whole users of at most `BLOCK_ROWS` rows, or of one user: the users and their rows.

    Args:
        offsets: where each user's rows begin, and one entry more; int64 [U + 1].
    """
    first = 0
    while first < len(offsets) - 1:
        end = int(np.searchsorted(offsets, offsets[first] + BLOCK_ROWS, side="right")) - 1
        end = max(first + 1, end)
        yield slice(first, end), slice(int(offsets[first]), int(offsets[end]))
        first = end


def place_in_block(offsets: np.ndarray) -> np.ndarray:
    """Position of each row in its user's stretch, from 0."""
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))


def stretches(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places start[i] .. stop[i] - 1 of all i, one stretch after the other: the i and the place of each."""
    number, length = np.arange(len(start)), stop - start
    within = place_in_block(np.concatenate([[0], np.cumsum(length)]))
    return np.repeat(number, length), np.repeat(start, length) + within


def process_rows(rows: int, process_index: int, process_count: int) -> slice:
    """The stretch of a batch's rows that is one process's.

    Raises:
        ValueError: the rows cannot be divided by the number of processes.
    """
    if rows % process_count:
        raise ValueError(f"{rows} rows cannot be divided by {process_count} processes")
    share = rows // process_count
    return slice(process_index * share, (process_index + 1) * share)
