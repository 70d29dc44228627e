"""The table opened: memory-mapped columns, one contiguous block of rows a user, and the dictionaries of raw ids."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tenrec_jax.data.arrow import as_arrow, as_numpy
from tenrec_jax.data.manifest import REMEDY, check_files_once, read_manifest
from tenrec_jax.errors import UserError
from tenrec_jax.npy import open_npy

RawId = int | str

EVENTS_FOLDER, USERS_FILE, ITEMS_FILE = "events", "users.arrow", "items.arrow"
USER_COLUMN, ITEM_COLUMN, LABELS_COLUMN, OFFSETS = (
    f"columns/{name}.npy" for name in ("user", "item", "labels", "offsets")
)


@dataclass(frozen=True, eq=False)
class Users:
    """Arrays by dense user id, 1..U; entry 0 is nobody.

    Attributes:
        raw_id: int64 [U + 1], -1 first; where ids are text, objects of type str, "" first.
        gender, age: int32 [U + 1], 0 where missing.
    """

    raw_id: np.ndarray
    gender: np.ndarray
    age: np.ndarray


@dataclass(frozen=True, eq=False)
class Items:
    """Arrays by dense item id, 1..N; entry 0 is no item.

    Attributes:
        raw_id: int64 [N + 1], -1 first; where ids are text, objects of type str, "" first.
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

    def dense_user(self, raw_id: RawId) -> int:
        """Dense id of a raw user id; 0 if unknown."""
        return int(self._user_index.dense(raw_id))

    def dense_item(self, raw_ids: Any) -> np.ndarray:
        """Dense ids of raw item ids, int32 of the same shape; 0 where unknown.

        Raises:
            TypeError: ids of another type than the log's.
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
        self._is_text = raw_id.dtype == object
        self._order = np.concatenate([np.argsort(raw_id[1:], kind="stable") + 1, [0]]).astype(np.int32)
        self._sorted = raw_id[self._order[:-1]]

    def dense(self, raw_ids: Any) -> np.ndarray:
        raw = np.asarray(raw_ids, object) if self._is_text else np.asarray(raw_ids)
        if self._is_text:
            if not all(isinstance(value, str) for value in raw.flat):
                raise TypeError("raw ids of this log are text")
            fits = np.ones(raw.shape, bool)
        else:
            if raw.size and raw.dtype.kind not in "iuO":
                raise TypeError(f"raw ids must be integers, got {raw.dtype}")
            fits = np.asarray((raw >= -(2**63)) & (raw < 2**63), bool)
            raw = np.where(fits, raw, 0).astype(np.int64)
        first = np.searchsorted(self._sorted, raw)
        found = fits & (first < np.searchsorted(self._sorted, raw, side="right"))
        return np.where(found, self._order[first], 0).astype(np.int32)


def open_table(directory: Path | str) -> Interactions:
    """Open a table that `ingest` wrote. The arrays are read-only, and those over rows are memory maps.

    The files' hashes are checked when the table is opened for the first time or has changed since; see `check_files_once`.

    Raises:
        UserError: the folder holds no table, or a file is missing or damaged.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    check_files_once(directory, manifest)
    users, items = (_dictionary(directory / f, kind) for f, kind in ((USERS_FILE, Users), (ITEMS_FILE, Items)))
    user_R = open_npy(directory / USER_COLUMN, np.int32, (None,))
    item_R = open_npy(directory / ITEM_COLUMN, np.int32, user_R.shape)
    labels_RA = open_npy(directory / LABELS_COLUMN, np.int8, (len(user_R), len(manifest.actions)))
    offsets = open_npy(directory / OFFSETS, np.int64, (len(users[0]) + 1,))
    table = Interactions(
        kind=manifest.log_kind,
        actions=manifest.actions,
        has_exposures=manifest.has_exposures,
        user_R=user_R,
        item_R=item_R,
        labels_RA=labels_RA,
        offsets=offsets,
        users=Users(*users),
        items=Items(*items),
        sha256=manifest.sha256,
    )
    for _, array in _arrays(table):
        array.setflags(write=False)
    return table


def read_events(directory: Path | str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Stream columns of an ingested log in the order of its rows, also those that are no part of `Interactions`.

    Args:
        directory: the table.
        columns: "user" and "item" (dense ids) and names of the source's other columns.

    Raises:
        UserError: a shard cannot be read, or lacks a column, or a page's checksum is wrong.
    """
    for path in sorted((Path(directory) / EVENTS_FOLDER).glob("*.parquet")):
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                missing = [name for name in columns if name not in file.schema_arrow.names]
                if missing:
                    raise UserError(f"{path} has no column {', '.join(missing)}.")
                yield from file.iter_batches(columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged: {error}. {REMEDY}") from error


def offsets_of(user_R: np.ndarray, num_users: int) -> np.ndarray:
    """Where each user's block begins, int64 [U + 2]; one entry more closes the last block."""
    return np.concatenate([[0], np.cumsum(np.bincount(user_R, minlength=num_users + 1))]).astype(np.int64)


def logical_sha256(table: Interactions) -> str:
    """SHA-256 of a table's content: over the names, types, shapes and hashes of its arrays, in a fixed order; little-endian."""
    return sha256_of_arrays(
        (name, array.dtype.str, array.shape, array_sha256(array).hexdigest()) for name, array in _arrays(table)
    )


def array_sha256(array: np.ndarray) -> Any:
    """The running SHA-256 of an array's values; texts end with a NUL."""
    if array.dtype == object:
        return hashlib.sha256("".join(f"{text}\0" for text in array).encode())
    return hashlib.sha256(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)


def sha256_of_arrays(arrays: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """The hash of a table from its arrays' names, types, shapes and hashes."""
    digest = hashlib.sha256()
    for entry in arrays:
        digest.update(f"{entry}\n".encode())
    return digest.hexdigest()


def dictionary_arrays(record: Users | Items) -> Iterator[tuple[str, np.ndarray]]:
    """The names and arrays of `Users` or `Items`, as they are hashed."""
    for field in dataclasses.fields(record):
        yield f"{type(record).__name__}.{field.name}", getattr(record, field.name)


def _arrays(table: Interactions) -> Iterator[tuple[str, np.ndarray]]:
    yield "user", table.user_R
    yield "item", table.item_R
    yield f"labels {','.join(table.actions)}", table.labels_RA
    yield from dictionary_arrays(table.users)
    yield from dictionary_arrays(table.items)


def write_dictionary(record: Users | Items, path: Path) -> None:
    """Write the arrays of `Users` or `Items` as an Arrow file, which opens as a memory map."""
    columns = {field.name: as_arrow(getattr(record, field.name)) for field in dataclasses.fields(record)}
    batch = pa.RecordBatch.from_pydict(columns)
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)


def _dictionary(path: Path, record: type) -> list[np.ndarray]:
    """The fields of `Users` or `Items`."""
    try:
        with pa.memory_map(str(path)) as file:
            batch = pa.ipc.open_file(file).get_batch(0)
        batch.validate(full=True)
        columns = [batch[field.name] for field in dataclasses.fields(record)]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}. {REMEDY}") from error
    if not all(pa.types.is_integer(column.type) for column in columns[1:]):
        raise UserError(f"{path} cannot be read: columns are of other types. {REMEDY}")
    return [
        np.asarray(column.to_pylist(), object) if pa.types.is_string(column.type) else as_numpy(column)
        for column in columns
    ]
