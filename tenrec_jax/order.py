"""The order of a user's candidates, from what retrieval, the ranker and co-visits say of each.

Retrieval and co-visits give the odds of an item to come next; their product, each to a power, is a logarithmic pool of opinions (Genest
and Zidek, 1986, doi:10.1214/ss/1177013825). The ranker says what an item is worth if it comes. So candidates are ordered by

    worth * (exp(b * retrieval) * (1 + co_visits / FLOOR)^c)^weight.

The powers b and c of a run are fitted on what validation users clicked next: a conditional logit (McFadden, 1974). The weight is a rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp

from tenrec_jax.retrieval.hits import Floats
from tenrec_jax.settings import NonNegative, Settings

# Co-visits of a candidate of which no event speaks: about half a percent of what one latest event has to give.
FLOOR = 1e-3
# How strongly fitted powers are held to those of a recommender without co-visits: as by a normal prior of this precision.
PRECISION = 1.0
# The least power of worth when fitting, which the others are divided by.
LEAST_WORTH = 0.05


@dataclass(frozen=True)
class Order(Settings):
    """The powers b and c of the module's formula. The default leaves co-visits out.

    Attributes:
        retrieval: b, of retrieval's odds.
        co_visits: c, of the co-visits.
    """

    retrieval: NonNegative = 1.0
    co_visits: NonNegative = 0.0


class Signals(NamedTuple):
    """What is known of C candidates of a user.

    Attributes:
        retrieval_C: inner products of query and item.
        worth_C: expected worth of the actions; None where there is no ranker.
        co_visits_C: `CoVisits.scores`; zeros where there are none.
    """

    retrieval_C: Floats
    worth_C: Floats | None
    co_visits_C: Floats


def fused(order: Order, signals: Signals, weight: float = 1.0) -> Floats:
    """What orders the candidates, [C].

    With a ranker it is the module's product, with retrieval's odds relative to the best candidate's; without, its logarithm.

    Args:
        order: the powers.
        signals: of the candidates.
        weight: of what comes next, where there is a ranker; 0 leaves worth alone, so that no score hangs on the other candidates.
    """
    retrieval_C, worth_C, co_visits_C = signals
    log_co_visits_C = order.co_visits * np.log1p(co_visits_C / FLOOR)
    if worth_C is None:
        return order.retrieval * retrieval_C + log_co_visits_C
    best = retrieval_C.max(initial=-np.inf)
    return worth_C * np.exp(weight * (order.retrieval * (retrieval_C - best) + log_co_visits_C))


def fit_order(signals: Sequence[Signals], clicked: Sequence[NDArray[np.bool_]]) -> Order:
    """The powers under which what users clicked next was most probable among their candidates, held to `Order()` by a weak prior.

    With powers a, b, c of worth, retrieval's odds and co-visits, and s the logarithm of their product, it minimises

        -sum log(exp(s_target) / sum_C exp(s_C)) + PRECISION / 2 * ((a - 1)^2 + (b - 1)^2 + c^2)

    over a >= LEAST_WORTH, b >= 0, c >= 0, with a term for each clicked candidate, which is convex; b / a and c / a give the same order with
    a worth of power 1. Users none of whose candidates was clicked tell nothing.

    Args:
        signals: of each user's candidates, all with or all without a ranker.
        clicked: which of each user's candidates were clicked next, [C].
    """
    default = np.array([1.0, 1.0, 0.0])
    telling = [(_terms(each), hit) for each, hit in zip(signals, clicked, strict=True) if hit.any()]

    def loss_and_gradient(power_3: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        loss, gradient_3 = PRECISION / 2 * ((power_3 - default) ** 2).sum(), PRECISION * (power_3 - default)
        for term_C3, hit_C in telling:
            score_C = term_C3 @ power_3
            total, targets = logsumexp(score_C), hit_C.sum()
            loss += targets * total - score_C[hit_C].sum()
            gradient_3 = gradient_3 + targets * (np.exp(score_C - total) @ term_C3) - term_C3[hit_C].sum(axis=0)
        return float(loss), gradient_3

    bounds = [(LEAST_WORTH, None), (0.0, None), (0.0, None)]
    a, b, c = minimize(loss_and_gradient, default, jac=True, method="L-BFGS-B", bounds=bounds).x.tolist()
    return Order(b / a, c / a)


def _terms(signals: Signals) -> NDArray[np.float64]:
    """What the powers are multiplied with, [C, 3]: the logarithms of worth, retrieval's odds and co-visits."""
    retrieval_C, worth_C, co_visits_C = signals
    log_worth_C = np.zeros(len(retrieval_C)) if worth_C is None else np.log(worth_C)
    return np.stack([log_worth_C, retrieval_C - retrieval_C.max(), np.log1p(co_visits_C / FLOOR)], axis=1)
