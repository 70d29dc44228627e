"""The planted model played forward: what users are shown, and how probable each reaction is.

Recent interest a_u(k) in topic k decays by the factor 0.8 with every exposure; then a click on topic k adds 1 to it, and an
exposure of topic k without a click halves it. Let A = sum_k a_u(k).

Exposures. With probability 0.4 A / (1 + A) the topic comes from recent interest (topic k with probability a_u(k) / A);
otherwise with probability 0.35 there is none (the item is drawn from the whole catalogue); otherwise it comes from the
taste. Items are drawn by popularity, and drawn again if the user has seen them, but for the planted repeats; a topic whose
popular items a user has used up gives way to the whole catalogue.

Reactions, with z the item's topic, c the click and t / n how far the user is in his time line:

    logit P(click)      = intercept + b_u + b_i + 1.8 theta_u(t) . v_i + 1.6 a_u(z) / (1 + a_u(z)) + c_u s_i - waning (t / n)^10
    logit P(action | c) = intercept[action, c] + propensity_u[action] + slope[action] theta_u(t) . v_i

The intercepts are solved so that the rates meet their targets. A click changes recent interest, and with it what is shown
next and how it is received: a user's latest rows tell what neither the user's identity nor an item's popularity does.
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.data.twin_model import (
    TASTE_WEIGHTS,
    TOPICS,
    Catalogue,
    Floats,
    Ints,
    Population,
    draw_population,
    taste,
    topics_of_age,
)
from tenrec_jax.data.twin_recipes import Crowd, Recipe, Watching

MATCH, RECENT, WANING_POWER = 1.8, 1.6, 10
DRIFT, DECAY = 1 / 200, 0.8
RECENT_ARM, POPULAR_ARM = 0.4, 0.35
# How often an item that the user has seen is drawn again: from the topic, then by popularity from the whole catalogue, then evenly from it.
TOPIC_TRIES, POPULAR_TRIES, EVEN_TRIES = 2, 3, 2
ACTION_MATCH = np.array([0.8, 0.5, 0.7])  # of like, share, follow
PILOT_USERS, PILOT_ROWS, PILOT_QUANTILES = (64, 1_024), (200, 1_000), 1_000
SAME_AGAIN = 0.33  # share of the repeated reactions that are watched exactly as often as before


class Intercepts(NamedTuple):
    """Of the click logit, and of like, share, follow (rows) without and with a click (columns)."""

    click: float
    action_A2: Floats


class Exposures(NamedTuple):
    """R rows, one block a user in the order of the population, each block in the user's own time order."""

    user_R: Ints
    item_R: Ints
    logit_R: Floats
    match_R: Floats
    click_R: NDArray[np.bool_]


def simulate(
    catalogue: Catalogue, population: Population, recipe: Recipe, intercept: float, rng: np.random.Generator
) -> Exposures:
    """Plays all users forward together: step t is the exposure number t of every user who has that many."""
    rows = int(population.length_U.sum())
    first_row_U = np.cumsum(population.length_U) - population.length_U
    order = np.argsort(-population.length_U, kind="stable")
    users = Population._make(column[order] for column in population)
    first_row_U = first_row_U[order]
    steps = int(users.length_U[0])
    active_T = np.searchsorted(-users.length_U, -np.arange(steps))
    item_R, click_R = np.empty(rows, np.int64), np.empty(rows, np.bool_)
    logit_R, match_R = np.empty(rows), np.empty(rows)
    seen_TU = np.empty((steps, order.size), np.int32)
    recent_UK = np.zeros((order.size, TOPICS))
    topics_UJ = users.topics_UJ.copy()
    taste_UD = taste(catalogue, topics_UJ, users.offset_UD)
    sign_N = np.array([0.0, -1.0, 1.0])[catalogue.category_N]
    for t, n in enumerate(active_T):
        _drift(catalogue, users, topics_UJ, taste_UD, rng.random((3, n)))
        topic = _next_topic(recent_UK[:n], topics_UJ[:n], rng.random((3, n)))
        item = _next_item(catalogue, topic, seen_TU[:t, :n], recipe.repeats, rng)
        here = (np.arange(n), catalogue.topic_N[item])
        match = (taste_UD[:n] * catalogue.vector_ND[item]).sum(axis=1)
        logit = intercept + users.bias_U[:n] + catalogue.bias_N[item] + users.category_taste_U[:n] * sign_N[item]
        logit += MATCH * match + RECENT * recent_UK[here] / (1 + recent_UK[here])
        if recipe.waning:
            logit -= recipe.waning * (t / users.length_U[:n]) ** WANING_POWER
        click = rng.random(n) < _sigmoid(logit)
        recent_UK[:n] *= DECAY
        recent_UK[here] = np.where(click, recent_UK[here] + 1, recent_UK[here] / 2)
        seen_TU[t, :n] = item
        row = first_row_U[:n] + t
        item_R[row], click_R[row], logit_R[row], match_R[row] = item, click, logit, match
    user_R = np.repeat(np.arange(order.size), population.length_U)
    return Exposures(user_R, item_R, logit_R, match_R, click_R)


