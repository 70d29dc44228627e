"""Logistic regression on the ids of users and items: what a log's labels tell without any history."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Newton's step is too long where an action is rare; a step of so much is enough for any id in a few sweeps.
LONGEST_STEP = 1.0
# Below this variance effects are nothing, and their penalty would grow without bound.
SMALLEST_VARIANCE = 1e-4


class IdEffects(NamedTuple):
    """logit P(action) = intercept + user + item, with a weight for each id and action; an id without rows has the weight 0.

    Attributes:
        intercept_A: of each action.
        user_UA, item_NA: the weights.
        user_AA, item_AA: covariances over the actions that the weights of a user, and of an item, are drawn with.
    """

    intercept_A: Floats
    user_UA: Floats
    item_NA: Floats
    user_AA: Floats
    item_AA: Floats

    def rates(self) -> tuple[Floats, Floats]:
        """P(action) of each user on an item of weight 0, [U, A], and of each item shown to a user of weight 0, [N, A]."""
        return _sigmoid(self.intercept_A + self.user_UA), _sigmoid(self.intercept_A + self.item_NA)


def id_effects(
    user_T: np.ndarray,
    item_T: np.ndarray,
    label_TA: np.ndarray,
    *,
    users: int,
    items: int,
    penalty: float | None = None,
    sweeps: int = 20,
) -> IdEffects:
    """Effects of users and items on all actions together, fitted to T rows.

    The weights of a user have a normal prior with one covariance over the actions, those of an item another one: who shares often also
    follows, and where an action is too rare to tell that of a user, the others do. The penalised likelihood (the intercepts are free) is
    climbed by Newton steps for all items, all users and the intercepts in turn, each of which is a problem of A numbers an id.

    Without a penalty given, the covariances are estimated from the rows, as Laplace's approximation of the marginal likelihood has them:
    with weights `w_i` and posterior covariances `H_i^-1` of n ids, `n C = sum_i w_i w_i' + H_i^-1`. Of one action that is MacKay's rule
    (1992, doi:10.1162/neco.1992.4.3.415). Effects that the rows do not show shrink to nothing.

    Args:
        user_T, item_T: ids from 0, below `users` and `items`. label_TA: 0 or 1.
        users, items: number of ids.
        penalty: inverse variance of all weights, which then know nothing of one another; None estimates the covariances.
        sweeps: rounds of steps.

    Returns:
        The effects. Of an action that all rows have, or none, the intercept is infinite and all weights are 0.
    """
    label_TA = label_TA.astype(np.float64)
    rate_A = label_TA.mean(axis=0)
    with np.errstate(divide="ignore"):
        intercept_A = np.log(rate_A) - np.log1p(-rate_A)
    fitted_A = np.isfinite(intercept_A)
    # Columns one after the other, which the sums over ids go through by themselves.
    label_TF, intercept_F = np.asfortranarray(label_TA[:, fitted_A]), intercept_A[fitted_A]
    item, user = (_Effects(id_T, ids, len(intercept_F), penalty) for id_T, ids in ((item_T, items), (user_T, users)))
    for _ in range(sweeps):
        for effects in (item, user):
            effects.step(label_TF, _sigmoid(intercept_F + user.of_rows() + item.of_rows()))
        p_TF = _sigmoid(intercept_F + user.of_rows() + item.of_rows())
        intercept_F += (label_TF - p_TF).sum(axis=0) / (p_TF * (1 - p_TF)).sum(axis=0)
    intercept_A[fitted_A] = intercept_F
    covariances = (_widened(_widened(effects.covariance_AA, fitted_A).T, fitted_A) for effects in (user, item))
    return IdEffects(intercept_A, _widened(user.weight_WA, fitted_A), _widened(item.weight_WA, fitted_A), *covariances)


class _Effects:
    """The weights [W, A] of one kind of id and their covariance, while they are fitted."""

    def __init__(self, id_T: np.ndarray, ids: int, actions: int, penalty: float | None) -> None:
        self._id_T, self._estimated = id_T, penalty is None
        self.weight_WA = np.zeros((ids, actions))
        self.covariance_AA = np.eye(actions) / (1.0 if penalty is None else penalty)

    def of_rows(self) -> Floats:
        return self.weight_WA[self._id_T]

    def step(self, label_TA: Floats, p_TA: Floats) -> None:
        """One Newton step from probabilities `p_TA`, and the covariance after it."""
        precision_AA = np.linalg.inv(self.covariance_AA)
        slope_WA = self._sums(label_TA - p_TA) - self.weight_WA @ precision_AA
        curvature_WA = self._sums(p_TA * (1 - p_TA))
        posterior_WAA = np.linalg.inv(curvature_WA[:, :, None] * np.eye(len(precision_AA)) + precision_AA)
        step_WA = np.einsum("wab,wb->wa", posterior_WAA, slope_WA)
        self.weight_WA += np.clip(step_WA, -LONGEST_STEP, LONGEST_STEP)
        if self._estimated:
            self.covariance_AA = _covariance(self.weight_WA, posterior_WAA, self.covariance_AA)

    def _sums(self, x_TA: Floats) -> Floats:
        """Sums over each id's rows."""
        sum_WA = np.empty_like(self.weight_WA)
        for action, x_T in enumerate(x_TA.T):
            sum_WA[:, action] = np.bincount(self._id_T, x_T, len(sum_WA))
        return sum_WA


