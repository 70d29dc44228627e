"""The planted model of the Tenrec twin: its items and its users. `twin_play` plays the users forward.

Items. Item i has a topic z_i (one of 30), a unit vector v_i near its topic's centre, a popularity weight (its law is in
`twin_recipes`; g_i is its normal quantile), a bias b_i = s_item (0.3 g_i + 0.95 e_i) (click-bait, partly popularity) and a
binary category s_i = -1 or +1 (0 where missing).

Users. User u has n_u exposures and a bias b_u (laws of the crowd, in `twin_recipes`), a preference between the categories
c_u of 0.35, correlated propensities to like, share and follow, and a taste: three topics with weights w = .6, .25, .15 and
a personal offset, theta_u(t) = sum_j w_j centre[topic_j(t)] + r_u. The topics depend weakly on age, and one of them is
replaced every 200 exposures on average (slow drift).
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.data.twin_recipes import Crowd, Popularity

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOPICS, WIDTH = 30, 16
CLICK_BAIT, ITEM_OFFSET, USER_OFFSET, AGE_TILT = 0.3, 0.7, 0.35, 0.3
CATEGORY_TASTE = 0.35
TASTE_WEIGHTS = np.array([0.6, 0.25, 0.15])
# The part of the variance of the propensities that like, share and follow have in common.
SHARED_PROPENSITY = 0.6
# Shares of rows in ctr_data_1M by value: categories missing and 1, genders, ages.
CATEGORY_MISSING, CATEGORY_ONE = 0.0132, 0.457
GENDER = np.array([0.1880, 0.5801, 0.2319])
AGE = np.array([0.1861, 0.0198, 0.4915, 0.2124, 0.0660, 0.0179, 0.0055, 0.0008])
STRATA = 32
_QUANTILE_STEPS = 1_000


class Catalogue(NamedTuple):
    """Items in topic order: topic k owns items first_K[k]:first_K[k + 1].

    `edge_N` (N + 1 values from 0 to 1) holds the cumulative popularity, item i's share being edge_N[i + 1] - edge_N[i];
    `category_N` is 0 (missing), 1 or 2; `age_topics_GK` the cumulative probability of the topics by age.
    """

    topic_N: NDArray[np.int8]
    vector_ND: NDArray[np.float32]
    bias_N: NDArray[np.float32]
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


def draw_catalogue(law: Popularity, rows: int, item_bias: float, rng: np.random.Generator) -> Catalogue:
    """Draws the items of a log of so many exposures."""
    quantile_N, weight_N = draw_popularity(law, rows, rng)
    size = quantile_N.size
    centre_KD = unit(rng.normal(size=(TOPICS, WIDTH)))
    topic_N = rng.choice(TOPICS, size=size, p=rng.dirichlet(np.full(TOPICS, 8.0))).astype(np.int8)
    topic_N.sort()
    vector_ND = rng.standard_normal((size, WIDTH), np.float32)
    vector_ND *= np.float32(ITEM_OFFSET / np.sqrt(WIDTH))
    vector_ND += centre_KD.astype(np.float32)[topic_N]
    vector_ND /= np.sqrt(np.einsum("nd,nd->n", vector_ND, vector_ND))[:, None]
    other_N = rng.normal(size=size)
    mass_N = np.cumsum(weight_N)
    tilt = np.exp(AGE_TILT * rng.normal(size=(AGE.size, TOPICS)))
    age_topics_GK = np.cumsum(np.bincount(topic_N, minlength=TOPICS) * tilt, axis=1)
    return Catalogue(
        topic_N=topic_N,
        vector_ND=vector_ND,
        bias_N=(item_bias * (CLICK_BAIT * quantile_N + np.sqrt(1 - CLICK_BAIT**2) * other_N)).astype(np.float32),
        category_N=_categories(weight_N),
        edge_N=np.concatenate([[0.0], mass_N / mass_N[-1]]),
        first_K=np.searchsorted(topic_N, np.arange(TOPICS + 1)),
        centre_KD=centre_KD,
        age_topics_GK=age_topics_GK / age_topics_GK[:, -1:],
    )


def draw_popularity(law: Popularity, rows: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Normal quantiles and weights of the items of a log of so many rows, both [N], in random order.

    Places in the order of popularity are spread evenly, so that all seeds have nearly the same concentration.

    Items expected on fewer than `law.rarest` rows stand for several each, so that N grows with what is seen of the
    catalogue and not with the catalogue.
    """
    items = law.items * rows if law.miniature else law.items
    depth = np.linspace(0, np.log(max(items, 2)), _QUANTILE_STEPS)
    quantile = upper_normal(depth)
    weight = _weight(law, quantile)
    # Items at depth s to s + ds: items exp(-s) ds.
    density = items * np.exp(-depth)
    above = np.concatenate([[0.0], np.cumsum(np.diff(depth) * (density * weight)[1:][::-1])])[::-1]
    rare = weight / above[0] * rows < law.rarest
    first = int(rare.sum())
    drawn = max(round(items * np.exp(-depth[first])), 1)
    quantile_N = upper_normal(depth[first] - np.log(_spread(drawn, rng)))
    if first:
        stand_ins = round((above[0] - above[first]) / weight[first])
        quantile_N = rng.permutation(np.concatenate([quantile_N, np.full(stand_ins, quantile[first])]))
    return quantile_N, _weight(law, quantile_N)


