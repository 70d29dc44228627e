"""Vectors and item ids as an index holds them, or a refusal that names the first bad one."""

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.errors import UserError
from tenrec_jax.retrieval.hits import Floats, Ids

_LARGEST = 1e15  # entries beyond it could overflow an inner product in float32


def checked_vectors(vectors: NDArray, name: str, ids: Ids | None = None) -> Floats:
    """float32 [B, D], C-contiguous; every entry finite and small enough for inner products in float32.

    Raises:
        UserError: another shape, or an entry that is not finite or too large; the row is named, by its id where ids are given.
    """
    if np.ndim(vectors) != 2 or not np.shape(vectors)[1]:
        raise UserError(f"{name} vectors must be a matrix with at least one column, got shape {np.shape(vectors)}")
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(vectors, dtype=np.float32)
    good = (result.max(axis=1, initial=0) <= _LARGEST) & (result.min(axis=1, initial=0) >= -_LARGEST)
    if not good.all():
        row = int(np.argmin(good))
        which = f"{name} row {row}" if ids is None else f"{name} {ids[row]} (row {row} of the vectors)"
        raise UserError(f"{which} holds NaN, infinity or an entry beyond {_LARGEST:g}: look for a diverged model")
    return result


def checked_ids(item_ids: NDArray, count: int) -> Ids:
    """int32 [count], each at least 1 and once.

    Raises:
        UserError: ids of another number or type, outside [1, 2**31), or one that occurs twice.
    """
    ids = np.asarray(item_ids)
    if ids.shape != (count,) or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"need one integer id for each of {count} items, got {ids.dtype} {ids.shape}")
    if ids.min() < 1 or ids.max() > np.iinfo(np.int32).max:
        raise UserError(f"item ids must lie in [1, 2**31), got {ids.min()} to {ids.max()}: 0 stands for no item")
    values, times = np.unique(ids, return_counts=True)
    if len(values) < count:
        raise UserError(f"item id {values[np.argmax(times > 1)]} occurs more than once")
    return ids.astype(np.int32)
