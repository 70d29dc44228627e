"""Retrieval metrics of users, each of whom may have several targets, exact in the presence of ties."""

from collections.abc import Mapping

import numpy as np

from tenrec_jax.evaluation.places import Places, gains, hits, reciprocal_ranks
from tenrec_jax.evaluation.rows import Array, Floats

CUTOFFS = (1, 5, 10, 20, 50, 100)


def retrieval_metrics(user_P: Array, item_P: Array, places: Places) -> tuple[Array, Mapping[str, Floats]]:
    """Each retrieval metric as per-user values [U'], with the users, ascending.

    With several targets a user's recall is the share of targets found, NDCG is normalised by the ideal order of that many targets, and
    MRR and hit look at the best-placed target. All are expectations over the ways to break ties, as `Places` are.

    Args:
        user_P, item_P: of every target; a target that stands there twice counts twice.
        places: of the targets among the candidates of their user.
    """
    users, number_P = np.unique(user_P, return_inverse=True)
    targets_U = np.bincount(number_P)

    def per_user(value_P: Floats) -> Floats:
        return np.bincount(number_P, value_P, minlength=len(users)).astype(np.float64)

    best, level_U = _best_places(number_P, item_P, places, len(users))
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, max(CUTOFFS) + 2)))])
    values = {f"recall@{k}": per_user(hits(places, k)) / targets_U for k in CUTOFFS}
    values |= {f"ndcg@{k}": per_user(gains(places, k)) / ideal[np.minimum(targets_U, k)] for k in CUTOFFS[1:]}
    values |= {f"hit@{k}": first_hits(best, level_U, k) for k in CUTOFFS}
    values["mrr"] = first_reciprocal_ranks(best, level_U)
    return users, values


def first_hits(best: Places, level_U: Array, k: int) -> Floats:
    """Probability that at least one of `level_U` targets, which all tie with one another from `best.first` to `best.last`, is in the
    first k: one less the share of the ways to draw the places up to k from the other candidates.
    """
    found = hits(best, k)  # by one target
    several = np.flatnonzero((level_U > 1) & (found > 0) & (found < 1))
    size, drawn = best.last[several] - best.first[several] + 1, k - best.first[several] + 1
    missed = np.ones(len(several))
    for target in range(int(level_U[several].max(initial=0))):
        left = np.maximum(size - drawn - target, 0) / (size - target)
        missed *= np.where(level_U[several] > target, left, 1.0)
    found[several] = 1 - missed
    return found


def first_reciprocal_ranks(best: Places, level_U: Array) -> Floats:
    """Expected reciprocal of the best place of `level_U` targets that all tie with one another."""
    values = reciprocal_ranks(best)
    several = np.flatnonzero((level_U > 1) & (best.first < best.last))
    cases, case = np.unique(np.stack([*best, level_U])[:, several], axis=1, return_inverse=True)
    values[several] = np.array([_first_reciprocal_rank(int(f), int(n), int(m)) for f, n, m in cases.T])[case]
    return values


def _first_reciprocal_rank(first: int, last: int, level: int) -> float:
    size = last - first + 1
    behind = np.arange(size - level)
    # P(the first of `level` among `size` places is number t, from 0): the quotient of neighbouring terms is (n - m - t) / (n - 1 - t).
    quotients = np.concatenate([[level / size], (size - level - behind) / (size - 1 - behind)])
    return float(np.cumprod(quotients) @ (1 / np.arange(first, last - level + 2)))


def _best_places(number_P: Array, item_P: Array, places: Places, users: int) -> tuple[Places, Array]:
    """The places of each user's best-placed target, and how many different targets share them."""
    first_U = np.full(users, np.inf)
    np.minimum.at(first_U, number_P, places.first)
    is_best = np.flatnonzero(places.first == first_U[number_P])
    last_U = np.full(users, np.inf)
    last_U[number_P[is_best]] = places.last[is_best]
    different = np.unique(np.stack([number_P[is_best], item_P[is_best]]), axis=1)
    return Places(first_U, last_U), np.bincount(different[0], minlength=users)
