"""The ids of a batch, each once per id space: the rows of the tables that its step reads and updates."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tenrec_jax.models.features import Vocabulary
from tenrec_jax.models.hashing import HashedIds
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
# Tables that may be hashed: their rows are then a space of their own, and the model holds the rows of each id under another name.
HASHED = {ITEM: ("items.id.embedding", "items.id.rows"), USER: ("users.id.embedding", "users.id.rows")}


class LocatedBatch(NamedTuple):
    """A batch whose ids are places among its unique ids. Place 0 is id 0 in every space.

    Attributes:
        ids: unique ids of each space, int32 [P], as `tables.unique_ids` pads them.
        timeline: of the whole batch. item, category: of the drawn negatives, [N].
        rows: by the name that the model has for it, the rows [P, k] of the unique ids of a hashed space, as places among the unique rows.
    """

    ids: dict[str, np.ndarray]
    timeline: Timeline
    item: np.ndarray
    category: np.ndarray
    rows: dict[str, np.ndarray]


def space_of_rows(space: str) -> str:
    """The rows of a hashed space's table, as a space of their own."""
    return f"{space}_rows"


def table_spaces(tables: Mapping[str, str], hashed: Mapping[str, HashedIds]) -> dict[str, str]:
    """The spaces of tables, some of them hashed, by parameter name."""
    return {**tables, **{HASHED[space][0]: space_of_rows(space) for space in hashed}}


def located(
    timeline: Timeline,
    item_N: np.ndarray,
    category_N: np.ndarray,
    vocabulary: Vocabulary,
    hashed: Mapping[str, HashedIds],
) -> LocatedBatch:
    """Replace ids by places. The number of unique ids is padded to the most that such a batch can hold: one shape for all batches.

    Args:
        timeline: of the batch. item_N, category_N: of the drawn negatives.
        vocabulary: table sizes. hashed: where the ids of a space lie, for those whose table is hashed.

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
    for space, (size, arrays) in spaces.items():
        most = min(size, 1 + sum(array.size for array in arrays))
        unique[space] = unique_ids(arrays, size, multiple_of=most)
    (item, item_N), (category, category_N), (user,) = (unique[space].places for space in spaces)
    timeline = timeline._replace(
        profile=profile._replace(user=user), events=events._replace(item=item, category=category)
    )
    all_ids = {space: found.ids_P for space, found in unique.items()}
    rows = dict[str, np.ndarray]()
    for space, ids in hashed.items():
        ids_P = all_ids[space]
        # Padding stands for no id; what is read for it is never used.
        rows_Pk = ids.rows_Nk[np.where(ids_P < len(ids.rows_Nk), ids_P, 0)]
        most = min(ids.config.table_rows, 1 + rows_Pk.size)
        found = unique_ids([rows_Pk], ids.config.table_rows, multiple_of=most)
        all_ids[space_of_rows(space)], rows[HASHED[space][1]] = found.ids_P, found.places[0]
    return LocatedBatch(all_ids, timeline, item_N, category_N, rows)
