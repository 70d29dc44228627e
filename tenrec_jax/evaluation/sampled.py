"""Ranking metrics among a target and N uniformly drawn negatives, as much of the literature reports them ("1 + 99").

Such numbers are large, and can order models otherwise than the full catalogue does (Krichene and Rendle, KDD 2020): they stand beside the
full-catalogue metrics for comparison, never instead of them.

Nothing is drawn here. A target that `b` of `m` other candidates beat in full is beaten by a hypergeometric number of N distinct draws,

    P(j of the N beat it) = C(b, j) C(m - b, N - j) / C(m, N),

so the metrics are the expectations that averaging over endless draws would come to, without its noise.
"""

import numpy as np
from scipy.stats import hypergeom

from tenrec_jax.evaluation.places import Places
from tenrec_jax.evaluation.rows import Array, Floats

NEGATIVES = 99
CUTOFFS = (5, 10)


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
    probability_PN = _place_probabilities(places, np.asarray(candidates_P) - 1, negatives)
    return {name: probability_PN @ weight for name, weight in weights.items()}


def _place_probabilities(places: Places, others_P: Array, negatives: int) -> Floats:
    """The probability of each place 1..N + 1, [P, N + 1]; the mean over the places that ties leave open."""
    beaten_N = np.arange(negatives + 1)
    drawn_P = np.minimum(negatives, others_P)
    probability_PN = np.zeros((len(others_P), negatives + 1))
    found_P = np.isfinite(places.first)
    untied = np.flatnonzero(found_P & (places.first == places.last))
    better_P = places.first[untied] - 1
    probability_PN[untied] = hypergeom.pmf(
        beaten_N, others_P[untied, None], better_P[:, None].astype(np.int64), drawn_P[untied, None]
    )
    for target in np.flatnonzero(found_P & (places.first < places.last)):
        better_B1 = np.arange(int(places.first[target]) - 1, int(places.last[target]))[:, None]
        probability_PN[target] = hypergeom.pmf(beaten_N, others_P[target], better_B1, drawn_P[target]).mean(axis=0)
    return probability_PN
