"""The planted model of the Tenrec twin: who is shown what, and how probable each reaction is.

Items. Item i has a topic z_i (one of 60), a unit vector v_i near its topic's centre, a popularity weight exp(3.4 g_i) with
g_i ~ N(0, 1) (log-normal: Zipf-like, concave in log-log), a bias b_i = 0.72 (0.3 g_i + 0.95 e_i) (click-bait, partly
popularity) and a binary category s_i = -1 or +1 (0 where missing).

Users. User u has n_u = 82 exp(0.915 e_u) exposures (log-normal: median 82, 90th percentile 265), a bias b_u of standard
deviation 0.88, a preference between the categories c_u of 0.35, correlated propensities to like, share and follow, and a
taste: three topics with weights w = .6, .25, .15 and a personal offset, theta_u(t) = sum_j w_j centre[topic_j(t)] + r_u.
The topics depend weakly on age, and one of them is replaced every 200 exposures on average (slow drift).

Recent interest a_u(k) in topic k decays by the factor 0.8 with every exposure; then a click on topic k adds 1 to it, and an
exposure of topic k without a click halves it. Let A = sum_k a_u(k).

Exposures. With probability 0.4 A / (1 + A) the topic comes from recent interest (topic k with probability a_u(k) / A);
otherwise with probability 0.2 there is none (the item is drawn from the whole catalogue); otherwise it comes from the
taste. Items are drawn by popularity, and drawn again if the user has seen them, but for 1.4 % of planted repeats.

Reactions, with z the item's topic and c the click:

    logit P(click)      = intercept + b_u + b_i + 1.8 theta_u(t) . v_i + 1.6 a_u(z) / (1 + a_u(z)) + c_u s_i
    logit P(action | c) = intercept[action, c] + propensity_u[action] + slope[action] theta_u(t) . v_i

The intercepts are solved so that the rates meet their targets. A click changes recent interest, and with it what is shown
next and how it is received: a user's latest rows tell what neither the user's identity nor an item's popularity does.

With few rows the catalogue is small and users soon have seen all that is popular, so the rows are spread more evenly over
the items than in the real files: the top 1 % of the items have 20 % of 300,000 rows, 40 % of 2,000,000.
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOPICS, WIDTH = 60, 16
POPULARITY_SPREAD, USER_BIAS, ITEM_BIAS, CLICK_BAIT = 3.4, 0.88, 0.72, 0.3
ITEM_OFFSET, USER_OFFSET, AGE_TILT = 0.7, 0.35, 0.3
MATCH, RECENT, CATEGORY_TASTE = 1.8, 1.6, 0.35
LENGTH_MEDIAN, LENGTH_SPREAD, LENGTH_CAP = 82.0, 0.915, 5_995
TASTE_WEIGHTS = np.array([0.6, 0.25, 0.15])
DRIFT, DECAY = 1 / 200, 0.8
RECENT_ARM, POPULAR_ARM, REPEATS, TRIES = 0.4, 0.2, 0.014, 6
# Like, share, follow: spread of the users' propensities, the part of its variance that they share, slope of the match.
PROPENSITY, SHARED_PROPENSITY, ACTION_MATCH = np.array([2.3, 1.6, 1.8]), 0.6, np.array([0.8, 0.5, 0.7])
# Shares of rows in ctr_data_1M by value: categories missing and 1, genders, ages.
CATEGORY_MISSING, CATEGORY_ONE = 0.0132, 0.457
GENDER = np.array([0.1880, 0.5801, 0.2319])
AGE = np.array([0.1861, 0.0198, 0.4915, 0.2124, 0.0660, 0.0179, 0.0055, 0.0008])


class Rates(NamedTuple):
    """Target rates: of clicks, and of like, share, follow on rows with and without a click."""

    click: float
    given_click: tuple[float, float, float]
    without_click: tuple[float, float, float]


class Intercepts(NamedTuple):
    """Of the click logit, and of like, share, follow (rows) without and with a click (columns)."""

    click: float
    action_A2: Floats


class Catalogue(NamedTuple):
    """Items in topic order: topic k owns items first_K[k]:first_K[k + 1].

    `edge_N` (N + 1 values from 0 to 1) holds the cumulative popularity, item i's share being edge_N[i + 1] - edge_N[i];
    `category_N` is 0 (missing), 1 or 2; `age_topics_GK` the cumulative probability of the topics by age.
    """

    topic_N: Ints
    vector_ND: NDArray[np.float32]
    bias_N: Floats
    category_N: NDArray[np.int8]
    edge_N: Floats
    first_K: Ints
    centre_KD: Floats
    age_topics_GK: Floats


class Population(NamedTuple):
    """What is fixed about each of U users; `topics_UJ` is the taste that they begin with."""

    length_U: Ints
    bias_U: Floats
    topics_UJ: Ints
    offset_UD: Floats
    category_taste_U: Floats
    propensity_UA: Floats
    gender_U: Ints
    age_U: Ints


class Exposures(NamedTuple):
    """R rows, one block a user in the order of the population, each block in the user's own time order."""

    user_R: Ints
    item_R: Ints
    logit_R: Floats
    match_R: Floats
    click_R: NDArray[np.bool_]


