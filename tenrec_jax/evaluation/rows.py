"""Rows of a binary metric, chosen and checked once."""

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.errors import UserError

Array = np.ndarray
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


def select_rows(
    labels: Array, scores: Array, where: Array | None = None, groups: Array | None = None
) -> tuple[Bools, Array, Array]:
    """The rows that count, checked: positives (bool), scores, groups (all zero when None).

    Raises:
        ValueError: arrays that are not flat or differ in length, or a mask that is not bool.
        UserError: a label other than 0 and 1, or a NaN score.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    groups = np.broadcast_to(np.int8(0), labels.shape) if groups is None else np.asarray(groups)
    if labels.ndim != 1 or not labels.shape == scores.shape == groups.shape:
        shapes = f"labels {labels.shape}, scores {scores.shape}, groups {groups.shape}"
        raise ValueError(f"labels, scores and groups must be flat arrays of one length, got {shapes}")
    if where is not None:
        where = np.asarray(where)
        if where.dtype != bool or where.shape != labels.shape:
            raise ValueError(f"where must be bool {labels.shape}, got {where.dtype} {where.shape}")
        labels, scores, groups = labels[where], scores[where], groups[where]
    positive = labels if labels.dtype == bool else labels == 1
    if np.count_nonzero(positive) + np.count_nonzero(labels == 0) < len(labels):
        row = int(np.argmin(positive | (labels == 0)))
        raise UserError(f"selected row {row}: label {labels[row]} is neither 0 nor 1")
    if len(scores) and np.isnan(scores.max()):  # the maximum is NaN if any is; no mask is made of sound scores
        row = int(np.argmax(np.isnan(scores)))
        raise UserError(f"selected row {row}: the score is NaN; look for a diverged model")
    return positive, scores, groups


def select_probabilities(
    labels: Array, scores: Array, where: Array | None = None, groups: Array | None = None
) -> tuple[Bools, Floats, Array]:
    """As `select_rows`; a score outside [0, 1] is a UserError that names its row."""
    positive, scores, groups = select_rows(labels, scores, where, groups)
    outside = (scores < 0) | (scores > 1)
    if outside.any():
        row = int(np.argmax(outside))
        raise UserError(f"selected row {row}: {scores[row]} is no probability; pass sigmoid(logit), not the logit")
    return positive, scores.astype(np.float64), groups
