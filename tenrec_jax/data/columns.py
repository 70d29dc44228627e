"""Columns of the events on disk, counted value by value: how often each value stands on rows with and without a click."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tenrec_jax.data.arrow import as_numpy
from tenrec_jax.data.interactions import Interactions

FOLDS = 5
PRIOR_STRENGTH = 20.0

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ValueCounts:
    """Rows by value, fold and label.

    Attributes:
        value_V: the distinct values, rising.
        rows_VF2: int64 [V, F, 2]; rows of each value in each fold without and with a click.
    """

    value_V: np.ndarray
    rows_VF2: Counts

    def by_value(self) -> float:
        """AUC of the value itself."""
        return weighted_auc(self.value_V, *self.rows_VF2.sum(axis=1).T)

    def by_rate(self) -> float:
        """AUC of the value's click rate in the other folds, drawn towards the mean: the mean over folds, by rows.

        A value that the other folds lack gets their mean. NaN if no fold has both labels.
        """
        total, weight = 0.0, 0
        for fold in range(self.rows_VF2.shape[1]):
            here_V2 = self.rows_VF2[:, fold]
            others_V2 = self.rows_VF2.sum(axis=1) - here_V2
            if not (here_V2.sum(axis=0).all() and others_V2.any()):
                continue
            mean = others_V2[:, 1].sum() / others_V2.sum()
            rate_V = (others_V2[:, 1] + PRIOR_STRENGTH * mean) / (others_V2.sum(axis=1) + PRIOR_STRENGTH)
            total += weighted_auc(rate_V, *here_V2.T) * here_V2.sum()
            weight += int(here_V2.sum())
        return total / weight if weight else float("nan")


def values_of(values: pa.Array) -> np.ndarray:
    """A column's values as NumPy: missing numbers are NaN, missing texts empty."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return np.asarray(pc.fill_null(values, "").to_pylist(), object)
    if values.null_count:
        values = pc.fill_null(values.cast(pa.float64()), float("nan"))
    return as_numpy(values)


def count_values(
    blocks: Iterator[tuple[slice, np.ndarray]],
    table: Interactions,
    *,
    fold_of: Callable[[slice], np.ndarray] | None = None,
) -> ValueCounts:
    """Counts values over the rows of a table.

    Args:
        blocks: rows and their values, in any partition of the rows.
        table: gives the clicks and, where `fold_of` does not, the folds: all rows of a user are in one.
        fold_of: the folds of some rows, 0..FOLDS - 1.
    """
    click = table.actions.index("click")
    value_V, rows_VF2 = np.empty(0), np.zeros((0, FOLDS, 2), np.int64)
    for rows, values in blocks:
        fold = (fold_of or (lambda rows: folds_of_users(table.user_R[rows])))(rows)
        here_V, place = np.unique(values, return_inverse=True)
        cell = (place * FOLDS + fold) * 2 + (table.labels_RA[rows, click] == 1)
        here_VF2 = np.bincount(cell, minlength=len(here_V) * FOLDS * 2).reshape(-1, FOLDS, 2)
        if len(rows_VF2):
            value_V, rows_VF2 = _merged(value_V, rows_VF2, here_V, here_VF2)
        else:
            value_V, rows_VF2 = here_V, here_VF2
    return ValueCounts(value_V, rows_VF2)


def folds_of_users(user: np.ndarray) -> np.ndarray:
    """A fold, 0..FOLDS - 1, by a hash of the user's dense id."""
    return ((user.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)).astype(np.int64) % FOLDS


def weighted_auc(score: np.ndarray, negatives: np.ndarray, positives: np.ndarray) -> float:
    """AUC of rows given as counts by score; ties count one half. NaN if a class is absent."""
    order = np.argsort(score, kind="stable")
    score, negatives, positives = score[order], negatives[order], positives[order]
    first = np.flatnonzero(np.concatenate([[True], score[1:] != score[:-1]]))
    negatives = np.add.reduceat(negatives, first).astype(np.float64)
    positives = np.add.reduceat(positives, first).astype(np.float64)
    pairs = negatives.sum() * positives.sum()
    if not pairs:
        return float("nan")
    below = np.cumsum(negatives) - negatives
    return float(positives @ (below + negatives / 2) / pairs)


def _merged(value_V: np.ndarray, rows_VF2: Counts, other_V: np.ndarray, other_VF2: Counts) -> tuple[np.ndarray, Counts]:
    union = np.union1d(value_V, other_V)
    if len(union) > len(value_V):
        wider = np.zeros((len(union), *rows_VF2.shape[1:]), np.int64)
        wider[np.searchsorted(union, value_V)] = rows_VF2
        rows_VF2 = wider
    rows_VF2[np.searchsorted(union, other_V)] += other_VF2
    return union, rows_VF2
