"""The table opened: columns in memory, one contiguous block of rows a user, and the dictionaries of raw ids."""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tenrec_jax.data.manifest import check_files, read_manifest
from tenrec_jax.data.schema import ITEM, USER

EVENTS_FILE, USERS_FILE, ITEMS_FILE = "events.parquet", "users.parquet", "items.parquet"


@dataclass(frozen=True, eq=False)
class Users:
    """Arrays by dense user id, 1..U; entry 0 is nobody.

    Attributes:
        raw_id: int64 [U + 1], -1 first.
        gender, age: int32 [U + 1], 0 where missing.
    """

    raw_id: np.ndarray
    gender: np.ndarray
    age: np.ndarray


@dataclass(frozen=True, eq=False)
class Items:
    """Arrays by dense item id, 1..N; entry 0 is no item.

    Attributes:
        raw_id: int64 [N + 1], -1 first.
        category: int32 [N + 1]; k for the k-th category, 0 where missing.
    """

    raw_id: np.ndarray
    category: np.ndarray


@dataclass(frozen=True, eq=False)
class Interactions:
    """A log. Rows stand in one block per user, users in dense order, each block in the user's own time order.

    Attributes:
        kind: format of the source, as in `--kind`.
        actions: the labelled actions, in the order of `schema.ACTIONS`.
        has_exposures: whether rows with click = 0 are logged (true negatives).
        user_R, item_R: dense ids, int32 [R], in order of first appearance in the source.
        labels_RA: 0 or 1, int8 [R, A].
        offsets: int64 [U + 2]; rows of dense user u are offsets[u]:offsets[u + 1].
        users, items: raw ids and features.
        sha256: hash of the content, whatever the encoding of the files.
    """

    kind: str
    actions: tuple[str, ...]
    has_exposures: bool
    user_R: np.ndarray
    item_R: np.ndarray
    labels_RA: np.ndarray
    offsets: np.ndarray
    users: Users
    items: Items
    sha256: str

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.users.raw_id) - 1

    @property
    def num_items(self) -> int:
        """N, the size of the catalogue."""
        return len(self.items.raw_id) - 1

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.user_R)

    def rows_of(self, user: int) -> slice:
        """Rows of a dense user, 0..U; user 0 has none.

        Raises:
            IndexError: there is no such user.
        """
        if not 0 <= user <= self.num_users:
            raise IndexError(f"dense user {user} is not in 0..{self.num_users}")
        return slice(int(self.offsets[user]), int(self.offsets[user + 1]))

    def dense_user(self, raw_id: int) -> int:
        """Dense id of a raw user id; 0 if unknown."""
        return int(self._user_index.dense(raw_id))

    def dense_item(self, raw_ids: Any) -> np.ndarray:
        """Dense ids of raw item ids, int32 of the same shape; 0 where unknown.

        Raises:
            TypeError: ids that are not integers.
        """
        return self._item_index.dense(raw_ids)

    @cached_property
    def _user_index(self) -> "RawIdIndex":
        return RawIdIndex(self.users.raw_id)

    @cached_property
    def _item_index(self) -> "RawIdIndex":
        return RawIdIndex(self.items.raw_id)


class RawIdIndex:
    """Finds dense ids of raw ids by bisection, 0 where unknown. Entry 0 of `raw_id` is not an id."""

    def __init__(self, raw_id: np.ndarray) -> None:
        self._order = np.concatenate([np.argsort(raw_id[1:], kind="stable") + 1, [0]]).astype(np.int32)
        self._sorted = raw_id[self._order[:-1]]

    def dense(self, raw_ids: Any) -> np.ndarray:
        raw = np.asarray(raw_ids)
        if raw.size and raw.dtype.kind not in "iuO":
            raise TypeError(f"raw ids must be integers, got {raw.dtype}")
        fits = np.asarray((raw >= -(2**63)) & (raw < 2**63), bool)
        raw = np.where(fits, raw, 0).astype(np.int64)
        first = np.searchsorted(self._sorted, raw)
        found = fits & (first < np.searchsorted(self._sorted, raw, side="right"))
        return np.where(found, self._order[first], 0).astype(np.int32)


def open_table(directory: Path | str) -> Interactions:
    """Read a table that `ingest` wrote. The arrays are read-only.

    Raises:
        UserError: the folder holds no table, or a file is missing or damaged.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    events = _read_columns(directory / EVENTS_FILE, (USER, ITEM, *manifest.actions))
    users = Users(*_dictionary(directory / USERS_FILE, Users))
    items = Items(*_dictionary(directory / ITEMS_FILE, Items))
    user_R, item_R, *labels = events
    table = Interactions(
        kind=manifest.kind,
        actions=manifest.actions,
        has_exposures=manifest.has_exposures,
        user_R=user_R,
        item_R=item_R,
        labels_RA=np.stack(labels, axis=1),
        offsets=offsets_of(user_R, len(users.raw_id) - 1),
        users=users,
        items=items,
        sha256=manifest.sha256,
    )
    for _, array in _arrays(table):
        array.setflags(write=False)
    table.offsets.setflags(write=False)
    return table


def offsets_of(user_R: np.ndarray, num_users: int) -> np.ndarray:
    """Where each user's block begins, int64 [U + 2]; one entry more closes the last block."""
    return np.concatenate([[0], np.cumsum(np.bincount(user_R, minlength=num_users + 1))]).astype(np.int64)


def logical_sha256(table: Interactions) -> str:
    """SHA-256 over the arrays of a table in a fixed order, each with its name, dtype and shape; little-endian."""
    digest = hashlib.sha256()
    for name, array in _arrays(table):
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _arrays(table: Interactions) -> Iterator[tuple[str, np.ndarray]]:
    yield "user", table.user_R
    yield "item", table.item_R
    yield f"labels {','.join(table.actions)}", table.labels_RA
    for record in (table.users, table.items):
        for field in dataclasses.fields(record):
            yield f"{type(record).__name__}.{field.name}", getattr(record, field.name)


def _read_columns(path: Path, names: tuple[str, ...]) -> list[np.ndarray]:
    table = pq.read_table(path, columns=list(names), page_checksum_verification=True)
    return [table[name].to_numpy() for name in names]


def _dictionary(path: Path, record: type) -> list[np.ndarray]:
    """The fields of `Users` or `Items`, with the neutral entry 0 in front."""
    fields = [field.name for field in dataclasses.fields(record)]
    neutral = [-1 if place == 0 else 0 for place in range(len(fields))]
    columns = _read_columns(path, tuple(fields))
    return [
        np.concatenate([[first], column]).astype(column.dtype) for first, column in zip(neutral, columns, strict=True)
    ]
