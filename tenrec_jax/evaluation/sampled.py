"""Ranking metrics among a target and N uniformly drawn negatives, as much of the literature reports them ("1 + 99").

Such numbers are large, and can order models otherwise than the full catalogue does (Krichene and Rendle, KDD 2020): they stand beside the
full-catalogue metrics for comparison, never instead of them.

Nothing is drawn here. A target that `b` of `m` other candidates beat in full is beaten by a hypergeometric number of N distinct draws,

    P(j of the N beat it) = C(b, j) C(m - b, N - j) / C(m, N),

so the metrics are the expectations that averaging over endless draws would come to, without its noise. Where ties leave open whether `b`
is `low` or more, up to `high`, the mean over these is taken, by

    sum_{b <= B} C(b, j) C(m - b, N - j) = C(m + 1, N + 1) P(at least j + 1 of N + 1 draws from m + 1 are among the first B + 1),

both sides counting the sets of N + 1 of `0..m` whose element number j + 1 is at most B.
"""

import numpy as np
from scipy.special import gammaln

from tenrec_jax.evaluation.places import Places
from tenrec_jax.evaluation.rows import Array, Floats

NEGATIVES = 99
CUTOFFS = (5, 10)
_BLOCK = 1 << 14  # targets at a time, each of which takes a few arrays of N numbers


def sampled_metrics(places: Places, candidates_P: Array, negatives: int = NEGATIVES) -> dict[str, Floats]:
    """Expected metrics of targets [P], one a user.

    Args:
        places: of the targets among all their candidates; an infinite one is a miss.
        candidates_P: number of candidates, the target counted.
        negatives: N; where there are fewer other candidates, all are taken.

    Returns:
        "hit@1", "recall@k", "ndcg@k" and "mrr", float64 [P] each.
    """
    place_1N = np.arange(1, negatives + 2)
    gain_1N = 1 / np.log2(place_1N + 1)
    weights = {"hit@1": place_1N == 1}
    weights |= {f"recall@{k}": place_1N <= k for k in CUTOFFS}
    weights |= {f"ndcg@{k}": gain_1N * (place_1N <= k) for k in CUTOFFS}
    weights["mrr"] = 1 / place_1N
    others_P, found = np.asarray(candidates_P) - 1, np.flatnonzero(np.isfinite(places.first))
    values = {name: np.zeros(len(others_P)) for name in weights}
    for start in range(0, len(found), _BLOCK):
        block = found[start : start + _BLOCK]
        of_block = Places(places.first[block], places.last[block])
        probability_PN = _place_probabilities(of_block, others_P[block], negatives)
        for name, weight in weights.items():
            values[name][block] = probability_PN @ weight
    return values


def _place_probabilities(places: Places, others_P: Array, negatives: int) -> Floats:
    """The probability of each place 1..N + 1, [P, N + 1]."""
    drawn_P = np.minimum(negatives, others_P)

    def more_than(first_P: Array) -> Floats:
        """P(more than j of the draws are among the first so many), for j from 0 to N."""
        taken_N = np.arange(1, negatives + 2)
        total_P1, first_P1, drawn_P1 = others_P[:, None] + 1, first_P[:, None], drawn_P[:, None] + 1
        log_exactly_PN = (
            _log_choices(first_P1, taken_N)
            + _log_choices(total_P1 - first_P1, drawn_P1 - taken_N)
            - _log_choices(total_P1, drawn_P1)
        )
        return np.cumsum(np.exp(log_exactly_PN)[:, ::-1], axis=1)[:, ::-1]

    scale_P = (others_P + 1) / (drawn_P + 1) / (places.last - places.first + 1)
    return scale_P[:, None] * (more_than(places.last) - more_than(places.first - 1))


def _log_choices(n: Array, k: Array) -> Floats:
    """log C(n, k); -inf where there is no such choice."""
    possible = (k >= 0) & (k <= n)
    k = np.where(possible, k, 0)
    return np.where(possible, gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1), -np.inf)
