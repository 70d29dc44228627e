"""Co-visits: what stands behind what in the training timelines, and how much a user's latest clicks therefore speak for a candidate; how
often each item was clicked at all; and how much more of a candidate's subject the user is shown than others are.

A model of low rank blurs what a table of pairs keeps: that these two items, of all, are taken one after the other. So the counts know
something that the two-tower does not, and the other way round. It is the oldest of recommenders (Linden, Smith and York, 2003,
doi:10.1109/MIC.2003.1167344; YouTube's co-visitation counts: Davidson et al., 2010, doi:10.1145/1864708.1864770), with an order in time.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.sparse import coo_array

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.data.neighbours import followers, item_subjects
from tenrec_jax.errors import UserError
from tenrec_jax.files import written_whole
from tenrec_jax.retrieval.hits import Floats, Ids

WINDOW = 10  # places behind an item that count
BACKWARD = 0.2  # what standing before an item counts, of what standing behind it does
PRIOR = 5.0  # co-visits with nothing, so that little is made of rare items
HISTORY = 128  # latest events of a user that speak
SUBJECT_PRIOR = 10.0  # events of everybody's subjects that each user is taken to have seen as well

_NAMES = ("item", "weight", "clicks", "subject", "share")  # of the arrays in the file


class CoVisits(NamedTuple):
    """What stands near each item, and how popular it is.

    Attributes:
        item_NK: of each of the items 0..N the K that belong to it most, int32 [N + 1, K]; 0 where there are fewer.
        weight_NK: how much, float32 [N + 1, K]; see `count_co_visits`.
        clicks_N: training clicks of each item, int32 [N + 1].
        subject_N: subject of each item, int32 [N + 1], 0 where it has none; see `item_subjects`.
        share_K: of the training rows with a subject, the share of each, float32 [K + 1].
    """

    item_NK: Ids
    weight_NK: Floats
    clicks_N: Ids
    subject_N: Ids
    share_K: Floats

    def scores(self, item_S: Ids, clicked_S: NDArray[np.bool_], item_C: Ids, decay: float) -> Floats:
        """What a user's events say for candidates: the sum over the clicked ones of `decay^age * weight`, [C].

        Args:
            item_S: dense ids of the user's events, oldest first, of which the last `HISTORY` are read; an event's age is the number of
                events after it. Items that were added to the catalogue after training say nothing.
            clicked_S: which of them were clicked.
            item_C: dense ids of the candidates, distinct.
            decay: of what an event says, with each event after it; 1 forgets none.
        """
        if not len(item_C):
            return np.zeros(0, np.float32)
        item_S, clicked_S = item_S[-HISTORY:], clicked_S[-HISTORY:]
        says_S = clicked_S & (item_S < len(self.item_NK))
        decay_S = np.float32(decay) ** np.arange(len(item_S) - 1, -1, -1, dtype=np.float32)[says_S]
        near_SK, weight_SK = self.item_NK[item_S[says_S]], self.weight_NK[item_S[says_S]] * decay_S[:, None]
        order_C = np.argsort(item_C)
        place_SK = np.minimum(np.searchsorted(item_C, near_SK, sorter=order_C), len(item_C) - 1)
        found_SK = item_C[order_C[place_SK]] == near_SK
        sums_C = np.bincount(order_C[place_SK[found_SK]], weight_SK[found_SK], len(item_C))
        return sums_C.astype(np.float32)

    def clicks(self, item_C: Ids) -> Ids:
        """Training clicks of dense items [C]; none of those that were added to the catalogue."""
        return _of_items(self.clicks_N, item_C)

    def subjects(self, item_S: Ids, item_C: Ids) -> Floats:
        """How many times as much of a candidate's subject the user is shown as all users are, [C].

        Where n_k of the user's n latest events have the candidate's subject k, whose share of all rows is p_k, it is
        `(n_k + SUBJECT_PRIOR * p_k) / ((n + SUBJECT_PRIOR) * p_k)`: the mean of the user's own share under a Dirichlet prior, over p_k.
        It is 1 of items without a subject.

        Args:
            item_S: dense ids of the user's events, clicked or not, oldest first, of which the last `HISTORY` are read.
            item_C: dense ids of the candidates.
        """
        count_K = np.bincount(_of_items(self.subject_N, item_S[-HISTORY:]), minlength=len(self.share_K))
        expected_K = (count_K[1:].sum() + SUBJECT_PRIOR) * self.share_K
        more_K = np.ones(len(self.share_K), np.float32)
        np.divide(
            count_K + SUBJECT_PRIOR * self.share_K, expected_K, out=more_K, where=expected_K > 0, casting="same_kind"
        )
        return more_K[_of_items(self.subject_N, item_C)]

    def save(self, path: Path) -> None:
        """Write them as safetensors."""
        with written_whole(path) as temporary:
            save_file(dict(zip(_NAMES, self, strict=True)), temporary)

    @classmethod
    def load(cls, path: Path) -> "CoVisits":
        """Read what `save` wrote.

        Raises:
            UserError: no readable file, or one that holds something else.
        """
        try:
            arrays = load_file(path)
            found = cls(*(arrays[name] for name in _NAMES))
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"{path} cannot be read as co-visits: {error}.") from error
        items = found.item_NK.shape[:1]
        if found.item_NK.shape != found.weight_NK.shape or not items == found.clicks_N.shape == found.subject_N.shape:
            raise UserError(
                f"{path} cannot be read as co-visits: item and weight must be [N + 1, K], clicks and subject [N + 1]."
            )
        if not 0 <= found.subject_N.min() <= found.subject_N.max() < len(found.share_K):
            raise UserError(f"{path} cannot be read as co-visits: an item's subject has no share.")
        return found


def counted(
    co_visits: CoVisits | None, item_S: Ids, clicked_S: NDArray[np.bool_], item_C: Ids, decay: float
) -> tuple[Floats, Ids, Floats]:
    """Co-visits, training clicks and subjects of candidates, [C] each, after a user's events as `CoVisits.scores` has them; zeros, zeros
    and ones where there are no co-visits."""
    if co_visits is None:
        return np.zeros(len(item_C), np.float32), np.zeros(len(item_C), np.int32), np.ones(len(item_C), np.float32)
    counts_C = co_visits.scores(item_S, clicked_S, item_C, decay)
    return counts_C, co_visits.clicks(item_C), co_visits.subjects(item_S, item_C)


def _of_items(value_N: Ids, item_C: Ids) -> Ids:
    """Values of dense items [C]; 0 of those that were added to the catalogue."""
    return np.where(item_C < len(value_N), value_N[np.minimum(item_C, len(value_N) - 1)], 0)


def count_co_visits(table: Interactions, rows: NDArray[np.integer], neighbours: int, *, seed: int) -> CoVisits:
    """The co-visits of a log.

    With `F_ij` how often item j follows i (`neighbours.followers`, over `WINDOW` places), `A = F + BACKWARD F'`, `r_i` the sum of its row
    i and `c_j` that of its column j, the weight of j beside i is

        A_ij / (r_i + PRIOR) / sqrt((c_j + PRIOR) / (mean c + PRIOR)),

    the share of j in what stands near i, less for what stands near everything; the mean is over the items that occur.

    Args:
        table: the log. rows: its training rows, ascending, clicked or not: what is shown in a row has a subject too. In a log of clicks
            alone no item gets one: retrieval has learned all of the same events, and subjects made its first ten places worse.
        neighbours: K, kept of each item.
        seed: of the subjects.
    """
    follows_NN = followers(table, rows, WINDOW)
    near_NN = coo_array(follows_NN + BACKWARD * follows_NN.T)
    row_N, column_N = (np.bincount(ids, near_NN.data, near_NN.shape[0]) + PRIOR for ids in (near_NN.row, near_NN.col))
    usual = column_N[column_N > PRIOR].mean() if near_NN.nnz else PRIOR
    weight = near_NN.data / row_N[near_NN.row] / np.sqrt(column_N[near_NN.col] / usual)
    # Those of an item together, the largest weight first; equal ones in the order of their ids.
    order = np.lexsort((near_NN.col, -weight, near_NN.row))
    row = near_NN.row[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    kept = place < neighbours
    item_NK = np.zeros((near_NN.shape[0], neighbours), np.int32)
    weight_NK = np.zeros(item_NK.shape, np.float32)
    item_NK[row[kept], place[kept]] = near_NN.col[order[kept]]
    weight_NK[row[kept], place[kept]] = weight[order[kept]]
    clicked = rows[table.labels_RA[rows, 0] > 0]
    clicks_N = np.bincount(table.item_R[clicked], minlength=len(item_NK)).astype(np.int32)
    subject_N = item_subjects(table, rows, seed=seed) if table.has_exposures else np.zeros(len(item_NK), np.int32)
    rows_K = np.bincount(subject_N[table.item_R[rows]], minlength=subject_N.max() + 1)
    rows_K[0] = 0
    share_K = (rows_K / max(rows_K.sum(), 1)).astype(np.float32)
    return CoVisits(item_NK, weight_NK, clicks_N, subject_N, share_K)
