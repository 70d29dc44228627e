"""Item vectors from what is shown next to what: a factorisation of the items' neighbourhoods, which needs no labels and no training.

Where a session keeps to a subject, an item's neighbours in the timelines tell its subject, of a few exposures already: far more than who
met it, which mixes all that its users like. It is item2vec (Barkan and Koenigstein, 2016, arXiv:1603.04259) without sampling: skip-grams
with negative sampling factorise the matrix of pointwise mutual information (Levy and Goldberg, 2014).
"""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.linalg import svds

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.errors import UserError

WINDOW = 5  # places before and after that are neighbours
SMOOTHING = 0.75  # exponent of the neighbours' shares, which keeps rare ones from looking telling


def neighbour_item_vectors(
    table: Interactions, rows: NDArray[np.integer], width: int, *, seed: int
) -> NDArray[np.float32]:
    """Items that stand among the same items in the users' timelines get similar vectors.

    Let `A_ij` be how often item j stands near i, a pair k places apart counting `1 - (k - 1) / WINDOW`. Of the positive pointwise mutual
    information, `max(0, log(p(i, j) / (p(i) p'(j))))` with `p'(j)` in proportion to `p(j)^SMOOTHING`, the vectors are the leading left
    singular vectors but the first, which tells what all have in common, times the roots of their singular values; each is scaled to length
    one (Levy, Goldberg and Dagan, 2015, doi:10.1162/tacl_a_00134).

    Args:
        table: the log. rows: its training rows, ascending.
        width: D. seed: of the iteration's start.

    Returns:
        float32 [N + 1, D]. Entry 0 and items without neighbours are zero.

    Raises:
        UserError: fewer items with neighbours than the width asks for.
    """
    follows_NN = followers(table, rows, WINDOW)
    information_NN = _mutual_information(csr_array(follows_NN + follows_NN.T))
    known_N = np.diff(information_NN.indptr) > 0
    known = int(known_N.sum())
    if known < width + 2:
        raise UserError(
            f"A start from neighbours of width {width} takes {width + 2} items that stand among others; the training rows hold {known}: "
            'set features.item_start to "normal".'
        )
    start = np.random.default_rng((seed, 4)).normal(size=information_NN.shape[0])
    left_ND, values, _ = svds(information_NN, k=width + 1, v0=start)
    kept = np.argsort(-values)[1:]
    vectors_ND = left_ND[:, kept] * np.sqrt(values[kept])
    unit_ND = np.zeros(vectors_ND.shape, np.float32)
    unit_ND[known_N] = vectors_ND[known_N] / np.linalg.norm(vectors_ND[known_N], axis=1, keepdims=True)
    return unit_ND


def followers(table: Interactions, rows: NDArray[np.integer], window: int) -> csr_array:
    """How often item j follows item i in the users' timelines, [N + 1, N + 1]: k places behind it counts `1 - (k - 1) / window`.

    No item follows itself.

    Args:
        table: the log. rows: those that count, ascending.
        window: places that count.
    """
    user_R, item_R = table.user_R[rows], table.item_R[rows]
    size = table.num_items + 1
    follows_NN = csr_array((size, size))
    for apart in range(1, window + 1):
        one, other = item_R[:-apart], item_R[apart:]
        counts = (user_R[:-apart] == user_R[apart:]) & (one != other)
        weight = np.full(int(counts.sum()), 1 - (apart - 1) / window)
        follows_NN = follows_NN + csr_array((weight, (one[counts], other[counts])), shape=follows_NN.shape)
    return follows_NN


def _mutual_information(near_NN: csr_array) -> csr_array:
    """The positive pointwise mutual information of the counts."""
    total_N = np.asarray(near_NN.sum(axis=1)).ravel()
    smoothed_N = total_N**SMOOTHING
    pair = coo_array(near_NN)
    share = smoothed_N[pair.col] / smoothed_N.sum()
    information = np.log(pair.data / (total_N[pair.row] * share))
    kept = information > 0
    return csr_array((information[kept], (pair.row[kept], pair.col[kept])), shape=near_NN.shape)