def solve_intercepts(
    catalogue: Catalogue, recipe: Recipe, crowd: Crowd, rows: int, rng: np.random.Generator
) -> Intercepts:
    """The intercepts that bring the rates of pilot simulations to the crowd's; `rows` are those of the log to be written.

    A pilot has at most 1,024 users, about as many as the log if that has fewer, and at most 1,000 rows a user.
    """
    rates, count = crowd.rates, round(np.clip(rows * crowd.share / crowd.mean_rows, *PILOT_USERS))
    users = draw_population(catalogue, crowd, count, rng)
    normal = np.array([NormalDist().inv_cdf((k + 0.5) / PILOT_QUANTILES) for k in range(PILOT_QUANTILES)])
    # The exposures depend on the clicks. From this beginning a short pilot and a long one are near enough.
    click = float(np.log(rates.click / (1 - rates.click))) - 1.3
    for most in PILOT_ROWS:
        played = users._replace(length_U=np.minimum(users.length_U, most))
        pilot = simulate(catalogue, played, recipe, click, np.random.default_rng(rng.integers(2**63)))
        click += _solve(rates.click, pilot.logit_R)
    action_A2 = np.empty((ACTION_MATCH.size, 2))
    for clicked, targets in enumerate((rates.without_click, rates.given_click)):
        match = rng.choice(pilot.match_R[pilot.click_R == bool(clicked)], size=(32, 1))
        for action, target in enumerate(targets):
            logit = crowd.propensity[action] * normal + ACTION_MATCH[action] * match
            action_A2[action, clicked] = _solve(target, logit)
    return Intercepts(click, action_A2)


