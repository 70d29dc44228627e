"""Logistic regression on the ids of users and items: what a log's clicks tell without any history."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def id_regression(
    user_R: np.ndarray,
    item_R: np.ndarray,
    click_R: np.ndarray,
    train_R: NDArray[np.bool_],
    *,
    penalty: float = 1.0,
    sweeps: int = 10,
) -> Floats:
    """Logits of logit P(click) = intercept + user + item, fitted to the training rows, for all rows [R].

    The penalised likelihood (penalty / 2 times each squared id weight; the intercept is free) is climbed by Newton steps
    for all items, all users and the intercept in turn, each of which is a diagonal problem. An id without training rows
    has the weight 0.
    """
    user_T, item_T, click_T = user_R[train_R], item_R[train_R], click_R[train_R].astype(np.float64)
    user_W, item_W = np.zeros(int(user_R.max()) + 1), np.zeros(int(item_R.max()) + 1)
    rate = click_T.mean()
    intercept = float(np.log(rate / (1 - rate)))
    for _ in range(sweeps):
        for weight_W, id_T in ((item_W, item_T), (user_W, user_T)):
            p_T = _sigmoid(intercept + user_W[user_T] + item_W[item_T])
            slope_W = np.bincount(id_T, click_T - p_T, minlength=len(weight_W)) - penalty * weight_W
            weight_W += slope_W / (np.bincount(id_T, p_T * (1 - p_T), minlength=len(weight_W)) + penalty)
        p_T = _sigmoid(intercept + user_W[user_T] + item_W[item_T])
        intercept += float((click_T - p_T).sum() / (p_T * (1 - p_T)).sum())
    return intercept + user_W[user_R] + item_W[item_R]


def _sigmoid(logit: Floats) -> Floats:
    return 1 / (1 + np.exp(-logit))