def draw_catalogue(size: int, rng: np.random.Generator) -> Catalogue:
    """Draws `size` items."""
    centre_KD = _unit(rng.normal(size=(TOPICS, WIDTH)))
    topic_N = np.sort(rng.choice(TOPICS, size=size, p=rng.dirichlet(np.full(TOPICS, 8.0))))
    offset_ND = rng.normal(size=(size, WIDTH)) * (ITEM_OFFSET / np.sqrt(WIDTH))
    popularity_N, other_N = rng.normal(size=(2, size))
    mass_N = np.cumsum(np.exp(POPULARITY_SPREAD * popularity_N))
    tilt = np.exp(AGE_TILT * rng.normal(size=(AGE.size, TOPICS)))
    age_topics_GK = np.cumsum(np.bincount(topic_N, minlength=TOPICS) * tilt, axis=1)
    return Catalogue(
        topic_N=topic_N,
        vector_ND=_unit(centre_KD[topic_N] + offset_ND).astype(np.float32),
        bias_N=ITEM_BIAS * (CLICK_BAIT * popularity_N + np.sqrt(1 - CLICK_BAIT**2) * other_N),
        category_N=_categories(popularity_N),
        edge_N=np.concatenate([[0.0], mass_N / mass_N[-1]]),
        first_K=np.searchsorted(topic_N, np.arange(TOPICS + 1)),
        centre_KD=centre_KD,
        age_topics_GK=age_topics_GK / age_topics_GK[:, -1:],
    )


def draw_population(catalogue: Catalogue, count: int, rng: np.random.Generator, *, extra_rows: int = 0) -> Population:
    """Draws `count` users, each with `extra_rows` exposures more than the log-normal law says."""
    length_U = np.rint(LENGTH_MEDIAN * np.exp(LENGTH_SPREAD * rng.normal(size=count))).astype(np.int64)
    age_U = rng.choice(AGE.size, size=count, p=AGE)
    shared, own = rng.normal(size=(count, 1)), rng.normal(size=(count, PROPENSITY.size))
    propensity_UA = np.sqrt(SHARED_PROPENSITY) * shared + np.sqrt(1 - SHARED_PROPENSITY) * own
    return Population(
        length_U=np.clip(length_U, 1, LENGTH_CAP) + extra_rows,
        bias_U=USER_BIAS * rng.normal(size=count),
        topics_UJ=_topics(catalogue, age_U[:, None], rng.random((count, TASTE_WEIGHTS.size))),
        offset_UD=rng.normal(size=(count, WIDTH)) * (USER_OFFSET / np.sqrt(WIDTH)),
        category_taste_U=CATEGORY_TASTE * rng.normal(size=count),
        propensity_UA=propensity_UA * PROPENSITY,
        gender_U=rng.choice(GENDER.size, size=count, p=GENDER),
        age_U=age_U,
    )