def _covariance(weight_WA: Floats, posterior_WAA: Floats, prior_AA: Floats) -> Floats:
    """The next covariance, of a fixed-point iteration for `n C = sum w w' + H^-1`.

    In units of the prior the equation is `sum w w' = sum (1 - H^-1)`: what is seen of the weights against how many of them the rows
    determine. The iteration takes their ratio, symmetrically, back in the units of the rows.
    """
    root_AA, whiten_AA = _power(prior_AA, 0.5), _power(prior_AA, -0.5)
    seen_AA = whiten_AA @ (weight_WA.T @ weight_WA) @ whiten_AA
    determined_AA = (np.eye(len(prior_AA)) - whiten_AA @ posterior_WAA @ whiten_AA).sum(axis=0)
    scale_AA = root_AA @ _power(determined_AA, -0.5)
    return _power(scale_AA @ seen_AA @ scale_AA.T, 1.0)


def _power(x_AA: Floats, exponent: float) -> Floats:
    """A power of a symmetric positive matrix, whose eigenvalues count as `SMALLEST_VARIANCE` at least."""
    value_A, vector_AA = np.linalg.eigh(x_AA)
    return (vector_AA * np.maximum(value_A, SMALLEST_VARIANCE) ** exponent) @ vector_AA.T


def _widened(x_XF: Floats, fitted_A: NDArray[np.bool_]) -> Floats:
    """Columns of the fitted actions among those of all, zeros elsewhere."""
    x_XA = np.zeros((len(x_XF), len(fitted_A)))
    x_XA[:, fitted_A] = x_XF
    return x_XA


def id_regression(
    user_R: np.ndarray,
    item_R: np.ndarray,
    click_R: np.ndarray,
    train_R: NDArray[np.bool_],
    *,
    penalty: float = 1.0,
    sweeps: int = 10,
) -> Floats:
    """Logits of P(click) by `id_effects`, fitted to the training rows, for all rows [R]."""
    effects = id_effects(
        user_R[train_R],
        item_R[train_R],
        click_R[train_R, None],
        users=int(user_R.max()) + 1,
        items=int(item_R.max()) + 1,
        penalty=penalty,
        sweeps=sweeps,
    )
    return effects.intercept_A[0] + effects.user_UA[user_R, 0] + effects.item_NA[item_R, 0]


def _sigmoid(logit: Floats) -> Floats:
    return 1 / (1 + np.exp(-logit))