def upper_normal(depth: Floats) -> Floats:
    """z with P(normal > z) = exp(-depth), interpolated between exact values; depth is clipped to 0.0005..40."""
    grid = np.geomspace(0.0005, 40, _QUANTILE_STEPS)
    return np.interp(depth, grid, [-NormalDist().inv_cdf(float(p)) for p in np.exp(-grid)])


def draw_population(
    catalogue: Catalogue, crowd: Crowd, count: int, rng: np.random.Generator, *, extra_rows: int = 0
) -> Population:
    """Draws `count` users of a crowd, each with `extra_rows` exposures more than its law says."""
    normal_U = upper_normal(-np.log(_spread(count, rng)))
    bend_U = crowd.length_bend * np.maximum(normal_U, 0) ** 2
    length_U = np.rint(crowd.length_median * np.exp(crowd.length_spread * normal_U - bend_U))
    length_U = np.clip(length_U, 1, crowd.length_cap).astype(np.int64) + extra_rows
    age_U = rng.choice(AGE.size, size=count, p=AGE)
    propensity_A = np.array(crowd.propensity)
    normals_UK = np.stack([_spread_normal(length_U, rng) for _ in range(2 + propensity_A.size)], axis=1)
    propensity_UA = np.sqrt(SHARED_PROPENSITY) * normals_UK[:, 1:2] + np.sqrt(1 - SHARED_PROPENSITY) * normals_UK[:, 2:]
    return Population(
        length_U=length_U,
        bias_U=np.maximum(crowd.user_bias * normals_UK[:, 0], _least_bias(crowd, length_U)),
        topics_UJ=topics_of_age(catalogue, age_U[:, None], rng.random((count, TASTE_WEIGHTS.size))),
        offset_UD=rng.normal(size=(count, WIDTH)) * (USER_OFFSET / np.sqrt(WIDTH)),
        category_taste_U=CATEGORY_TASTE * rng.normal(size=count),
        propensity_UA=propensity_UA * propensity_A,
        gender_U=rng.choice(GENDER.size, size=count, p=GENDER),
        age_U=age_U,
    )


def _spread_normal(length_U: Ints, rng: np.random.Generator) -> Floats:
    """Standard normals that are spread evenly over users of like length, so that rates over rows vary little."""
    order = np.argsort(length_U + rng.random(length_U.size))
    place_U = np.empty(length_U.size)
    for start in range(0, length_U.size, STRATA):
        block = order[start : start + STRATA]
        place_U[block] = _spread(block.size, rng)
    return upper_normal(-np.log(place_U))


def _spread(count: int, rng: np.random.Generator) -> Floats:
    """Uniform numbers in (0, 1], one in each of `count` equal intervals, in random order."""
    return (rng.permutation(count) + 1 - rng.random(count)) / count


def _least_bias(crowd: Crowd, length_U: Ints) -> Floats:
    """The bias with which about `least_clicks` clicks are expected: who clicks less often is not in the file."""
    share_U = np.minimum(crowd.least_clicks / length_U, 0.9)
    with np.errstate(divide="ignore"):
        return np.log(share_U / (1 - share_U)) - np.log(crowd.rates.click / (1 - crowd.rates.click))


def topics_of_age(catalogue: Catalogue, age: Ints, uniform: Floats) -> Ints:
    """Topics drawn for people of these ages."""
    return (catalogue.age_topics_GK[age] <= uniform[..., None]).sum(axis=-1)


def taste(catalogue: Catalogue, topics_UJ: Ints, offset_UD: Floats) -> Floats:
    """The vectors theta_u, [U, D]."""
    return (catalogue.centre_KD[topics_UJ] * TASTE_WEIGHTS[:, None]).sum(axis=1) + offset_UD


def unit(vectors: Floats) -> Floats:
    """The vectors at length 1."""
    return vectors / np.sqrt((vectors**2).sum(axis=-1, keepdims=True))


def _weight(law: Popularity, quantile: Floats) -> Floats:
    """Weights; from the law's maximum on, where its parabola would fall again, they stay."""
    top = np.minimum(np.maximum(quantile, 0), law.slope / (2 * law.bend))
    return np.exp(law.slope * np.minimum(quantile, law.slope / (2 * law.bend)) - law.bend * top**2)


def _categories(weight_N: Floats) -> NDArray[np.int8]:
    """Categories spread evenly over the ranks of popularity, so that their shares of the rows come out right."""
    rank = np.arange(weight_N.size + 1)
    missing, one = (np.diff(np.floor(rank * share + 0.5)) > 0 for share in (CATEGORY_MISSING, CATEGORY_ONE))
    category_N = np.empty(weight_N.size, np.int8)
    category_N[np.argsort(-weight_N)] = np.where(missing, 0, np.where(one, 2, 1))
    return category_N