def simulate(catalogue: Catalogue, population: Population, intercept: float, rng: np.random.Generator) -> Exposures:
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
    taste_UD = _taste(catalogue, topics_UJ, users.offset_UD)
    sign_N = np.array([0.0, -1.0, 1.0])[catalogue.category_N]
    for t, n in enumerate(active_T):
        _drift(catalogue, users, topics_UJ, taste_UD, rng.random((3, n)))
        item = _next_item(
            catalogue, _next_topic(recent_UK[:n], topics_UJ[:n], rng.random((3, n))), seen_TU[:t, :n], rng
        )
        here = (np.arange(n), catalogue.topic_N[item])
        match = (taste_UD[:n] * catalogue.vector_ND[item]).sum(axis=1)
        logit = intercept + users.bias_U[:n] + catalogue.bias_N[item] + users.category_taste_U[:n] * sign_N[item]
        logit += MATCH * match + RECENT * recent_UK[here] / (1 + recent_UK[here])
        click = rng.random(n) < _sigmoid(logit)
        recent_UK[:n] *= DECAY
        recent_UK[here] = np.where(click, recent_UK[here] + 1, recent_UK[here] / 2)
        seen_TU[t, :n] = item
        row = first_row_U[:n] + t
        item_R[row], click_R[row], logit_R[row], match_R[row] = item, click, logit, match
    user_R = np.repeat(np.arange(order.size), population.length_U)
    return Exposures(user_R, item_R, logit_R, match_R, click_R)


def solve_intercepts(catalogue: Catalogue, rates: Rates, rng: np.random.Generator) -> Intercepts:
    """The intercepts that bring the rates of a pilot simulation (the first 250 exposures of 512 users) to `rates`."""
    users = draw_population(catalogue, 512, rng)
    normal = np.array([NormalDist().inv_cdf((k + 0.5) / 512) for k in range(512)])
    users = users._replace(length_U=np.minimum(users.length_U, 250), bias_U=USER_BIAS * rng.permutation(normal))
    # The exposures depend on the clicks. This beginning is near enough for two rounds.
    click = float(np.log(rates.click / (1 - rates.click))) - 1.3
    for _ in range(2):
        pilot = simulate(catalogue, users, click, np.random.default_rng(rng.integers(2**63)))
        click += _solve(rates.click, pilot.logit_R)
    action_A2 = np.empty((PROPENSITY.size, 2))
    for clicked, targets in enumerate((rates.without_click, rates.given_click)):
        match = rng.choice(pilot.match_R[pilot.click_R == bool(clicked)], size=(256, 1))
        for action, target in enumerate(targets):
            logit = PROPENSITY[action] * normal[::4] + ACTION_MATCH[action] * match
            action_A2[action, clicked] = _solve(target, logit)
    return Intercepts(click, action_A2)


