"""From what the recommender computes with, dense ids and arrays, to what it answers: raw ids, names and plain numbers."""

from collections.abc import Sequence

import numpy as np

from tenrec_jax.known_ids import KnownIds
from tenrec_jax.requests import KnownEvent, RecommendedItem, Retrieved
from tenrec_jax.retrieval.hits import AllowedHits
from tenrec_jax.rules import Candidates
from tenrec_jax.user_states import UserEvents

EXPLAINED_EVENTS = 50


def told_items(known: KnownIds, actions: Sequence[str], candidates: Candidates, k: int) -> tuple[RecommendedItem, ...]:
    """The first k candidates; `actions` are named where a ranker has given their probabilities."""
    first = candidates.at(np.arange(min(k, len(candidates.item_C))))
    columns = (
        known.item_id[first.item_C],
        first.category_C,
        first.score_C,
        first.retrieval_C,
        first.probability_CA,
        first.explored_C,
    )
    names = actions if first.probability_CA.shape[1] else ()
    return tuple(
        RecommendedItem(raw, category, score, retrieval, dict(zip(names, probability, strict=True)), by_chance)
        for raw, category, score, retrieval, probability, by_chance in zip(
            *(column.tolist() for column in columns), strict=True
        )
    )


def told_events(known: KnownIds, actions: Sequence[str], events: UserEvents) -> tuple[KnownEvent, ...]:
    """The latest events, oldest first."""
    latest = events.part(slice(max(0, len(events.item) - EXPLAINED_EVENTS), None))
    raw = [
        unknown if number == 0 else listed
        for number, listed, unknown in zip(
            latest.item.tolist(), known.item_id[latest.item].tolist(), latest.unknown, strict=True
        )
    ]
    done = [tuple(name for name, one in zip(actions, row, strict=True) if one) for row in latest.action]
    categories = known.category_N[latest.item].tolist()
    return tuple(KnownEvent(*each) for each in zip(raw, categories, done, strict=True))


def told_hits(known: KnownIds, hits: AllowedHits, k: int) -> tuple[Retrieved, ...]:
    """The first k that retrieval found."""
    item_K, score_K = hits.items_C[:k], hits.scores_C[:k].tolist()
    ids, categories = known.item_id[item_K].tolist(), known.category_N[item_K].tolist()
    return tuple(Retrieved(*each) for each in zip(ids, categories, score_K, strict=True))
