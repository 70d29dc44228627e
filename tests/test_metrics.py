"""Metrics against scikit-learn, brute force over pairs, and hand-computed values; ties and absent classes included."""

import math
import warnings

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import ndcg_score, roc_auc_score

from tenrec_jax.errors import UserError
from tenrec_jax.evaluation import metrics

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
    assert math.isnan(metrics.pcoc(labels, scores)) == (labels.sum() == 0)
    assert math.isnan(metrics.log_loss(labels, scores)) == (len(labels) == 0)
    assert math.isnan(metrics.expected_calibration_error(labels, scores)) == (len(labels) == 0)


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
    for metric in (metrics.auc, metrics.log_loss, metrics.expected_calibration_error, metrics.pcoc):
        expected = metric(labels[where], probabilities[where])
        assert metric(labels_dirty, dirty, where=where) == pytest.approx(expected, abs=0, nan_ok=True)
    kept = metrics.grouped_auc(labels[where], probabilities[where], groups=users[where])
    masked = metrics.grouped_auc(labels_dirty, dirty, groups=users, where=where)
    np.testing.assert_equal(tuple(masked), tuple(kept))


@given(scored_rows())
def test_log_loss_equals_scikit_learn(rows):
    labels, scores, _, _ = rows
    probabilities = 1 / (1 + np.exp(-np.clip(scores, -20, 20)))
    expected = sklearn_log_loss(labels, probabilities, labels=[0, 1])
    assert metrics.log_loss(labels, probabilities) == pytest.approx(expected, abs=1e-9)


def test_log_loss_does_not_clip():
    assert metrics.log_loss(np.array([1, 0]), np.array([0.0, 0.5])) == math.inf
    assert metrics.log_loss(np.array([1, 0]), np.array([0.5, 1.0])) == math.inf
    assert metrics.log_loss(np.array([1, 0]), np.array([1.0, 0.0])) == 0.0
    assert metrics.log_loss(np.array([1]), np.array([1e-300])) == pytest.approx(300 * math.log(10))


@pytest.mark.parametrize("bad", [-1e-9, 1.0 + 1e-9, 3.2, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", [metrics.log_loss, metrics.expected_calibration_error, metrics.pcoc])
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
    assert metrics.expected_calibration_error(labels, probabilities, bins=3) == pytest.approx(expected)
    assert metrics.expected_calibration_error(labels, probabilities, bins=1) == pytest.approx(abs(0.4 - 0.5))
    assert metrics.pcoc(labels, probabilities) == pytest.approx(0.8)


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
    shuffled = metrics.expected_calibration_error(labels[order], probabilities[order], bins=bins)
    assert shuffled == pytest.approx(metrics.expected_calibration_error(labels, probabilities, bins=bins), abs=1e-12)


@st.composite
def candidates(draw):
    """Scores [B, C] with many ties, a target per row, and candidates to leave out."""
    rows, columns = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    scores = draw(hnp.arrays(np.float32, (rows, columns), elements=st.integers(-3, 3)))
    target = draw(hnp.arrays(np.int32, rows, elements=st.integers(0, columns - 1)))
    exclude = draw(hnp.arrays(bool, (rows, columns)))
    return scores, target, exclude


@given(candidates(), st.booleans())
def test_ranks_equal_the_mean_place_over_all_ways_to_break_ties(drawn, use_exclude):
    scores, target, exclude = drawn
    ranks = metrics.ranks_of(scores, target, exclude=exclude if use_exclude else None)
    for row, column in enumerate(target):
        others = [c for c in range(scores.shape[1]) if c != column and not (use_exclude and exclude[row, c])]
        best = 1 + sum(scores[row, c] > scores[row, column] for c in others)
        worst = best + sum(scores[row, c] == scores[row, column] for c in others)
        assert ranks[row] == (best + worst) / 2


def test_ranks_do_not_depend_on_the_block_size(monkeypatch):
    generator = np.random.default_rng(3)
    scores, target = generator.integers(0, 9, (301, 17)).astype(np.float32), generator.integers(0, 17, 301)
    exclude = generator.random(scores.shape) < 0.3
    whole = metrics.ranks_of(scores, target, exclude=exclude)
    monkeypatch.setattr(metrics, "_BLOCK", 50)
    np.testing.assert_array_equal(metrics.ranks_of(scores, target, exclude=exclude), whole)
    labels, flat = target[:300] % 2, scores[:300, 0]
    assert metrics.auc(labels, flat) == pytest.approx(roc_auc_score(labels, flat), abs=1e-12)


def test_ranks_refuse_nan_scores_by_row_and_targets_outside_the_candidates():
    scores = np.zeros((3, 4), np.float32)
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=r"\[0, 4\)"):
            metrics.ranks_of(scores, np.array([0, bad, 1]))
    scores[1, 2] = np.nan
    with pytest.raises(UserError, match="row 1"):
        metrics.ranks_of(scores, np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="exclude must be bool"):
        metrics.ranks_of(np.zeros((3, 4)), np.array([0, 1, 1]), exclude=np.zeros((3, 4)))


@settings(max_examples=50)
@given(st.integers(2, 30), st.integers(2, 15), st.integers(1, 15), st.integers(0, 2**32 - 1))
def test_ranking_metrics_agree_with_scikit_learn_and_sorting(rows, columns, k, seed):
    generator = np.random.default_rng(seed)
    scores = np.stack([generator.permutation(columns) for _ in range(rows)]).astype(np.float64)
    target = generator.integers(0, columns, rows)
    ranks = metrics.ranks_of(scores, target)
    place = 1 + np.argmax(np.argsort(-scores, axis=1) == target[:, None], axis=1)
    np.testing.assert_array_equal(ranks, place)
    assert metrics.ndcg_at_k(ranks, k) == pytest.approx(ndcg_score(np.eye(columns)[target], scores, k=k), abs=1e-9)
    assert metrics.recall_at_k(ranks, k) == metrics.hit_rate_at_k(ranks, k) == pytest.approx(np.mean(place <= k))
    assert metrics.mrr(ranks) == pytest.approx(np.mean(1 / place), abs=1e-12)


def test_mid_ranks_and_infinite_ranks_by_hand():
    ranks = np.array([1.0, 1.5, 3.0, np.inf])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.recall_at_k(ranks, 1) == 0.25
        assert metrics.recall_at_k(ranks, 2) == 0.5
        assert metrics.ndcg_at_k(ranks, 3) == pytest.approx((1 + 1 / math.log2(2.5) + 0.5) / 4)
        assert metrics.mrr(ranks) == pytest.approx((1 + 1 / 1.5 + 1 / 3) / 4)
    assert math.isnan(metrics.mrr(np.zeros(0)))
    for bad in ([0.5], [np.nan], [[1.0]]):
        with pytest.raises(ValueError, match="ranks"):
            metrics.mrr(np.array(bad))
    with pytest.raises(ValueError, match="k must"):
        metrics.recall_at_k(ranks, 0)