def react(
    exposures: Exposures, population: Population, intercepts: Intercepts, rng: np.random.Generator
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Labels of click, like, share, follow and their true probabilities before the exposure, both [R, 4]."""
    click_R = _sigmoid(exposures.logit_R)
    labels_RA = np.empty((click_R.size, 1 + ACTION_MATCH.size), np.int8)
    truth_RA = np.empty(labels_RA.shape, np.float32)
    labels_RA[:, 0], truth_RA[:, 0] = exposures.click_R, click_R
    for action, (without_click, given_click) in enumerate(intercepts.action_A2):
        logit = population.propensity_UA[exposures.user_R, action] + ACTION_MATCH[action] * exposures.match_R
        without, given = _sigmoid(logit + without_click), _sigmoid(logit + given_click)
        labels_RA[:, 1 + action] = rng.random(logit.size) < np.where(exposures.click_R, given, without)
        truth_RA[:, 1 + action] = click_R * given + (1 - click_R) * without
    return labels_RA, truth_RA


def watching_times(law: Watching, pair_R: Ints, labels_RA: NDArray[np.int8], rng: np.random.Generator) -> Ints:
    """How often each video was watched. It follows from the labels, so it must never be an input.

    Mostly the count belongs to the pair of user and item (`pair_R`) and what came of it: a repeated exposure with the same
    labels is then an exact duplicate, as half of Tenrec's repeats are.
    """
    clicked, liked = labels_RA[:, 0] == 1, labels_RA[:, 1] == 1
    uniform_R = rng.random(pair_R.size)
    glance = np.searchsorted(law.glance, uniform_R, side="right")
    stay = 1 + np.searchsorted(law.stay, uniform_R, side="right")
    beyond = np.flatnonzero(stay == 1 + len(law.stay))
    stay[beyond] += rng.geometric(1 / np.where(liked[beyond], law.liked_mean, law.stay_mean)) - 1
    times = np.where(clicked | liked, stay, glance)
    outcome_R = labels_RA @ (2 ** np.arange(labels_RA.shape[1]))
    _, first, same = np.unique(pair_R * 2 ** labels_RA.shape[1] + outcome_R, return_index=True, return_inverse=True)
    return np.where(rng.random(pair_R.size) < SAME_AGAIN, times[first][same], times)


def _next_topic(recent_UK: Floats, topics_UJ: Ints, draws_3U: Floats) -> Ints:
    """The topic of each user's next exposure, or -1 for the whole catalogue."""
    total = recent_UK.sum(axis=1)
    slot = np.searchsorted(np.cumsum(TASTE_WEIGHTS)[:-1], draws_3U[0], side="right")
    topic = np.where(draws_3U[1] < POPULAR_ARM, -1, topics_UJ[np.arange(total.size), slot])
    by_recent = np.flatnonzero(draws_3U[2] < RECENT_ARM * total / (1 + total))
    ladder = np.cumsum(recent_UK[by_recent], axis=1)
    topic[by_recent] = (ladder / ladder[:, -1:] <= draws_3U[0, by_recent, None]).sum(axis=1)
    return topic


def _next_item(
    catalogue: Catalogue, topic: Ints, seen_TU: NDArray[np.int32], repeats: float, rng: np.random.Generator
) -> Ints:
    """An item of each user's topic that the user has not seen, or of any topic where that keeps failing."""
    steps, count = seen_TU.shape
    item = _draw_items(catalogue, topic, rng.random((count,)))
    pending = np.flatnonzero((seen_TU == item.astype(np.int32)).any(axis=0))
    if pending.size:
        item[pending] = _other_item(catalogue, topic[pending], seen_TU[:, pending], rng)
    if steps:
        again = np.flatnonzero(rng.random(count) < repeats)
        item[again] = seen_TU[rng.integers(steps, size=again.size), again]
    return item


def _other_item(catalogue: Catalogue, topic: Ints, seen_TU: NDArray[np.int32], rng: np.random.Generator) -> Ints:
    """The first of a few more draws that the user has not seen; the last one if he has seen them all."""
    size = catalogue.topic_N.size
    uniform = rng.random((TOPIC_TRIES + POPULAR_TRIES + EVEN_TRIES, topic.size))
    by_popularity, evenly = np.split(uniform, [TOPIC_TRIES + POPULAR_TRIES])
    chosen = np.where(np.arange(len(by_popularity))[:, None] < TOPIC_TRIES, topic, -1)
    item_KU = np.concatenate([_draw_items(catalogue, chosen, by_popularity), (evenly * size).astype(np.int64)])
    unseen_KU = ~(seen_TU == item_KU.astype(np.int32)[:, None]).any(axis=1)
    unseen_KU[-1] = True
    return item_KU[unseen_KU.argmax(axis=0), np.arange(topic.size)]


def _draw_items(catalogue: Catalogue, topic: Ints, uniform: Floats) -> Ints:
    """An item by popularity from each topic, from the whole catalogue where it is -1."""
    everywhere = topic < 0
    first = np.where(everywhere, 0, catalogue.first_K[topic])
    end = np.where(everywhere, catalogue.topic_N.size, catalogue.first_K[topic + 1])
    low, high = catalogue.edge_N[first], catalogue.edge_N[end]
    item = np.searchsorted(catalogue.edge_N, low + uniform * (high - low), side="right") - 1
    return np.minimum(item, end - 1)  # the sum can be rounded up to the upper edge


def _drift(catalogue: Catalogue, users: Population, topics_UJ: Ints, taste_UD: Floats, draws_3U: Floats) -> None:
    """Replaces, in place, one topic of the few users whose taste moves at this step."""
    moved = np.flatnonzero(draws_3U[0] < DRIFT)
    slot = (draws_3U[1, moved] * TASTE_WEIGHTS.size).astype(np.int64)
    topics_UJ[moved, slot] = topics_of_age(catalogue, users.age_U[moved], draws_3U[2, moved])
    taste_UD[moved] = taste(catalogue, topics_UJ[moved], users.offset_UD[moved])


def _solve(rate: float, logit: Floats) -> float:
    """The b for which the mean of sigmoid(logit + b) is `rate`, by bisection."""
    low, high = -25.0, 25.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(logit + middle).mean() < rate else (low, middle)
    return (low + high) / 2


def _sigmoid(logit: Floats) -> Floats:
    return 1 / (1 + np.exp(-logit))
