"""Parts of rows merged in any order, against the metrics of all rows at once; sums against math.fsum."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenrec_jax.errors import UserError
from tenrec_jax.evaluation import metrics, user_metrics
from tenrec_jax.evaluation.mergeable import ExactMean, LabelCounts, TargetPlaces
from tenrec_jax.evaluation.places import Places


def merged_in_parts(data, make, size):
    """The rows in random parts, some of them empty, merged pair by pair in random order."""
    part = np.asarray(data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size)), int)
    parts = [make(np.flatnonzero(part == number)) for number in range(5)]
    while len(parts) > 1:
        one = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        other = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts.append(one.merge(other))
    return parts[0]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False)), st.data())
def test_sums_are_exact_in_any_division(values, data):
    values = np.asarray(values, float)
    merged = merged_in_parts(data, lambda rows: ExactMean.of(values[rows]), len(values))
    assert merged == ExactMean.of(values)
    try:
        expected = math.fsum(values)
    except OverflowError:
        return
    assert merged.total == expected


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=16), min_size=1))
def test_the_mean_is_that_of_exact_fractions_rounded_once(values):
    exact = sum(int(value * 2**24) for value in values)  # half precision has no finer steps
    assert ExactMean.of(np.asarray(values)).value == exact / (len(values) << 24)


def test_infinite_values_count_and_what_is_no_number_is_refused():
    assert ExactMean.of(np.array([1.0, np.inf])).value == math.inf
    assert math.isnan(ExactMean().value)
    for bad in (np.nan, -np.inf):
        with pytest.raises(ValueError, match="numbers"):
            ExactMean.of(np.array([0.0, bad]))


@st.composite
def labelled_rows(draw):
    size = draw(st.integers(0, 40))
    labels = draw(hnp.arrays(np.int8, size, elements=st.integers(0, 1)))
    scores = draw(
        hnp.arrays(np.float64, size, elements=st.sampled_from([0.0, -0.0, 0.25, 1.0]) | st.floats(0.01, 0.99))
    )
    users = draw(hnp.arrays(np.int64, size, elements=st.integers(-1, 4)))
    return labels, scores, users


@given(labelled_rows(), st.data())
def test_binary_metrics_of_merged_parts_are_those_of_all_rows_bit_for_bit(rows, data):
    labels, scores, users = rows
    whole = LabelCounts.of(labels, scores, users)
    merged = merged_in_parts(data, lambda r: LabelCounts.of(labels[r], scores[r], users[r]), len(labels))
    for one, other in zip(merged._columns, whole._columns, strict=True):
        np.testing.assert_array_equal(one, other)
    values = merged.values()
    np.testing.assert_equal(tuple(values), tuple(whole.values()))
    grouped = metrics.grouped_auc(labels, scores, groups=users)
    assert values.rows == len(labels)
    np.testing.assert_equal(values.auc, metrics.auc(labels, scores))
    np.testing.assert_equal((values.gauc, values.gauc_coverage), (grouped.value, grouped.coverage))
    calibration = metrics.calibration(labels, scores)
    expected = metrics.log_loss(labels, scores), calibration.ece, calibration.pcoc
    assert (values.log_loss, values.ece, values.pcoc) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_without_groups_rows_are_of_one_and_wrong_rows_are_refused():
    values = LabelCounts.of(np.array([0, 1, 1]), np.array([0.1, 0.2, 0.05])).values()
    assert values.auc == values.gauc == 0.5
    with pytest.raises(UserError, match="no probability"):
        LabelCounts.of(np.array([0]), np.array([1.5]))


@given(st.integers(0, 30), st.integers(0, 2**32 - 1), st.data())
def test_retrieval_metrics_of_merged_parts_are_those_of_all_targets_bit_for_bit(size, seed, data):
    generator = np.random.default_rng(seed)
    user, item = generator.integers(1, 5, size), generator.integers(1, 9, size)
    first = item.astype(float) * generator.choice([1.0, 3.0])  # equal items stand in equal places
    places = Places(first, first + item % 3)
    merged = merged_in_parts(
        data, lambda r: TargetPlaces.of(user[r], item[r], Places(first[r], places.last[r])), size
    ).values()
    np.testing.assert_equal(merged, TargetPlaces.of(user, item, places).values())
    _, values = user_metrics.retrieval_metrics(user, item, places)
    for name, value_U in values.items():
        assert merged[name] == pytest.approx(value_U.mean() if size else math.nan, abs=1e-12, nan_ok=True)
