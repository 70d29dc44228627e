"""The users and items that a recommender knows: those of its folder, and items that were added since."""

from collections.abc import Sequence

import numpy as np

from tenrec_jax.artifact import Catalogue
from tenrec_jax.data.interactions import RawId, RawIdIndex
from tenrec_jax.requests import Item, RequestError


class KnownIds:
    """Dense ids of raw ids, and what is known of the items by dense id. Raw ids are checked for their type.

    Attributes:
        item_id: raw ids, [N + 1 + added]. category_N, trained_item_N: likewise; an added item is not in any training row.
        trained_user: by dense user, the id or 0.
        users_are_text, items_are_text: whether raw ids are text rather than integers.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.item_id, self.category_N = catalogue.item_id, catalogue.category
        self.trained_item_N, self.trained_user = catalogue.trained_item, catalogue.trained_user
        self.users_are_text, self.items_are_text = (ids.dtype == object for ids in (catalogue.user_id, self.item_id))
        self._users, self._items = RawIdIndex(catalogue.user_id), RawIdIndex(catalogue.item_id)
        self._added: dict[RawId, int] = {}

    def user(self, raw: object) -> int:
        """The dense id of a user, 0 where the log has no such one.

        Raises:
            RequestError: an id of another type than the log's.
        """
        return int(self._users.dense(checked_id(raw, "user_id", is_text=self.users_are_text)))

    def items(self, raw: Sequence[object], name: str) -> np.ndarray:
        """Dense ids of items, int32, 0 where the catalogue holds no such one; `name` is what messages call them.

        Raises:
            RequestError: an id of another type than the log's.
        """
        ids = [checked_id(each, f"{name}[{i}]", is_text=self.items_are_text) for i, each in enumerate(raw)]
        dense = self._items.dense(np.asarray(ids, object))
        if self._added:
            dense = np.array([self._added.get(each, number) for each, number in zip(ids, dense.tolist(), strict=True)])
        return dense.astype(np.int32)

    def upsert(self, items: Sequence[Item], dense: np.ndarray) -> np.ndarray:
        """Set the categories of items, of which `dense` are the ids or 0: those are added. Returns all dense ids."""
        new = [item for item, number in zip(items, dense, strict=True) if number == 0]
        numbers = np.arange(len(self.item_id), len(self.item_id) + len(new), dtype=np.int32)
        self._added |= {item.item_id: int(number) for item, number in zip(new, numbers, strict=True)}
        dense = dense.copy()
        dense[dense == 0] = numbers
        raw = np.empty(len(new), self.item_id.dtype)
        raw[:] = [item.item_id for item in new]
        self.item_id = np.concatenate([self.item_id, raw])
        self.trained_item_N = np.concatenate([self.trained_item_N, np.zeros(len(new), np.int32)])
        self.category_N = np.concatenate([self.category_N, np.zeros(len(new), np.int32)])
        self.category_N[dense] = [item.category for item in items]
        return dense


def checked_id(value: object, name: str, *, is_text: bool) -> RawId:
    """A raw id of the log's type.

    Raises:
        RequestError: it is of another one.
    """
    if is_text:
        if not isinstance(value, str):
            raise RequestError(name, f"is {value!r}; the ids of this log are text.")
        return value
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise RequestError(name, f"is {value!r}; ids are integers.")
    return int(value)
