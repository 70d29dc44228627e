"""Item vectors from who met what: a spectral embedding of the training exposures, which needs no labels and no training."""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.errors import UserError


def spectral_item_vectors(
    table: Interactions, rows: NDArray[np.integer], width: int, *, seed: int
) -> NDArray[np.float32]:
    """Items that the same users meet get similar vectors.

    With `A` the users' counts of exposures to items and `D` the diagonal matrices of its sums, the vectors are the leading right singular
    vectors of `D_users^-1/2 A D_items^-1/2` but the first, which tells popularity alone; each is scaled to length one (Dhillon, 2001).

    Args:
        table: the log. rows: its training rows.
        width: D. seed: of the iteration's start.

    Returns:
        float32 [N + 1, D]. Entry 0 and items without training rows are zero.

    Raises:
        UserError: fewer users or items than the width asks for.
    """
    user_R, item_R = table.user_R[rows], table.item_R[rows]
    (users, user_at), (items, item_at) = (np.unique(ids, return_inverse=True) for ids in (user_R, item_R))
    if min(len(users), len(items)) < width + 2:
        raise UserError(
            f"A spectral start of width {width} takes {width + 2} users and items; the training rows hold {len(users)} and {len(items)}: "
            'set features.item_start to "normal".'
        )
    weight_R = 1 / np.sqrt(np.bincount(user_at)[user_at] * np.bincount(item_at)[item_at])
    matrix = csr_array((weight_R, (user_at, item_at)), shape=(len(users), len(items)))
    start = np.random.default_rng((seed, 4)).normal(size=min(matrix.shape))
    _, values, right_DN = svds(matrix, k=width + 1, v0=start, return_singular_vectors="vh")
    vectors_ND = right_DN[np.argsort(-values)[1:]].T
    all_ND = np.zeros((table.num_items + 1, width), np.float32)
    all_ND[items] = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return all_ND
