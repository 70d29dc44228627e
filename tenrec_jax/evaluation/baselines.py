"""Baselines counted from the training rows alone: popularity, recency, and the smoothed rates of items, of users and of both."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.data.row_blocks import stretches
from tenrec_jax.errors import UserError

_BLOCK = 1 << 22  # rows counted at a time: bounds the memory on memory-mapped tables

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TrainCounts:
    """How often each item and user was exposed and acted on in the training rows.

    Exact in float64. Entry 0 (unknown) is 0; the columns of `item_actions_N1A` [N+1, A] and `user_actions_U1A`
    [U+1, A] follow `actions`. Where a table logs clicks alone (`has_exposures` is False), its rows are the exposures.
    """

    actions: tuple[str, ...]
    item_exposures_N1: Floats
    item_actions_N1A: Floats
    user_exposures_U1: Floats
    user_actions_U1A: Floats


def train_counts(table: Interactions, train_rows: NDArray[np.integer]) -> TrainCounts:
    """Counts over the given rows of the table, in one pass.

    Args:
        table: the interactions.
        train_rows: row numbers in [0, R), such as `split.rows(Part.TRAIN)`; a row given twice counts twice.

    Raises:
        ValueError: rows that are not integers (a mask, say) or lie outside the table.
    """
    rows = np.asarray(train_rows)
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"train_rows must be a flat array of row numbers, got {rows.dtype} {rows.shape}")
    if len(rows) and not (rows.min() >= 0 and rows.max() < table.num_rows):
        raise ValueError(f"train_rows must lie in [0, {table.num_rows})")
    item_exposures_N1, user_exposures_U1 = np.zeros(table.num_items + 1), np.zeros(table.num_users + 1)
    item_actions_N1A = np.zeros((table.num_items + 1, len(table.actions)))
    user_actions_U1A = np.zeros((table.num_users + 1, len(table.actions)))
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        item, user, labels = table.item_R[block], table.user_R[block], table.labels_RA[block]
        item_exposures_N1 += np.bincount(item, minlength=len(item_exposures_N1))
        user_exposures_U1 += np.bincount(user, minlength=len(user_exposures_U1))
        for action in range(len(table.actions)):
            acted = labels[:, action] == 1
            item_actions_N1A[:, action] += np.bincount(item[acted], minlength=len(item_exposures_N1))
            user_actions_U1A[:, action] += np.bincount(user[acted], minlength=len(user_exposures_U1))
    return TrainCounts(table.actions, item_exposures_N1, item_actions_N1A, user_exposures_U1, user_actions_U1A)


def popularity_scores(counts: TrainCounts) -> Floats:
    """Number of training clicks of each item [N+1]: the retrieval baseline "popularity"."""
    return counts.item_actions_N1A[:, _column(counts, "click")].copy()


def item_rate(counts: TrainCounts, action: str, *, prior_strength: float = 20.0) -> Floats:
    """Smoothed rate of an action per item [N+1]: (actions + s * global rate) / (exposures + s), s = prior_strength.

    The posterior mean under a Beta prior with the mean of all training rows and the weight of s exposures. An item
    without training rows, and entry 0, get the global rate.

    Raises:
        UserError: an unknown action, a prior strength that is not positive and finite, or no training rows.
    """
    column = _column(counts, action)
    return _smoothed(counts.item_actions_N1A[:, column], counts.item_exposures_N1, prior_strength)


def user_rate(counts: TrainCounts, action: str, *, prior_strength: float = 20.0) -> Floats:
    """Smoothed rate of an action per user [U+1]; see `item_rate`."""
    column = _column(counts, action)
    return _smoothed(counts.user_actions_U1A[:, column], counts.user_exposures_U1, prior_strength)


def item_user_rate(item_rate: Floats, user_rate: Floats, global_rate: Floats | float) -> Floats:
    """The rate of an item and a user together: their odds multiplied, over the odds of all rows.

    Exact where item and user act independently on the logit. Arrays that broadcast; rates in [0, 1]. Where all rows or none have the
    action, so do the item's and the user's, and so does the result.
    """
    item, user, everybody = np.broadcast_arrays(item_rate, user_rate, global_rate)
    for_it = item * user * (1 - everybody)
    against = (1 - item) * (1 - user) * everybody
    total = for_it + against
    return np.divide(for_it, total, out=everybody.astype(np.float64), where=total > 0)


def recent_clicks(table: Interactions, train_rows: NDArray[np.integer], *, share: float = 0.25) -> Floats:
    """Clicks of each item [N+1] in the last part of its users' training rows: what is popular of late, each user's own order being the
    only time that a log is sure to have.

    Args:
        table: the interactions.
        train_rows: row numbers, ascending.
        share: the last rows of a user that count, at least one: the last ceil(share * n) of n.
    """
    rows = _ascending(train_rows)
    offsets = np.searchsorted(rows, table.offsets)
    counted = np.zeros(table.num_items + 1)
    first_counted = offsets[1:] - np.ceil(share * np.diff(offsets)).astype(np.int64)
    for start in range(0, len(rows), _BLOCK):
        place = np.arange(start, min(start + _BLOCK, len(rows)))
        block = rows[start : start + _BLOCK]
        clicked = table.labels_RA[block, table.actions.index("click")] == 1
        late = clicked & (place >= first_counted[table.user_R[block]])
        counted += np.bincount(table.item_R[block[late]], minlength=len(counted))
    return counted


def recency_scorer(
    table: Interactions, train_rows: NDArray[np.integer], recent_N1: Floats
) -> Callable[[np.ndarray], NDArray[np.float32]]:
    """The retrieval baseline "recency", from dense users [B] to scores [B, N]: the items of a user's own training rows first, the latest
    before earlier ones, then items by `recent_clicks`.

    Where seen items are taken out of the ranking, these come after the first part.
    """
    rows = _ascending(train_rows)
    offsets = np.searchsorted(rows, table.offsets)
    # Only the order counts: numbers of distinct values stay exact in float32.
    order_N = np.unique(recent_N1[1:], return_inverse=True)[1].astype(np.float32)

    def score(users: np.ndarray) -> NDArray[np.float32]:
        scores_BN = np.tile(order_N, (len(users), 1))
        user, place = stretches(offsets[users], offsets[users + 1])
        nth, own = place - offsets[users][user], table.item_R[rows[place]]
        np.maximum.at(scores_BN, (user, own - 1), (order_N.max(initial=0) + 1 + nth).astype(np.float32))
        return scores_BN

    return score


def _ascending(train_rows: NDArray[np.integer]) -> NDArray[np.integer]:
    rows = np.asarray(train_rows)
    if np.any(rows[1:] <= rows[:-1]):
        raise ValueError("train_rows must be ascending")
    return rows


def _smoothed(actions: Floats, exposures: Floats, prior_strength: float) -> Floats:
    if not 0 < prior_strength < np.inf:
        raise UserError(f"prior_strength is {prior_strength}: give a positive number of exposures")
    if not exposures.sum():
        raise UserError("the training part has no rows, so no rate can be estimated: check the split")
    global_rate = actions.sum() / exposures.sum()
    return (actions + prior_strength * global_rate) / (exposures + prior_strength)


def _column(counts: TrainCounts, action: str) -> int:
    if action not in counts.actions:
        close = difflib.get_close_matches(action, counts.actions, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"the table has no action {action!r}, only {', '.join(counts.actions)}{hint}")
    return counts.actions.index(action)
