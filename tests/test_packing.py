"""Packing against its own rules, and against the least number of rows that can hold the slots."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tenrec_jax.data.packing import pack


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=200), st.integers(1, 500))
def test_every_timeline_gets_one_place_and_no_two_overlap(lengths: list[int], most: int) -> None:
    packs = pack(np.asarray(lengths), most)
    assert sorted(packs.length.tolist()) == sorted(lengths)
    assert packs.row_length <= max(most, max(lengths))
    assert packs.rows == len(packs.offset) - 1
    for row in range(packs.rows):
        places = slice(packs.offset[row], packs.offset[row + 1])
        start, length = packs.start[places], packs.length[places]
        assert start[0] == 0
        np.testing.assert_array_equal(start[1:], (start + length)[:-1])
        assert start[-1] + length[-1] <= packs.row_length
    assert packs.places == np.diff(packs.offset).max()
    assert packs.padding == 1 - sum(lengths) / (packs.rows * packs.row_length)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7))
def test_rows_are_at_most_what_best_fit_promises(lengths: list[int]) -> None:
    # Best fit from the longest on needs at most 11/9 of the fewest rows, rounded up (Dosa, 2007: 11/9 and 6/9 of a row more).
    packs = pack(np.asarray(lengths), 1)
    assert packs.row_length == max(lengths)
    assert packs.rows <= 11 / 9 * fewest_rows(lengths, max(lengths)) + 6 / 9


def fewest_rows(lengths: list[int], row_length: int) -> int:
    """By trying: the first timeline shares its row with every set of others that fits."""
    if not lengths:
        return 0
    others = lengths[1:]
    return 1 + min(
        fewest_rows([length for i, length in enumerate(others) if not chosen >> i & 1], row_length)
        for chosen in range(1 << len(others))
        if lengths[0] + sum(length for i, length in enumerate(others) if chosen >> i & 1) <= row_length
    )


def test_rows_grow_where_the_longest_timeline_would_leave_them_half_empty() -> None:
    lengths = np.full(1000, 33)
    lengths[0] = 50
    assert pack(lengths, 50).padding > 0.3
    grown = pack(lengths, 500)
    assert grown.row_length > 50
    assert grown.padding <= 0.15


def test_millions_of_timelines_are_packed_by_their_histogram() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 1, 1_000_000), 1, 512).astype(int)
    packs = pack(lengths, 4096)
    assert packs.padding < 0.01
    np.testing.assert_array_equal(np.bincount(packs.length), np.bincount(lengths))
