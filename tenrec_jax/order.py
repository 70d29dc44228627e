"""The order of a user's candidates, from what retrieval, the ranker, co-visits, popularity and subjects say of each.

Retrieval, co-visits, popularity and subjects give the odds of an item to come next; their product, each to a power, is a logarithmic
pool of opinions (Genest and Zidek, 1986, doi:10.1214/ss/1177013825). The ranker says what an item is worth if it comes. So the order is
that of

    worth * (exp(b * retrieval) * (1 + co_visits / FLOOR)^c * (1 + clicks)^d * subjects^e)^weight.

The powers b, c, d and e of a run, and how fast co-visits forget a user's events, are fitted on what validation users clicked next: a
conditional logit (McFadden, 1974). The weight is a rule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from tenrec_jax.retrieval.hits import Floats, Ids
from tenrec_jax.settings import Fraction, NonNegative, Settings

# Of co-visits: so few make little difference from none.
FLOOR = 1e-3
# Decays of what an event says by co-visits, to choose from: a session's subject, or what a user likes for long.
DECAYS = (0.8, 0.9, 1.0)
# How strongly fitted powers are held to those of a recommender without co-visits: as by a normal prior of this precision.
PRECISION = 1.0
# The least power of worth when fitting, which the others are divided by.
LEAST_WORTH = 0.05


@dataclass(frozen=True)
class Order(Settings):
    """The powers b, c, d and e of the module's formula, and the co-visits' decay. The default leaves all but retrieval out.

    Attributes:
        retrieval: b, of retrieval's odds.
        co_visits: c, of the co-visits.
        popularity: d, of the items' clicks.
        subjects: e, of how much more of an item's subject the user is shown than all are.
        decay: of what a user's event says by co-visits, with each event after it (`CoVisits.scores`).
    """

    retrieval: NonNegative = 1.0
    co_visits: NonNegative = 0.0
    popularity: NonNegative = 0.0
    subjects: NonNegative = 0.0
    decay: Fraction = DECAYS[0]


class Signals(NamedTuple):
    """What is known of C candidates of a user.

    Attributes:
        retrieval_C: inner products of query and item.
        worth_C: expected worth of the actions; None where there is no ranker.
        co_visits_C: `CoVisits.scores`; zeros where there are none.
        clicks_C: training clicks of the items; zeros where there are no co-visits.
        subjects_C: `CoVisits.subjects`; ones where there are no co-visits.
    """

    retrieval_C: Floats
    worth_C: Floats | None
    co_visits_C: Floats
    clicks_C: Ids
    subjects_C: Floats


def fused(order: Order, signals: Signals, weight: float = 1.0) -> Floats:
    """What orders the candidates, [C].

    With a ranker it is the module's product, with odds relative to those of the candidate that has the largest; without, its logarithm.

    Args:
        order: the powers.
        signals: of the candidates.
        weight: of what comes next, where there is a ranker; 0 leaves worth alone, so that no score hangs on the other candidates.
    """
    retrieval_C, worth_C, co_visits_C, clicks_C, subjects_C = signals
    log_odds_C = order.retrieval * retrieval_C + order.co_visits * np.log1p(co_visits_C / FLOOR)
    log_odds_C += order.popularity * np.log1p(clicks_C, dtype=np.float32) + order.subjects * np.log(subjects_C)
    if worth_C is None:
        return log_odds_C
    return worth_C * np.exp(weight * (log_odds_C - log_odds_C.max(initial=-np.inf)))


def fit_order(
    signals: Mapping[float, Sequence[Signals]],
    clicked: Sequence[NDArray[np.bool_]],
    log_count: Sequence[NDArray[np.floating]],
) -> Order:
    """The powers and the decay under which what users clicked next was most probable, held to `Order()` by a weak prior.

    With powers p = (a, b, c, d, e) of worth, retrieval's odds, co-visits, clicks and subjects, s the logarithm of their product and n how
    many items of the catalogue each one stands for, it minimises

        -sum log(exp(s_target) / sum_C n_C exp(s_C)) + PRECISION / 2 * |p - (1, 1, 0, 0, 0)|^2

    over a >= LEAST_WORTH and the others >= 0, with a term for each clicked item, which is convex; the others over a give the same order
    with a worth of power 1. Of several decays, the one with the smallest minimum is taken.

    Args:
        signals: by the decay of their co-visits, of items for each user, all with or all without a ranker: candidates, clicked ones, and
            draws from the rest.
        clicked: which of each user's items were clicked next, [C].
        log_count: log n, [C]; 0 for an item that stands for itself, more for draws.
    """
    fits = ((*_fitted(each, clicked, log_count), decay) for decay, each in signals.items())
    _, (a, b, c, d, e), decay = min(fits, key=lambda fit: fit[0])
    return Order(b / a, c / a, d / a, e / a, decay)


def _fitted(
    signals: Sequence[Signals], clicked: Sequence[NDArray[np.bool_]], log_count: Sequence[NDArray[np.floating]]
) -> tuple[float, list[float]]:
    """The smallest loss, and the powers (a, b, c, d, e) that have it."""
    default = np.array([1.0, 1.0, 0.0, 0.0, 0.0])
    # Of all users end to end, R rows: those of user u from first_U[u] on.
    telling = [place for place, hit_C in enumerate(clicked) if hit_C.any()]
    size_U = np.array([len(clicked[place]) for place in telling], int)
    first_U = np.cumsum(size_U) - size_U
    term_R5 = np.concatenate([np.zeros((0, 5)), *(_terms(signals[place]) for place in telling)])
    hit_R, log_count_R = (np.concatenate([[], *(each[place] for place in telling)]) for each in (clicked, log_count))
    targets_U, taken_5 = np.add.reduceat(hit_R, first_U), hit_R @ term_R5

    def loss_and_gradient(power_5: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        counted_R = term_R5 @ power_5 + log_count_R
        largest_U = np.maximum.reduceat(counted_R, first_U)
        odds_R = np.exp(counted_R - np.repeat(largest_U, size_U))
        sum_U = np.add.reduceat(odds_R, first_U)
        loss = targets_U @ (np.log(sum_U) + largest_U) - taken_5 @ power_5
        gradient_5 = (odds_R * np.repeat(targets_U / sum_U, size_U)) @ term_R5 - taken_5
        apart_5 = power_5 - default
        return float(loss + PRECISION / 2 * apart_5 @ apart_5), gradient_5 + PRECISION * apart_5

    bounds = [(LEAST_WORTH, None), *[(0.0, None)] * 4]
    found = minimize(loss_and_gradient, default, jac=True, method="L-BFGS-B", bounds=bounds)
    return float(found.fun), found.x.tolist()


def _terms(signals: Signals) -> NDArray[np.float64]:
    """What the powers are multiplied with, [C, 5]: the logarithms of worth, retrieval's odds, co-visits, clicks and subjects."""
    retrieval_C, worth_C, co_visits_C, clicks_C, subjects_C = signals
    log_worth_C = np.zeros(len(retrieval_C)) if worth_C is None else np.log(worth_C)
    counts = np.log1p(co_visits_C / FLOOR), np.log1p(clicks_C), np.log(subjects_C)
    return np.stack([log_worth_C, retrieval_C - retrieval_C.max(), *counts], axis=1)
