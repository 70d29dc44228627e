"""The rules, against definitions written out item by item."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenrec_jax import rules
from tenrec_jax.order import Order
from tenrec_jax.requests import ActionValues, Move
from tenrec_jax.rules import Candidates, Ruled


def candidates(score: list[float], category: list[int]) -> Candidates:
    size = len(score)
    item_C = np.arange(size, dtype=np.int32) + 100
    scores = np.asarray(score, np.float32)
    nothing = np.zeros((size, 0), np.float32), np.zeros(size, np.float32), np.zeros(size, np.int32), np.ones(size)
    return Candidates(item_C, np.asarray(category, np.int32), scores, *nothing, scores, np.zeros(size, bool))


@st.composite
def lists(draw: st.DrawFn) -> Candidates:
    size = draw(st.integers(0, 12))
    score = sorted(draw(st.lists(st.integers(0, 8), min_size=size, max_size=size)), reverse=True)
    return candidates(score, draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))


def places_of(after: Candidates, before: Candidates) -> list[int]:
    return [before.item_C.tolist().index(item) for item in after.item_C.tolist()]


def moves_by_hand(before: Candidates, after: Candidates, k: int) -> list[tuple[int, int, int]]:
    old = {item: place for place, item in enumerate(before.item_C.tolist(), 1)}
    listed = enumerate(after.item_C[:k].tolist(), 1)
    return [(item, old[item], place) for place, item in listed if old[item] != place]


@given(lists(), st.sampled_from([0.0, 0.25, 0.5, 0.9]), st.integers(1, 14))
def test_diversity_takes_the_item_of_largest_marginal_relevance_each_time(
    given_list: Candidates, share: float, k: int
) -> None:
    ruled = rules.diversified(given_list, share, k)
    score, category = given_list.score_C.tolist(), given_list.category_C.tolist()
    order = places_of(ruled.candidates, given_list)
    assert sorted(order) == list(range(len(score)))
    spread = max(score, default=0) - min(score, default=0)
    taken: list[int] = []
    for place in order[:k]:

        def marginal(each: int) -> float:
            relevance = (score[each] - min(score)) / spread if spread else 0.0
            similar = category[each] != 0 and category[each] in [category[other] for other in taken]
            return (1 - share) * relevance - share * similar

        left = [each for each in range(len(score)) if each not in taken]
        assert marginal(place) == pytest.approx(max(map(marginal, left)), abs=1e-6)
        taken.append(place)
    assert order[k:] == sorted(order[k:])
    assert list(ruled.moved) == moves_by_hand(given_list, ruled.candidates, k)
    assert not ruled.removed_R


@given(lists(), st.integers(1, 4), st.integers(1, 14))
def test_the_cap_keeps_the_first_of_each_category(given_list: Candidates, most: int, k: int) -> None:
    ruled = rules.capped(given_list, most, k)
    kept: list[int] = []
    refused: list[int] = []
    for item, category in zip(given_list.item_C.tolist(), given_list.category_C.tolist(), strict=True):
        same = [other for other in kept if given_list.category_C[other - 100] == category]
        if category and len(same) >= most:
            refused += [item] if len(kept) < k else []
        else:
            kept.append(item)
    assert ruled.candidates.item_C.tolist() == kept
    assert list(ruled.removed_R) == refused


@given(lists(), st.sampled_from([0.0, 0.3, 0.99]), st.integers(0, 3), st.integers(1, 14), st.integers(0, 5))
def test_exploration_tells_what_it_did_and_keeps_the_cap(
    given_list: Candidates, rate: float, most: int, k: int, seed: int
) -> None:
    start = rules.capped(given_list, most, k).candidates if most else given_list
    ruled = rules.explored(start, rate, most, k, np.random.default_rng(seed))
    shown, before = ruled.candidates.item_C[:k].tolist(), start.item_C[:k].tolist()
    assert sorted([*ruled.removed_R, *shown]) == sorted([*before, *(item for item, *_ in ruled.moved)])
    assert [item for item, *_ in ruled.moved] == ruled.candidates.item_C[ruled.candidates.explored_C].tolist()
    assert list(ruled.moved) == moves_by_hand(start, ruled.candidates, k)
    if most:
        category = ruled.candidates.category_C[:k]
        assert np.bincount(category[category > 0], minlength=1).max() <= most
    if not rate:
        assert shown == before


def test_exploration_changes_places_at_its_rate_and_draws_uniformly() -> None:
    start, random = candidates([float(-i) for i in range(30)], [0] * 30), np.random.default_rng(0)
    changed, drawn = 0, np.zeros(30)
    for _ in range(2000):
        ruled = rules.explored(start, 0.2, 0, 10, random)
        changed += len(ruled.moved)
        drawn[[item - 100 for item, *_ in ruled.moved]] += 1
    assert not drawn[:10].any()
    # Four standard deviations of the binomials.
    assert abs(changed - 4000) < 4 * (20_000 * 0.2 * 0.8) ** 0.5
    assert np.abs(drawn[10:] - 200).max() < 4 * 200**0.5


def test_worth_is_the_values_times_the_probabilities_times_retrievals_odds() -> None:
    random = np.random.default_rng(0)
    probability_CA = random.random((6, 2)).astype(np.float32)
    start = candidates(random.standard_normal(6).tolist(), [0] * 6)._replace(probability_CA=probability_CA)
    values = ActionValues(click=1.0, like=5.0)
    for weight in (0.0, 0.7):
        found = rules.by_worth(start, Order(), values, ("click", "like"), weight)
        retrieval = start.retrieval_C.astype(float)
        odds = np.exp(retrieval) ** weight / np.exp(retrieval.max()) ** weight
        expected = (probability_CA[:, 0] + 5.0 * probability_CA[:, 1]) * odds
        order = np.argsort(-expected)
        np.testing.assert_array_equal(found.item_C, start.item_C[order])
        np.testing.assert_allclose(found.score_C, expected[order], rtol=1e-6)


def test_effects_are_told_in_raw_ids() -> None:
    raw = np.array(["", "a", "b", "c"], object)
    effect = Ruled(candidates([], []), removed_R=[2], moved=[(3, 2, 1)]).effect("diversity", raw)
    assert (effect.removed, effect.moved) == (("b",), (Move("c", 2, 1),))
