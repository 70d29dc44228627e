"""Item vectors and subjects from what is shown next to what: a factorisation of the items' neighbourhoods, which needs no labels and no
training.

Where a session keeps to a subject, an item's neighbours in the timelines tell its subject, of a few exposures already: far more than who
met it, which mixes all that its users like. It is item2vec (Barkan and Koenigstein, 2016, arXiv:1603.04259) without sampling: skip-grams
with negative sampling factorise the matrix of pointwise mutual information (Levy and Goldberg, 2014).
"""

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.sparse import coo_array, csr_array
from scipy.sparse.linalg import svds

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.errors import UserError

WINDOW = 5  # places before and after that are neighbours
SMOOTHING = 0.75  # exponent of the neighbours' shares, which keeps rare ones from looking telling
SUBJECTS, ITEMS_A_SUBJECT = 50, 10  # subjects of a log; a small one has one for so many items


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
    information_NN, known_N = _information(table, rows)
    known = int(known_N.sum())
    if known < width + 2:
        raise UserError(
            f"A start from neighbours of width {width} takes {width + 2} items that stand among others; the training rows hold {known}: "
            'set features.item_start to "normal".'
        )
    return _unit_vectors(information_NN, known_N, width, np.random.default_rng((seed, 4)))


def item_subjects(table: Interactions, rows: NDArray[np.integer], *, seed: int) -> NDArray[np.int32]:
    """The subject of each item, int32 [N + 1], from 1: items that stand among the same items in the users' timelines share one.

    It is spectral clustering (Ng, Jordan and Weiss, NIPS 2001): k-means, from a start by k-means++ (Arthur and Vassilvitskii, SODA 2007),
    of `neighbour_item_vectors` one narrower than there are subjects. Entry 0 and items without neighbours have none, 0, as have all where
    a log has too few items.

    Args:
        table: the log. rows: its training rows, ascending.
        seed: of both iterations' starts.
    """
    information_NN, known_N = _information(table, rows)
    subject_N, known = np.zeros(len(known_N), np.int32), int(known_N.sum())
    subjects = min(SUBJECTS, known // ITEMS_A_SUBJECT)
    if subjects > 1:
        random = np.random.default_rng((seed, 6))
        vector_MD = _unit_vectors(information_NN, known_N, subjects - 1, random)[known_N]
        starts = min(subjects, len(np.unique(vector_MD, axis=0)))  # k-means++ takes different ones
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "One of the clusters is empty")  # one subject less
            _, label_M = kmeans2(vector_MD, starts, iter=20, minit="++", seed=random)
        subject_N[known_N] = label_M + 1
    return subject_N


def _information(table: Interactions, rows: NDArray[np.integer]) -> tuple[csr_array, NDArray[np.bool_]]:
    """The positive mutual information of the items' neighbourhoods, and which items have any."""
    follows_NN = followers(table, rows, WINDOW)
    information_NN = _mutual_information(csr_array(follows_NN + follows_NN.T))
    return information_NN, np.diff(information_NN.indptr) > 0


def _unit_vectors(
    information_NN: csr_array, known_N: NDArray[np.bool_], width: int, random: np.random.Generator
) -> NDArray[np.float32]:
    """The vectors of `neighbour_item_vectors`, of the items that are known; zero too where so few dimensions tell nothing of one."""
    start = random.normal(size=information_NN.shape[0])
    left_ND, values, _ = svds(information_NN, k=width + 1, v0=start)
    kept = np.argsort(-values)[1:]
    vectors_ND = left_ND[:, kept] * np.sqrt(values[kept])
    length_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    told_N1 = known_N[:, None] & (length_N1 > 0)
    return np.divide(vectors_ND, length_N1, out=np.zeros_like(vectors_ND), where=told_N1).astype(np.float32)


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
