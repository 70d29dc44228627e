"""Places and ranking metrics against scikit-learn and sorting; under ties against the mean over all orders of the tied candidates."""

import itertools
import math
import warnings

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score

from tenrec_jax.errors import UserError
from tenrec_jax.evaluation import metrics, places, user_metrics
from tenrec_jax.evaluation.places import Places


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
    monkeypatch.setattr(places, "_BLOCK", 50)
    np.testing.assert_array_equal(metrics.ranks_of(scores, target, exclude=exclude), whole)


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
    assert metrics.precision_at_k(ranks, k) == pytest.approx(np.mean(place <= k) / k, abs=1e-12)
    assert metrics.mrr(ranks) == pytest.approx(np.mean(1 / place), abs=1e-12)
    whole = label_ranking_average_precision_score(np.eye(columns)[target], scores)
    assert metrics.map_at_k(ranks, columns) == pytest.approx(whole, abs=1e-9)
    expected = np.mean(np.where(place <= k, 1 / place, 0))
    assert metrics.map_at_k(ranks, k) == metrics.mrr(ranks, k) == pytest.approx(expected, abs=1e-9)


def test_mid_ranks_and_infinite_ranks_by_hand():
    ranks = np.array([1.0, 1.5, 3.0, np.inf])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.recall_at_k(ranks, 1) == 0.25
        assert metrics.recall_at_k(ranks, 2) == 0.5
        assert metrics.ndcg_at_k(ranks, 3) == pytest.approx((1 + 1 / math.log2(2.5) + 0.5) / 4)
        assert metrics.mrr(ranks) == pytest.approx((1 + 1 / 1.5 + 1 / 3) / 4)
        assert metrics.mrr(ranks, 2) == metrics.map_at_k(ranks, 2) == pytest.approx((1 + 1 / 1.5) / 4)
        assert metrics.precision_at_k(ranks, 2) == 0.25
    for metric in (metrics.recall_at_k, metrics.hit_rate_at_k, metrics.precision_at_k, metrics.ndcg_at_k, metrics.mrr):
        assert math.isnan(metric(np.zeros(0), 3))
    assert math.isnan(metrics.mrr(np.zeros(0)))
    assert len(metrics.ranks_of(np.zeros((0, 4)), np.zeros(0, int))) == 0
    for bad in ([0.5], [np.nan], [[1.0]]):
        with pytest.raises(ValueError, match="ranks"):
            metrics.mrr(np.array(bad))
    with pytest.raises(ValueError, match="k must"):
        metrics.recall_at_k(ranks, 0)


def every_order(scores):
    """All orders of the candidates, best first, that agree with the scores."""
    levels = [np.flatnonzero(scores == value) for value in np.unique(scores)[::-1]]
    for order in itertools.product(*map(itertools.permutations, levels)):
        yield list(itertools.chain(*order))


@settings(max_examples=30)
@given(hnp.arrays(np.float32, st.integers(1, 6), elements=st.integers(0, 2)), st.data(), st.integers(1, 7))
def test_metrics_of_places_are_means_over_all_ways_to_break_ties(scores, data, k):
    target = data.draw(st.integers(0, len(scores) - 1))
    found = metrics.places_of(scores[None], np.array([target]))
    place = np.array([1 + order.index(target) for order in every_order(scores)], np.float64)
    assert (found.first[0], found.last[0]) == (place.min(), place.max())
    for metric in (places.hits, places.gains, places.reciprocal_ranks):
        assert metric(found, k)[0] == pytest.approx(metric(place, k).mean(), abs=1e-12)
    assert places.reciprocal_ranks(found)[0] == pytest.approx((1 / place).mean(), abs=1e-12)


@settings(max_examples=40)
@given(hnp.arrays(np.float32, st.integers(1, 6), elements=st.integers(0, 2)), st.data())
def test_a_users_metrics_are_means_over_all_ways_to_break_ties_among_several_targets(scores, data):
    item = np.array(data.draw(st.lists(st.integers(0, len(scores) - 1), min_size=1, max_size=8)))
    found = metrics.places_of(np.tile(scores, (len(item), 1)), item)
    _, values = user_metrics.retrieval_metrics(np.full(len(item), 7), item, found)
    orders = list(every_order(scores))
    first = np.array([min(1 + order.index(target) for target in item) for order in orders])
    for k in (1, 5):
        assert values[f"hit@{k}"][0] == pytest.approx(np.mean(first <= k), abs=1e-12)
        shares = [np.mean([order.index(target) < k for target in item]) for order in orders]
        assert values[f"recall@{k}"][0] == pytest.approx(np.mean(shares), abs=1e-12)
    assert values["mrr"][0] == pytest.approx(np.mean(1 / first), abs=1e-12)
    discounted = [sum(1 / math.log2(order.index(t) + 2) for t in item if order.index(t) < 5) for order in orders]
    ideal = sum(1 / math.log2(place + 1) for place in range(1, min(len(item), 5) + 1))
    assert values["ndcg@5"][0] == pytest.approx(np.mean(discounted) / ideal, abs=1e-12)


def test_a_constant_scorer_has_exactly_the_values_of_chance():
    found = metrics.places_of(np.zeros((3, 120), np.float32), np.array([0, 7, 119]))
    user, item = np.array([1, 2, 3]), np.array([0, 7, 119])
    _, values = user_metrics.retrieval_metrics(user, item, found)
    for k in user_metrics.CUTOFFS:
        assert metrics.recall_at_k(found, k) == metrics.hit_rate_at_k(found, k) == k / 120
        np.testing.assert_array_equal(values[f"hit@{k}"], k / 120)
        np.testing.assert_array_equal(values[f"recall@{k}"], k / 120)
    assert metrics.mrr(found) == pytest.approx(sum(1 / place for place in range(1, 121)) / 120, rel=1e-14)


def test_a_target_without_a_place_is_a_miss_everywhere():
    found = Places(np.array([np.inf, 1.0]), np.array([np.inf, 1.0]))
    _, values = user_metrics.retrieval_metrics(np.array([4, 4]), np.array([1, 2]), found)
    assert values["hit@1"][0] == values["mrr"][0] == 1
    assert values["recall@100"][0] == 0.5
    _, values = user_metrics.retrieval_metrics(np.array([4]), np.array([1]), Places(found.first[:1], found.last[:1]))
    assert {name: value[0] for name, value in values.items()} == dict.fromkeys(values, 0)