def react(
    exposures: Exposures, population: Population, intercepts: Intercepts, rng: np.random.Generator
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Labels of click, like, share, follow and their true probabilities before the exposure, both [R, 4]."""
    click_R = _sigmoid(exposures.logit_R)
    labels_RA = np.empty((click_R.size, 1 + PROPENSITY.size), np.int8)
    truth_RA = np.empty(labels_RA.shape, np.float32)
    labels_RA[:, 0], truth_RA[:, 0] = exposures.click_R, click_R
    for action, (without_click, given_click) in enumerate(intercepts.action_A2):
        logit = population.propensity_UA[exposures.user_R, action] + ACTION_MATCH[action] * exposures.match_R
        without, given = _sigmoid(logit + without_click), _sigmoid(logit + given_click)
        labels_RA[:, 1 + action] = rng.random(logit.size) < np.where(exposures.click_R, given, without)
        truth_RA[:, 1 + action] = click_R * given + (1 - click_R) * without
    return labels_RA, truth_RA


def watching_times(pair_R: Ints, labels_RA: NDArray[np.int8], rng: np.random.Generator) -> Ints:
    """How often each video was watched: 0.9 times on average without a click, 2.4 with one, 2.5 with a like.

    It follows from the labels, so it must never be an input. The count belongs to the pair of user and item (`pair_R`) and
    what came of it: a repeated exposure with the same labels is an exact duplicate, as half of Tenrec's repeats are.
    """
    clicked, liked = labels_RA[:, 0] == 1, labels_RA[:, 1] == 1
    glance = np.searchsorted([0.20, 0.92, 0.98], rng.random(pair_R.size), side="right")
    stay = rng.geometric(np.where(liked, 1 / 2.5, 1 / 2.4))
    times = np.where(clicked | liked, stay, glance)
    outcome_R = labels_RA @ (2 ** np.arange(labels_RA.shape[1]))
    _, first, same = np.unique(pair_R * 2 ** labels_RA.shape[1] + outcome_R, return_index=True, return_inverse=True)
    return times[first][same]


def _next_topic(recent_UK: Floats, topics_UJ: Ints, draws_3U: Floats) -> Ints:
    """The topic of each user's next exposure, or -1 for the whole catalogue."""
    total = recent_UK.sum(axis=1)
    slot = np.searchsorted(np.cumsum(TASTE_WEIGHTS)[:-1], draws_3U[0], side="right")
    topic = np.where(draws_3U[1] < POPULAR_ARM, -1, topics_UJ[np.arange(total.size), slot])
    by_recent = np.flatnonzero(draws_3U[2] < RECENT_ARM * total / (1 + total))
    ladder = np.cumsum(recent_UK[by_recent], axis=1)
    topic[by_recent] = (ladder / ladder[:, -1:] <= draws_3U[0, by_recent, None]).sum(axis=1)
    return topic


def _next_item(catalogue: Catalogue, topic: Ints, seen_TU: NDArray[np.int32], rng: np.random.Generator) -> Ints:
    """An item of each user's topic that the user has not seen: by popularity at first, evenly where that keeps failing."""
    steps, count = seen_TU.shape
    item, pending = np.empty(count, np.int64), np.arange(count)
    for attempt in range(TRIES + 2):
        chosen = topic[pending] if attempt <= TRIES else np.full(pending.size, -1)
        item[pending] = _draw_items(catalogue, chosen, rng.random(pending.size), evenly=attempt >= TRIES)
        history = seen_TU if attempt == 0 else seen_TU[:, pending]
        pending = pending[(history == item[pending].astype(np.int32)).any(axis=0)]
        if pending.size == 0:
            break
    if steps:
        again = np.flatnonzero(rng.random(count) < REPEATS)
        item[again] = seen_TU[rng.integers(steps, size=again.size), again]
    return item


def _draw_items(catalogue: Catalogue, topic: Ints, uniform: Floats, *, evenly: bool) -> Ints:
    everywhere = topic < 0
    first = np.where(everywhere, 0, catalogue.first_K[topic])
    end = np.where(everywhere, catalogue.topic_N.size, catalogue.first_K[topic + 1])
    if evenly:
        return first + (uniform * (end - first)).astype(np.int64)
    low, high = catalogue.edge_N[first], catalogue.edge_N[end]
    item = np.searchsorted(catalogue.edge_N, low + uniform * (high - low), side="right") - 1
    return np.minimum(item, end - 1)  # the sum can be rounded up to the upper edge


def _drift(catalogue: Catalogue, users: Population, topics_UJ: Ints, taste_UD: Floats, draws_3U: Floats) -> None:
    """Replaces, in place, one topic of the few users whose taste moves at this step."""
    moved = np.flatnonzero(draws_3U[0] < DRIFT)
    slot = (draws_3U[1, moved] * TASTE_WEIGHTS.size).astype(np.int64)
    topics_UJ[moved, slot] = _topics(catalogue, users.age_U[moved], draws_3U[2, moved])
    taste_UD[moved] = _taste(catalogue, topics_UJ[moved], users.offset_UD[moved])


def _topics(catalogue: Catalogue, age: Ints, uniform: Floats) -> Ints:
    return (catalogue.age_topics_GK[age] <= uniform[..., None]).sum(axis=-1)


def _taste(catalogue: Catalogue, topics_UJ: Ints, offset_UD: Floats) -> Floats:
    return (catalogue.centre_KD[topics_UJ] * TASTE_WEIGHTS[:, None]).sum(axis=1) + offset_UD


def _categories(popularity_N: Floats) -> NDArray[np.int8]:
    """Categories spread evenly over the ranks of popularity, so that their shares of the rows come out right."""
    rank = np.arange(popularity_N.size + 1)
    missing, one = (np.diff(np.floor(rank * share + 0.5)) > 0 for share in (CATEGORY_MISSING, CATEGORY_ONE))
    category_N = np.empty(popularity_N.size, np.int8)
    category_N[np.argsort(-popularity_N)] = np.where(missing, 0, np.where(one, 2, 1))
    return category_N


def _solve(rate: float, logit: Floats) -> float:
    """The b for which the mean of sigmoid(logit + b) is `rate`, by bisection."""
    low, high = -25.0, 25.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(logit + middle).mean() < rate else (low, middle)
    return (low + high) / 2


def _sigmoid(logit: Floats) -> Floats:
    return 1 / (1 + np.exp(-logit))


def _unit(vectors: Floats) -> Floats:
    return vectors / np.sqrt((vectors**2).sum(axis=-1, keepdims=True))
