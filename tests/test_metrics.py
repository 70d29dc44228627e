"""Metrics against scikit-learn, brute force over pairs, and hand-computed values; ties and absent classes included."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from tenrec_jax.errors import UserError
from tenrec_jax.evaluation import group_auc, metrics

few_values = st.sampled_from([-np.inf, -2.0, -0.0, 0.0, 0.1, 0.5, 1.0, np.inf])
sizes = st.integers(2, 60)


@st.composite
def scored_rows(draw):
    """Labels, scores with many ties, user ids and a mask, of one length."""
    size = draw(sizes)
    labels = draw(hnp.arrays(np.int8, size, elements=st.integers(0, 1)))
    scores = draw(hnp.arrays(np.float64, size, elements=few_values | st.floats(-1, 1, width=32)))
    users = draw(hnp.arrays(np.int32, size, elements=st.integers(-1, 5)))
    where = draw(hnp.arrays(bool, size))
    return labels, scores, users, where


def auc_over_pairs(labels, scores):
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p, y in zip(scores, labels, strict=True)
        for n, z in zip(scores, labels, strict=True)
        if y == 1 and z == 0
    ]
    return float(np.mean(wins)) if wins else math.nan


@given(scored_rows())
def test_auc_equals_the_share_of_ordered_pairs_and_scikit_learn(rows):
    labels, scores, _, _ = rows
    value = metrics.auc(labels, scores)
    assert value == pytest.approx(auc_over_pairs(labels, scores), abs=1e-9, nan_ok=True)
    if 0 < labels.sum() < len(labels) and np.isfinite(scores).all():
        assert value == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)


@given(scored_rows())
def test_auc_depends_on_the_order_alone_and_turns_over_with_the_scores(rows):
    labels, scores, _, _ = rows
    value = metrics.auc(labels, scores)
    assert metrics.auc(labels, np.unique(scores, return_inverse=True)[1]) == pytest.approx(value, abs=0, nan_ok=True)
    assert metrics.auc(labels, -scores) == pytest.approx(1 - value, abs=1e-12, nan_ok=True)


def test_auc_agrees_with_scikit_learn_on_float32_scores_and_a_rare_class():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=200_000).astype(np.float32).round(2)
    for rate in (0.003, 0.997):
        labels = generator.random(len(scores)) < rate
        assert metrics.auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auc_does_not_depend_on_the_block_size(monkeypatch):
    generator = np.random.default_rng(3)
    labels, scores = generator.integers(0, 2, 300), generator.integers(0, 9, 300).astype(np.float32)
    for block in (1, 7, 50):
        monkeypatch.setattr(metrics, "_BLOCK", block)
        for targets in (labels, 1 - labels):
            assert metrics.auc(targets, scores) == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)


@given(st.floats(allow_nan=False), st.integers(1, 50), st.integers(1, 50))
def test_a_constant_scorer_has_an_auc_and_gauc_of_exactly_one_half(value, positives, negatives):
    labels = np.repeat([1, 0], [positives, negatives])
    scores = np.full(len(labels), value)
    assert metrics.auc(labels, scores) == 0.5
    assert metrics.grouped_auc(labels, scores, groups=np.zeros(len(labels), int)).value == 0.5


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0], []])
def test_metrics_that_need_an_absent_class_are_nan(labels):
    labels, scores = np.array(labels, dtype=np.int8), np.full(len(labels), 0.25)
    groups = np.zeros(len(labels), int)
    assert math.isnan(metrics.auc(labels, scores))
    assert math.isnan(metrics.auc(labels, scores, groups=groups))
    assert math.isnan(metrics.grouped_auc(labels, scores, groups=groups).value)
    assert metrics.grouped_auc(labels, scores, groups=groups).groups_skipped == (len(labels) > 0)
    calibration = metrics.calibration(labels, scores)
    assert math.isnan(calibration.pcoc) == (labels.sum() == 0)
    assert math.isnan(calibration.ece) == (len(labels) == 0)
    assert len(calibration.rows) == (len(labels) > 0)
    assert math.isnan(metrics.log_loss(labels, scores)) == (len(labels) == 0)
    assert math.isnan(metrics.log_loss(labels, scores, groups=groups)) == (len(labels) == 0)


@given(scored_rows())
def test_grouped_auc_is_the_row_weighted_mean_over_users_with_both_labels(rows):
    labels, scores, users, _ = rows
    total = weight = skipped = 0
    for user in np.unique(users):
        mine = users == user
        value = auc_over_pairs(labels[mine], scores[mine])
        if math.isnan(value):
            skipped += 1
        else:
            total, weight = total + mine.sum() * value, weight + mine.sum()
    result = metrics.grouped_auc(labels, scores, groups=users)
    expected = total / weight if weight else math.nan
    assert result.value == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert metrics.auc(labels, scores, groups=users) == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert result.coverage == pytest.approx(weight / len(labels))
    assert (result.groups_used, result.groups_skipped) == (len(np.unique(users)) - skipped, skipped)


@given(scored_rows(), st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.int64, bool]), st.booleans())
def test_grouped_auc_equals_scikit_learn_user_by_user_for_scores_and_ids_of_any_type(rows, dtype, sparse_ids):
    labels, scores, users, _ = rows
    scores = np.clip(scores, -3, 3).astype(dtype)  # infinities are no integers
    groups = users.astype(np.int64) * (2**61 if sparse_ids else 1)
    result = metrics.auc_by_group(labels, scores, groups)
    np.testing.assert_array_equal(result.groups, np.unique(groups))
    for index, user in enumerate(result.groups):
        mine = groups == user
        assert (result.rows[index], result.positives[index]) == (mine.sum(), labels[mine].sum())
        both = 0 < labels[mine].sum() < mine.sum()
        expected = roc_auc_score(labels[mine], scores[mine]) if both else math.nan
        assert result.auc[index] == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_float64_scores_are_compared_as_they_are_and_not_as_float32():
    labels, scores = np.array([0, 1, 1, 0]), np.array([1.0, 1.0 + 1e-12, 1e300, -1e300])
    assert metrics.auc(labels, scores) == 1.0
    assert metrics.grouped_auc(labels, scores, groups=np.zeros(4, int)).value == 1.0
    large = np.array([2**53, 2**53 + 1])
    assert metrics.grouped_auc(labels[:2], large, groups=np.zeros(2, int)).value == 1.0


def test_group_ids_at_both_ends_of_their_type_stay_what_they_are():
    for dtype in (np.int8, np.int64, np.uint64):
        limits = np.iinfo(dtype)
        for ids in ([limits.min, limits.min + 1], [limits.max - 1, limits.max], [limits.min, limits.max]):
            groups = np.array(ids, dtype=dtype).repeat(2)
            result = metrics.auc_by_group(np.array([0, 1, 1, 0]), np.arange(4.0), groups)
            np.testing.assert_array_equal(result.groups, np.array(ids, dtype=dtype))
            np.testing.assert_array_equal(result.auc, [1, 0])


def test_groups_shared_among_threads_are_counted_as_by_one():
    generator = np.random.default_rng(6)
    group = np.where(generator.random(3000) < 0.3, 7, generator.integers(0, 200, 3000))  # one group holds a third
    keys = (group.astype(np.uint64) << 33) | generator.integers(0, 80, 3000).astype(np.uint64)
    whole = group_auc._count(keys.copy())
    for parts in (2, 5, 300):
        assert 0 < len(group_auc._borders(keys, parts)) < parts
        for got, expected in zip(group_auc._count_in_parts(keys, parts), whole, strict=True):
            np.testing.assert_array_equal(got, expected)


@given(scored_rows())
def test_a_score_of_the_user_alone_has_a_gauc_of_exactly_one_half(rows):
    labels, _, users, _ = rows
    result = metrics.grouped_auc(labels, users * 0.125, groups=users)
    assume(result.groups_used)
    assert result.value == 0.5


@given(scored_rows())
def test_rows_outside_where_have_no_influence_even_when_they_are_nan(rows):
    labels, scores, users, where = rows
    probabilities = 1 / (1 + np.exp(-np.clip(scores, -30, 30)))
    dirty, labels_dirty = np.where(where, probabilities, np.nan), np.where(where, labels, 7)
    for metric in (metrics.auc, metrics.log_loss, metrics.calibration):
        for kept, groups in ((None, None), (users[where], users)):
            expected = metric(labels[where], probabilities[where], groups=kept)
            np.testing.assert_equal(metric(labels_dirty, dirty, where=where, groups=groups), expected)
    kept = metrics.grouped_auc(labels[where], probabilities[where], groups=users[where])
    masked = metrics.grouped_auc(labels_dirty, dirty, groups=users, where=where)
    np.testing.assert_equal(tuple(masked), tuple(kept))


@given(scored_rows())
def test_log_loss_equals_scikit_learn(rows):
    labels, scores, _, _ = rows
    probabilities = 1 / (1 + np.exp(-np.clip(scores, -20, 20)))
    expected = sklearn_log_loss(labels, probabilities, labels=[0, 1])
    assert metrics.log_loss(labels, probabilities) == pytest.approx(expected, abs=1e-9)


@given(scored_rows())
def test_with_groups_log_loss_and_calibration_are_those_of_rows_weighted_to_one_a_group(rows):
    labels, scores, users, _ = rows
    probabilities = 1 / (1 + np.exp(-np.clip(scores, -20, 20)))
    weights = 1 / (users[:, None] == users).sum(axis=1)
    by_group = [metrics.log_loss(labels[users == user], probabilities[users == user]) for user in np.unique(users)]
    expected = sklearn_log_loss(labels, probabilities, labels=[0, 1], sample_weight=weights)
    value = metrics.log_loss(labels, probabilities, groups=users)
    assert value == pytest.approx(expected, abs=1e-9)
    assert value == pytest.approx(np.mean(by_group), abs=1e-9)
    result = metrics.calibration(labels, probabilities, groups=users, bins=4)
    number = metrics.equal_mass_bins(probabilities, 4)
    bins = [number == index for index in np.unique(number)]
    predicted = [np.average(probabilities[b], weights=weights[b]) for b in bins]
    observed = [np.average(labels[b], weights=weights[b]) for b in bins]
    share = [weights[b].sum() / weights.sum() for b in bins]
    np.testing.assert_allclose(result.predicted, predicted, atol=1e-9)
    np.testing.assert_allclose(result.observed, observed, atol=1e-9)
    np.testing.assert_array_equal(result.rows, [b.sum() for b in bins])
    assert result.ece == pytest.approx(np.abs(np.subtract(predicted, observed)) @ share, abs=1e-9)
    if labels.any():
        assert result.pcoc == pytest.approx((weights @ probabilities) / (weights @ labels), rel=1e-9)


def test_log_loss_does_not_clip():
    assert metrics.log_loss(np.array([1, 0]), np.array([0.0, 0.5])) == math.inf
    assert metrics.log_loss(np.array([1, 0]), np.array([0.5, 1.0])) == math.inf
    assert metrics.log_loss(np.array([1, 0]), np.array([1.0, 0.0])) == 0.0
    assert metrics.log_loss(np.array([1]), np.array([1e-300])) == pytest.approx(300 * math.log(10))


@pytest.mark.parametrize("bad", [-1e-9, 1.0 + 1e-9, 3.2, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", [metrics.log_loss, metrics.calibration])
def test_a_score_that_is_no_probability_is_refused_by_row(metric, bad):
    with pytest.raises(UserError, match="row 1"):
        metric(np.array([0, 1, 1]), np.array([0.2, bad, 0.4]))


def test_nan_scores_and_labels_that_are_not_binary_are_refused_by_row():
    with pytest.raises(UserError, match="row 2"):
        metrics.auc(np.array([0, 1, 1]), np.array([0.0, 1.0, np.nan]))
    for label in (2, -1, 0.5, np.nan):
        with pytest.raises(UserError, match="row 1"):
            metrics.auc(np.array([0, label, 1]), np.array([0.0, 1.0, 2.0]))


def test_arrays_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="one length"):
        metrics.auc(np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="one length"):
        metrics.grouped_auc(np.zeros(3), np.zeros(3), groups=np.zeros(2))
    with pytest.raises(ValueError, match="where must be bool"):
        metrics.auc(np.zeros(3), np.zeros(3), where=np.array([0, 1, 2]))


def test_calibration_error_of_hand_computed_bins():
    probabilities = np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.8])
    labels = np.array([0, 1, 0, 0, 1, 1])
    # Three bins of two rows: means .15/.35/.70 against .5/.0/1.
    expected = (0.35 + 0.35 + 0.30) / 3
    result = metrics.calibration(labels, probabilities, bins=3)
    assert result.ece == pytest.approx(expected)
    assert result.pcoc == pytest.approx(0.8)
    np.testing.assert_allclose(result.predicted, [0.15, 0.35, 0.70])
    np.testing.assert_allclose(result.observed, [0.5, 0, 1])
    np.testing.assert_array_equal(result.rows, [2, 2, 2])
    assert metrics.calibration(labels, probabilities, bins=1).ece == pytest.approx(abs(0.4 - 0.5))


@given(scored_rows())
def test_the_reliability_curve_leaves_out_bins_without_rows(rows):
    labels, scores, _, _ = rows
    result = metrics.calibration(labels, np.clip(scores, 0, 1), bins=100)
    assert result.rows.min() > 0
    assert result.rows.sum() == len(labels)
    assert np.all(np.diff(result.predicted) > 0)


@given(st.integers(1, 200), st.integers(1, 20))
def test_bins_of_distinct_values_have_equal_mass(size, bins):
    values = np.random.default_rng(size).permutation(size) / size
    mass = np.bincount(metrics.equal_mass_bins(values, bins), minlength=bins)
    assert mass.max() - mass.min() <= 1 or size < bins


@given(scored_rows(), st.integers(1, 6))
def test_equal_probabilities_share_a_bin_so_the_order_of_rows_is_irrelevant(rows, bins):
    labels, scores, _, _ = rows
    probabilities = np.clip(scores, 0, 1)
    number = metrics.equal_mass_bins(probabilities, bins)
    assert number.min() >= 0
    assert number.max() < bins
    assert len(set(zip(probabilities.tolist(), number.tolist(), strict=True))) == len(np.unique(probabilities))
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = metrics.calibration(labels[order], probabilities[order], bins=bins)
    assert shuffled.ece == pytest.approx(metrics.calibration(labels, probabilities, bins=bins).ece, abs=1e-12)
