"""Effects of ids: equal to scikit-learn's regression, shrunk as the rows ask for, and what a ranker starts from."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tenrec_jax.evaluation.id_model import IdEffects, id_effects

USERS, ITEMS, ROWS = 300, 200, 40_000


def drawn(user_spread: float, item_spread: float, intercept: float = -1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items and labels of a log whose effects are normal with these standard deviations."""
    random = np.random.default_rng(0)
    user, item = random.integers(USERS, size=ROWS), random.integers(ITEMS, size=ROWS)
    logit = intercept + user_spread * random.normal(size=USERS)[user] + item_spread * random.normal(size=ITEMS)[item]
    return user, item, random.random(ROWS) < 1 / (1 + np.exp(-logit))


def effects_of(user: np.ndarray, item: np.ndarray, label: np.ndarray, **options: float) -> IdEffects:
    return id_effects(user, item, label, users=USERS + 1, items=ITEMS + 1, **options)


def test_with_a_penalty_given_it_is_scikit_learns_regression() -> None:
    user, item, label = (column[:3_000] for column in drawn(1.0, 0.5))
    one_hot = np.concatenate([np.eye(USERS)[user], np.eye(ITEMS)[item]], axis=1)
    theirs = LogisticRegression(C=1 / 2.0, tol=1e-8, max_iter=2_000).fit(one_hot, label)
    found = effects_of(user, item, label, penalty=2.0, sweeps=200)
    ours = found.intercept + found.user_U[user] + found.item_N[item]
    assert ours == pytest.approx(theirs.decision_function(one_hot), abs=1e-3)


def test_the_spread_of_the_effects_is_found() -> None:
    found = effects_of(*drawn(1.0, 0.5))
    # Shrunk weights spread less than the effects: by a tenth or so with 130 and 200 rows an id.
    assert found.user_U[:-1].std() == pytest.approx(1.0, rel=0.15)
    assert found.item_N[:-1].std() == pytest.approx(0.5, rel=0.15)


def test_what_does_not_matter_shrinks_to_nothing() -> None:
    found = effects_of(*drawn(1.0, 0.0))
    assert np.abs(found.item_N).max() < 0.1
    assert found.user_U.std() > 0.8


def test_rare_labels_do_not_throw_newton_off() -> None:
    user, item, label = drawn(2.5, 0.0, intercept=-7.0)
    assert 0.001 < label.mean() < 0.03
    user_rate, _ = effects_of(user, item, label).rates()
    often = np.bincount(user, label, USERS) / np.bincount(user, minlength=USERS)
    busiest = np.argsort(often)[-5:]
    assert user_rate[busiest] == pytest.approx(often[busiest], rel=0.3)


def test_an_id_without_rows_has_the_rate_of_nobody() -> None:
    found = effects_of(*drawn(1.0, 0.5))
    assert found.user_U[USERS] == found.item_N[ITEMS] == 0.0
    user_rate, item_rate = found.rates()
    assert user_rate[USERS] == item_rate[ITEMS] == pytest.approx(1 / (1 + np.exp(-found.intercept)))


@pytest.mark.parametrize("rate", [0, 1])
def test_a_label_that_all_rows_share_has_that_rate_everywhere(rate: int) -> None:
    user, item, _ = drawn(1.0, 0.5)
    user_rate, item_rate = effects_of(user, item, np.full(ROWS, rate)).rates()
    assert (user_rate == rate).all()
    assert (item_rate == rate).all()
