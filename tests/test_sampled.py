"""Metrics among a target and uniformly drawn negatives, against enumeration and against draws."""

from itertools import combinations

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from tenrec_jax.evaluation.places import Places
from tenrec_jax.evaluation.sampled import sampled_metrics


def of_one(first: float, last: float, candidates: int, negatives: int) -> dict[str, float]:
    places = Places(np.array([first]), np.array([last]))
    return {name: float(value[0]) for name, value in sampled_metrics(places, np.array([candidates]), negatives).items()}


@pytest.mark.parametrize("better", range(9))
def test_they_are_the_means_over_all_sets_of_negatives(better: int) -> None:
    others, negatives = 8, 6
    score = np.arange(others)[::-1] - (others - better) + 0.5  # `better` of the others lie above 0, the target's
    assert np.count_nonzero(score > 0) == better
    sets = [np.array(drawn) for drawn in combinations(score, negatives)]
    places = [1 + np.count_nonzero(drawn > 0) for drawn in sets]
    found = of_one(better + 1, better + 1, others + 1, negatives)
    assert found["hit@1"] == pytest.approx(np.mean([place == 1 for place in places]))
    assert found["recall@5"] == pytest.approx(np.mean([place <= 5 for place in places]))
    assert found["mrr"] == pytest.approx(np.mean([1 / place for place in places]))
    relevance = np.eye(1, negatives + 1)
    expected = [ndcg_score(relevance, np.concatenate([[0.0], drawn])[None], k=5) for drawn in sets]
    assert found["ndcg@5"] == pytest.approx(np.mean(expected))


def test_ties_are_broken_at_random() -> None:
    # Two others score as the target does: it is third, fourth or fifth of all.
    means = [of_one(place, place, 30, 9) for place in (3, 4, 5)]
    found = of_one(3, 5, 30, 9)
    assert found == pytest.approx({name: np.mean([mean[name] for mean in means]) for name in found})


def test_a_constant_scorer_has_the_rates_of_chance() -> None:
    found = of_one(1, 500, 500, 99)
    assert found["hit@1"] == pytest.approx(0.01)
    assert found["recall@10"] == pytest.approx(0.1)


def test_a_target_without_a_place_is_a_miss_and_few_candidates_are_all_taken() -> None:
    assert set(of_one(np.inf, np.inf, 50, 9).values()) == {0.0}
    few = of_one(3, 3, 4, 99)
    assert few["mrr"] == pytest.approx(1 / 3)
    assert few["recall@5"] == pytest.approx(1.0)
