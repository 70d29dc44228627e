"""Effects of ids: equal to scikit-learn's regression, shrunk as the rows ask for, and one action telling of the others."""

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tenrec_jax.evaluation.id_model import IdEffects, id_effects

USERS, ITEMS, ROWS = 300, 200, 40_000


def drawn(user_spread: float, item_spread: float, intercept: float = -1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items and labels [T, 1] of a log whose effects are normal with these standard deviations."""
    random = np.random.default_rng(0)
    user, item = random.integers(USERS, size=ROWS), random.integers(ITEMS, size=ROWS)
    logit = intercept + user_spread * random.normal(size=USERS)[user] + item_spread * random.normal(size=ITEMS)[item]
    return user, item, (random.random(ROWS) < sigmoid(logit))[:, None]


def drawn_of_two(users: int, intercept_A: np.ndarray, spread_A: np.ndarray, correlation: float) -> tuple:
    """Users, items and labels [T, 2] of users whose two effects, returned too, are normal and correlated."""
    random = np.random.default_rng(1)
    user, item = np.repeat(np.arange(users), 40), random.integers(ITEMS, size=40 * users)
    covariance_AA = np.array([[1.0, correlation], [correlation, 1.0]]) * np.outer(spread_A, spread_A)
    effect_UA = random.multivariate_normal(np.zeros(2), covariance_AA, size=users)
    label_TA = random.random((len(user), 2)) < sigmoid(intercept_A + effect_UA[user])
    return user, item, label_TA, effect_UA


def effects_of(user: np.ndarray, item: np.ndarray, label_TA: np.ndarray, **options: float) -> IdEffects:
    return id_effects(user, item, label_TA, users=USERS + 1, items=ITEMS + 1, **options)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_with_a_penalty_given_it_is_scikit_learns_regression_of_each_action() -> None:
    user, item, label_T1 = (column[:3_000] for column in drawn(1.0, 0.5))
    label_TA = np.concatenate([label_T1, user[:, None] % 3 == 0], axis=1)
    one_hot = np.concatenate([np.eye(USERS)[user], np.eye(ITEMS)[item]], axis=1)
    found = effects_of(user, item, label_TA, penalty=2.0, sweeps=200)
    for action, label_T in enumerate(label_TA.T):
        theirs = LogisticRegression(C=1 / 2.0, tol=1e-8, max_iter=2_000).fit(one_hot, label_T)
        ours = found.intercept_A[action] + found.user_UA[user, action] + found.item_NA[item, action]
        assert ours == pytest.approx(theirs.decision_function(one_hot), abs=1e-3)


def test_the_spread_of_the_effects_is_found() -> None:
    found = effects_of(*drawn(1.0, 0.5))
    # Shrunk weights spread less than the effects: by a tenth or so with 130 and 200 rows an id.
    assert found.user_UA[:-1].std() == pytest.approx(1.0, rel=0.15)
    assert found.item_NA[:-1].std() == pytest.approx(0.5, rel=0.15)


def test_what_does_not_matter_shrinks_to_nothing() -> None:
    found = effects_of(*drawn(1.0, 0.0))
    assert np.abs(found.item_NA).max() < 0.1
    assert found.user_UA.std() > 0.8


def test_rare_labels_do_not_throw_newton_off() -> None:
    user, item, label_T1 = drawn(2.5, 0.0, intercept=-7.0)
    assert 0.001 < label_T1.mean() < 0.03
    user_rate_U1, _ = effects_of(user, item, label_T1).rates()
    often = np.bincount(user, label_T1[:, 0], USERS) / np.bincount(user, minlength=USERS)
    busiest = np.argsort(often)[-5:]
    assert user_rate_U1[busiest, 0] == pytest.approx(often[busiest], rel=0.3)


def test_the_correlation_of_two_actions_is_found() -> None:
    user, item, label_TA, _ = drawn_of_two(2_000, np.array([-1.0, -2.0]), np.array([1.0, 1.5]), correlation=-0.6)
    found = id_effects(user, item, label_TA, users=2_000, items=ITEMS)
    spread_A = np.sqrt(np.diag(found.user_AA))
    assert spread_A == pytest.approx([1.0, 1.5], rel=0.1)
    assert found.user_AA[0, 1] / spread_A.prod() == pytest.approx(-0.6, abs=0.06)


def test_the_covariance_solves_the_equation_of_the_marginal_likelihood() -> None:
    """n C = sum of w w' + H^-1, with H built from scratch: the Hessian at the weights that are returned."""
    users = 400
    user, item, label_TA, _ = drawn_of_two(users, np.array([-1.0, -2.0]), np.array([1.0, 1.5]), correlation=0.6)
    found = id_effects(user, item, label_TA, users=users, items=ITEMS, sweeps=300)
    p_TA = sigmoid(found.intercept_A + found.user_UA[user] + found.item_NA[item])
    total_AA = np.zeros((2, 2))
    for one in range(users):
        rows = user == one
        hessian_AA = np.diag((p_TA[rows] * (1 - p_TA[rows])).sum(axis=0)) + np.linalg.inv(found.user_AA)
        total_AA += np.outer(found.user_UA[one], found.user_UA[one]) + np.linalg.inv(hessian_AA)
    np.testing.assert_allclose(total_AA / users, found.user_AA, rtol=1e-4)


def test_a_frequent_action_tells_of_a_rare_one() -> None:
    user, item, label_TA, effect_UA = drawn_of_two(5_000, np.array([-1.0, -6.0]), np.array([1.5, 1.5]), correlation=0.8)
    size = {"users": 5_000, "items": ITEMS}
    together = id_effects(user, item, label_TA, **size).user_UA[:, 1]
    alone = id_effects(user, item, label_TA[:, 1:], **size).user_UA[:, 0]
    true = effect_UA[:, 1]
    assert np.corrcoef(together, true)[0, 1] > np.corrcoef(alone, true)[0, 1] + 0.2


def test_an_id_without_rows_has_the_rate_of_nobody() -> None:
    found = effects_of(*drawn(1.0, 0.5))
    assert found.user_UA[USERS] == found.item_NA[ITEMS] == 0.0
    user_rate_U1, item_rate_N1 = found.rates()
    assert user_rate_U1[USERS] == item_rate_N1[ITEMS] == pytest.approx(sigmoid(found.intercept_A))


@pytest.mark.parametrize("rate", [0, 1])
def test_a_label_that_all_rows_share_has_that_rate_everywhere(rate: int) -> None:
    user, item, label_T1 = drawn(1.0, 0.5)
    label_TA = np.concatenate([np.full((ROWS, 1), rate), label_T1], axis=1)
    found = effects_of(user, item, label_TA)
    assert abs(found.intercept_A[0]) == math.inf
    for rate_XA in found.rates():
        assert (rate_XA[:, 0] == rate).all()
    # Alone it is no different, and the other action is fitted as if it were alone.
    for rate_X1 in effects_of(user, item, label_TA[:, :1]).rates():
        assert (rate_X1 == rate).all()
    np.testing.assert_allclose(found.user_UA[:, 1:], effects_of(user, item, label_T1).user_UA)
