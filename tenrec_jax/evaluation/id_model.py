"""Logistic regression on the ids of users and items: what a log's labels tell without any history."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Newton's step is too long where an action is rare; a step of so much is enough for any id in a few sweeps.
LONGEST_STEP = 1.0
# Below this variance effects are nothing, and their penalty would grow without bound.
SMALLEST_VARIANCE = 1e-4


class IdEffects(NamedTuple):
    """logit P(label) = intercept + user + item, with a weight for each id; one without rows has the weight 0."""

    intercept: float
    user_U: Floats
    item_N: Floats

    def rates(self) -> tuple[Floats, Floats]:
        """P(label) of each user on an item of weight 0, and of each item shown to a user of weight 0."""
        return _sigmoid(self.intercept + self.user_U), _sigmoid(self.intercept + self.item_N)


def id_effects(
    user_T: np.ndarray,
    item_T: np.ndarray,
    label_T: np.ndarray,
    *,
    users: int,
    items: int,
    penalty: float | None = None,
    sweeps: int = 20,
) -> IdEffects:
    """Effects of users and items, fitted to T rows.

    The penalised likelihood (penalty / 2 times each squared weight; the intercept is free) is climbed by Newton steps for all items, all
    users and the intercept in turn, each of which is a diagonal problem.

    A penalty is the inverse variance of a normal prior. Without one given, users and items have one each, estimated from the rows by
    MacKay's rule (1992, doi:10.1162/neco.1992.4.3.415): the variance is the sum of squared weights over the number of weights that the rows
    determine, where a weight with curvature `h` counts as `1 - penalty / h`. Effects that the rows do not show shrink to nothing.

    Args:
        user_T, item_T: ids from 0, below `users` and `items`. label_T: 0 or 1.
        users, items: number of ids.
        penalty: of all weights; None estimates it.
        sweeps: rounds of steps.

    Returns:
        The effects. Where all rows have the label, or none, the intercept is infinite and all weights are 0.
    """
    label_T = label_T.astype(np.float64)
    user_W, item_W = np.zeros(users), np.zeros(items)
    rate = float(label_T.mean())
    if rate in (0.0, 1.0):
        return IdEffects(math.inf if rate else -math.inf, user_W, item_W)
    intercept = math.log(rate / (1 - rate))
    blocks = [(item_W, item_T), (user_W, user_T)]
    penalties = [1.0 if penalty is None else penalty] * len(blocks)
    for _ in range(sweeps):
        for number, (weight_W, id_T) in enumerate(blocks):
            p_T = _sigmoid(intercept + user_W[user_T] + item_W[item_T])
            slope_W = np.bincount(id_T, label_T - p_T, minlength=len(weight_W)) - penalties[number] * weight_W
            curvature_W = np.bincount(id_T, p_T * (1 - p_T), minlength=len(weight_W)) + penalties[number]
            weight_W += np.clip(slope_W / curvature_W, -LONGEST_STEP, LONGEST_STEP)
            if penalty is None:
                penalties[number] = 1 / _variance(weight_W, 1 - penalties[number] / curvature_W)
        p_T = _sigmoid(intercept + user_W[user_T] + item_W[item_T])
        intercept += float((label_T - p_T).sum() / (p_T * (1 - p_T)).sum())
    return IdEffects(intercept, user_W, item_W)


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
        click_R[train_R],
        users=int(user_R.max()) + 1,
        items=int(item_R.max()) + 1,
        penalty=penalty,
        sweeps=sweeps,
    )
    return effects.intercept + effects.user_U[user_R] + effects.item_N[item_R]


def _variance(weight_W: Floats, determined_W: NDArray[np.floating]) -> float:
    return max(float((weight_W**2).sum() / max(determined_W.sum(), SMALLEST_VARIANCE)), SMALLEST_VARIANCE)


def _sigmoid(logit: Floats) -> Floats:
    return 1 / (1 + np.exp(-logit))
