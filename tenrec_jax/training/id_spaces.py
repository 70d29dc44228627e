"""The ids of a batch, each once per id space: the rows of the tables that its step reads and updates."""

from typing import NamedTuple

import numpy as np

from tenrec_jax.models.features import Vocabulary
from tenrec_jax.timeline import Timeline
from tenrec_jax.training.tables import unique_ids

ITEM, USER, CATEGORY = "item", "user", "category"
# The tables, by parameter name, and what numbers their rows. Genders, ages and positions are few: they stay with the dense weights.
TABLES = {
    "items.id.embedding": ITEM,
    "items.category.embedding": CATEGORY,
    "item_bias.embedding": ITEM,
    "users.id.embedding": USER,
    "user_bias.embedding": USER,
}


class LocatedBatch(NamedTuple):
    """A batch whose ids are places among its unique ids. Place 0 is id 0 in every space.

    Attributes:
        ids: unique ids of each space, int32 [P], as `tables.unique_ids` pads them.
        timeline: of the whole batch. item, category: of the drawn negatives, [N].
    """

    ids: dict[str, np.ndarray]
    timeline: Timeline
    item: np.ndarray
    category: np.ndarray


def located(timeline: Timeline, item_N: np.ndarray, category_N: np.ndarray, vocabulary: Vocabulary) -> LocatedBatch:
    """Replace ids by places. The number of unique ids is padded to the most that such a batch can hold: one shape for all batches.

    Raises:
        ValueError: an id is no row of its table.
    """
    profile, events = timeline.profile, timeline.events
    spaces = {
        ITEM: (vocabulary.items, [events.item, item_N]),
        CATEGORY: (vocabulary.categories, [events.category, category_N]),
        USER: (vocabulary.users, [profile.user]),
    }
    unique = {}
    for space, (rows, ids) in spaces.items():
        most = min(rows, 1 + sum(array.size for array in ids))
        unique[space] = unique_ids(ids, rows, multiple_of=most)
    (item, item_N), (category, category_N), (user,) = (unique[space].places for space in spaces)
    timeline = timeline._replace(
        profile=profile._replace(user=user), events=events._replace(item=item, category=category)
    )
    return LocatedBatch({space: found.ids_P for space, found in unique.items()}, timeline, item_N, category_N)
