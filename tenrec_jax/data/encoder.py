"""From raw ids to dense ones, and what the rows say of each user and item."""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pyarrow as pa

from tenrec_jax.data.arrow import as_arrow, as_numpy
from tenrec_jax.data.dictionaries import Feature, make_ids
from tenrec_jax.data.interactions import Items, Users
from tenrec_jax.data.schema import CONFLICTS, ITEM, USER, Kind, Role

_FEATURES_OF = {USER: Role.USER_FEATURE, ITEM: Role.ITEM_FEATURE}
_CONFLICT_OF = dict(zip((USER, ITEM), CONFLICTS, strict=True))


class Encoder:
    """Gives rows their dense ids and collects the dictionaries and features of users and items.

    Attributes:
        kind: the rows' columns.
    """

    def __init__(self, kind: Kind) -> None:
        (user,), (item,) = kind.with_role(Role.USER), kind.with_role(Role.ITEM)
        self.kind, self._columns = kind, {USER: user, ITEM: item}
        self._ids = {name: make_ids(pa.type_for_alias(column.dtype)) for name, column in self._columns.items()}
        self._features = {
            key: {c.feature: (c, Feature(c)) for c in kind.with_role(role) if c.feature}
            for key, role in _FEATURES_OF.items()
        }

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of users and items so far."""
        return self._ids[USER].count, self._ids[ITEM].count

    def __call__(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Rows of the kind's columns to rows with `user`, `item` (dense, int32), the others as they are, and `CONFLICTS`."""
        learned = self.learn(rows)
        ids = [column.name for column in self._columns.values()]
        others = {column.name: rows[column.name] for column in self.kind.columns if column.name not in ids}
        if not self.kind.with_role(Role.ACTION):
            (click,) = self.kind.labels
            others[click] = as_arrow(np.ones(rows.num_rows, np.int8))
        dense = {name: learned.pop(name) for name in (USER, ITEM)}
        return pa.RecordBatch.from_pydict(dense | others | learned)

    def learn(self, rows: pa.RecordBatch) -> dict[str, pa.Array]:
        """Number new users and items on and take note of features; rows may lack the kind's other columns.

        Returns:
            The columns `user`, `item` and `CONFLICTS` of the rows.
        """
        dense = {name: ids.encode(rows[self._columns[name].name]) for name, ids in self._ids.items()}
        learned = {name: as_arrow(values) for name, values in dense.items()}
        for key, found in self._features.items():
            contradicts_R = np.zeros(rows.num_rows, bool)
            for column, feature in found.values():
                contradicts_R |= feature.update(dense[key], rows[column.name], self._ids[key].count)
            learned[_CONFLICT_OF[key]] = as_arrow(contradicts_R)
        return learned

    def users(self) -> Users:
        """The users so far."""
        return Users(*self._dictionary(USER, Users))

    def items(self) -> Items:
        """The items so far."""
        return Items(*self._dictionary(ITEM, Items))

    def categories(self) -> tuple[str, ...]:
        """Names of the categories 1, 2, ... where they are text."""
        _, feature = self._features[ITEM].get("category", (None, None))
        return feature.names if feature else ()

    def _dictionary(self, key: str, record: type) -> list[np.ndarray]:
        """The fields of `Users` or `Items`; a feature that no column fills is missing throughout."""
        ids, found = self._ids[key], self._features[key]
        columns = [_with_nobody(ids.raw())]
        for field in fields(record)[1:]:
            code = found[field.name][1].codes(ids.count) if field.name in found else np.zeros(ids.count, np.int32)
            columns.append(np.concatenate([[np.int32(0)], code]))
        return columns


def _with_nobody(raw: pa.Array) -> np.ndarray:
    """Raw ids with the entry of nobody in front."""
    if pa.types.is_string(raw.type):
        return np.asarray(["", *raw.to_pylist()], object)
    return np.concatenate([[np.int64(-1)], as_numpy(raw)])


def telling_rows(rows: pa.RecordBatch, kind: Kind) -> pa.RecordBatch:
    """The rows of a block that tell an `Encoder` something, with the columns that it learns from.

    These are the first of each user and of each item with each combination of their features: an encoder that has learned from them
    is the one that has learned from the whole block.
    """
    first = [
        _firsts(rows, [column.name for column in kind.columns if column.role in (role, feature)])
        for role, feature in ((Role.USER, Role.USER_FEATURE), (Role.ITEM, Role.ITEM_FEATURE))
    ]
    known = (Role.USER, Role.ITEM, Role.USER_FEATURE, Role.ITEM_FEATURE)
    told = rows.select([column.name for column in kind.columns if column.role in known])
    return told.take(as_arrow(np.union1d(*first)))


def _firsts(rows: pa.RecordBatch, names: Sequence[str]) -> np.ndarray:
    """Places of the rows whose values in some columns no row before them has."""
    keys = pa.Table.from_batches([rows.select(names)])
    # The columns are numbered: a column of the log may have any name.
    numbered = keys.rename_columns([str(place) for place in range(len(names))])
    placed = numbered.append_column("place", as_arrow(np.arange(rows.num_rows)))
    return as_numpy(
        placed.group_by(numbered.column_names, use_threads=False).aggregate([("place", "min")])["place_min"]
    )
