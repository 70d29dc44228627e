"""Which items training makes unknown: those that a part of the rows would not have held."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenrec_jax.data.unknown import UnknownRates


@given(st.floats(0.001, 0.9), st.lists(st.integers(0, 10_000), min_size=1, max_size=30).filter(any))
def test_the_rows_made_unknown_are_the_share_and_the_rarer_items_are_more_often(share: float, rows: list[int]) -> None:
    rows_N1 = np.array([0, *rows])
    rates = UnknownRates.of(share, rows_N1)
    assert rates.user == share
    assert (rates.item_N1 * rows_N1).sum() == pytest.approx(share * rows_N1.sum())
    known = np.flatnonzero(rows_N1)
    assert not rates.item_N1[rows_N1 == 0].any()
    assert (np.diff(rates.item_N1[known[np.argsort(rows_N1[known])]]) <= 0).all()


def test_they_are_as_frequent_as_items_of_which_a_thinned_log_keeps_nothing() -> None:
    random = np.random.default_rng(0)
    rows_N1 = np.array([0, *random.geometric(0.2, 500)])
    rates = UnknownRates.of(0.1, rows_N1)
    lost = rates.item_N1[rows_N1 == 1][0]
    gone = np.mean([random.binomial(rows_N1, 1 - lost) == 0 for _ in range(4_000)], axis=0)
    np.testing.assert_allclose(gone[1:], rates.item_N1[1:], atol=0.03)
