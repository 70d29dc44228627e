"""From rows in the order of a source to rows in blocks of one user each, in bounded memory.

Encoded rows are spilled to disk in chunks, sorted inside a chunk into buckets of `BUCKET_USERS` dense user ids. A bucket is then
gathered from all chunks, brought into order and becomes one Parquet shard, whatever the size of the log.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tenrec_jax.data.arrow import as_arrow, as_numpy
from tenrec_jax.data.schema import CONFLICTS, ITEM, USER
from tenrec_jax.files import flush

BUCKET_USERS = 4096
CHUNK_ROWS = 1 << 21
ROW_GROUP_ROWS = 1 << 17


class Spill:
    """Encoded rows on their way to the shards.

    Args:
        folder: an empty folder for temporary files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = self.rows = 0
        self._chunks: list[dict[int, int]] = []  # of each chunk: the place of a bucket's batch in its file

    def add(self, rows: pa.RecordBatch) -> None:
        """Take rows with dense ids in the columns `user` and `item`, in the order of the source."""
        self._pending.append(rows)
        self._pending_rows += rows.num_rows
        self.rows += rows.num_rows
        if self._pending_rows >= CHUNK_ROWS:
            self._write()

    def buckets(self) -> Iterator[pa.Table]:
        """All rows, bucket by bucket in the order of dense user ids; inside a bucket in the order of the source."""
        self._write()
        places: dict[int, list[int]] = {}
        for chunk, places_of_chunk in enumerate(self._chunks):
            for bucket in places_of_chunk:
                places.setdefault(bucket, []).append(chunk)
        for bucket in sorted(places):
            batches = []
            for chunk in places[bucket]:
                with pa.OSFile(str(self._path(chunk))) as file:
                    batches.append(pa.ipc.open_file(file).get_batch(self._chunks[chunk][bucket]))
            yield pa.Table.from_batches(batches)

    def _write(self) -> None:
        if not self._pending_rows:
            return
        rows = pa.Table.from_batches(self._pending).combine_chunks().to_batches()[0]
        self._pending, self._pending_rows = [], 0
        bucket_R = bucket_of(as_numpy(rows[USER]))
        if (bucket_R[1:] < bucket_R[:-1]).any():
            order = np.argsort(bucket_R, kind="stable")
            rows, bucket_R = rows.take(as_arrow(order)), bucket_R[order]
        starts = np.concatenate([[0], np.flatnonzero(np.diff(bucket_R)) + 1, [len(bucket_R)]]).tolist()
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(str(self._path(len(self._chunks))), rows.schema, options=options) as writer:
            for start, stop in itertools.pairwise(starts):
                writer.write_batch(rows.slice(start, stop - start))
        self._chunks.append({int(bucket_R[start]): place for place, start in enumerate(starts[:-1])})

    def _path(self, chunk: int) -> Path:
        return self._folder / f"chunk-{chunk:05d}.arrow"


@dataclass(frozen=True)
class RowOrder:
    """How the rows of a user stand.

    Attributes:
        time: name of the column that orders them; empty keeps the order of the source.
        drop_exact: keep only the first of rows that are equal in every column.
    """

    time: str = ""
    drop_exact: bool = False


class Oddities(NamedTuple):
    """What is odd about rows that are kept; the manifest's counts have the same names.

    repeated_pairs: rows whose (user, item) stood on an earlier row. duplicate_rows: rows that equal an earlier row in every column.
    contradicting_pairs: (user, item) pairs whose rows differ in any action (`stats.Repeats.click_contradictions` counts rows).
    user_feature_conflicts, item_feature_conflicts: rows that give their user or item another feature than an earlier row did.
    """

    repeated_pairs: int = 0
    duplicate_rows: int = 0
    contradicting_pairs: int = 0
    user_feature_conflicts: int = 0
    item_feature_conflicts: int = 0

    def plus(self, other: "Oddities") -> "Oddities":
        """The sums."""
        return Oddities(*(sum(pair) for pair in zip(self, other, strict=True)))


class Shard(NamedTuple):
    """A bucket of users, complete. data: its Parquet file. rows: in their final order, with the columns user, item and labels at least."""

    data: pa.Buffer
    rows: pa.Table
    oddities: Oddities


def bucket_of(user_R: np.ndarray) -> np.ndarray:
    """Number of the bucket of each dense user, int32 [R]."""
    return ((user_R - 1) // BUCKET_USERS).astype(np.int32)


def make_shard(rows: pa.Table, order: RowOrder, labels: Sequence[str]) -> Shard:
    """Complete a bucket.

    Args:
        rows: encoded, of some users, all of each; in the order of the source.
        order: of a user's rows.
        labels: columns that hold actions.
    """
    conflicts = {name: int(np.count_nonzero(as_numpy(rows[name]))) for name in CONFLICTS}
    ordered, oddities = in_order(rows.drop_columns(list(CONFLICTS)), order, labels)
    # One chunk a column: how a file is cut into pages depends on chunks, and they on the engine.
    ordered = ordered.combine_chunks()
    file = pa.BufferOutputStream()
    write_shard(ordered, file)
    return Shard(file.getvalue(), ordered, oddities._replace(**conflicts))


def in_order(rows: pa.Table, order: RowOrder, actions: Sequence[str]) -> tuple[pa.Table, Oddities]:
    """Bring a bucket's rows into blocks of one user each and count what repeats.

    Args:
        rows: of some users, all of each; in the order of the source.
        order: of a user's rows.
        actions: columns that hold labels.
    """
    user_R = as_numpy(rows[USER])
    keys = (as_numpy(rows[order.time]), user_R) if order.time else (user_R,)
    if order.time or (user_R[1:] < user_R[:-1]).any():
        rows = rows.take(as_arrow(np.lexsort(keys)))
    oddities, duplicate_R = _repeats(rows, actions)
    if order.drop_exact and len(duplicate_R):
        rows = rows.take(as_arrow(np.delete(np.arange(rows.num_rows), duplicate_R)))
    return rows, oddities


def _repeats(rows: pa.Table, actions: Sequence[str]) -> tuple[Oddities, np.ndarray]:
    """The counts, and the numbers of the rows that equal an earlier row."""
    pair_R = as_numpy(rows[USER]).astype(np.int64) << 32 | as_numpy(rows[ITEM])
    sorted_R = np.sort(pair_R, kind="stable")  # the fast one where users stand in blocks
    again = sorted_R[1:][sorted_R[1:] == sorted_R[:-1]]
    if not len(again):
        return Oddities(), again
    suspect = np.flatnonzero(as_numpy(pc.is_in(as_arrow(pair_R), value_set=as_arrow(again).unique())))
    suspects = rows.take(as_arrow(suspect))
    values = np.concatenate([_numbered(column) for column in suspects.columns])
    order = np.lexsort(values)  # of equal rows, the first of the source stays first
    duplicates = np.sort(order[1:][(values[:, order[1:]] == values[:, order[:-1]]).all(axis=0)])
    _, start = np.unique(np.sort(pair_R[suspect]), return_index=True)
    label_RA = np.stack([as_numpy(suspects[name]) for name in actions], axis=1)[np.argsort(pair_R[suspect])]
    differs_A = np.maximum.reduceat(label_RA, start) != np.minimum.reduceat(label_RA, start)
    return Oddities(len(again), len(duplicates), int(differs_A.any(axis=1).sum())), suspect[duplicates]


def _numbered(column: pa.ChunkedArray) -> np.ndarray:
    """A column as integers that are equal where its values are, and which of them are missing: int64 [2, R]."""
    column = column.combine_chunks()
    is_null_R = ~as_numpy(column.is_valid())
    if pa.types.is_string(column.type):
        column = column.dictionary_encode().indices
    values_R = as_numpy(column, missing=0)
    if values_R.dtype.kind == "f":
        values_R = (values_R + 0.0).astype(np.float64).view(np.int64)  # -0.0 and 0.0 are equal
    return np.stack([values_R.astype(np.int64), is_null_R])


def write_shard(rows: pa.Table, file: pa.NativeFile) -> None:
    """Write a bucket as a Parquet file with page checksums; a row group holds whole users, `ROW_GROUP_ROWS` rows or a little more."""
    user_R = as_numpy(rows[USER])
    starts = np.concatenate([[0], np.flatnonzero(np.diff(user_R)) + 1])
    groups = np.unique(np.searchsorted(starts, np.arange(0, len(user_R), ROW_GROUP_ROWS)))
    cuts = [*starts[groups[groups < len(starts)]].tolist(), len(user_R)]
    # Items are too many for a dictionary: trying one costs time and space.
    encoding = {"use_dictionary": [name for name in rows.column_names if name != ITEM]}
    with pq.ParquetWriter(file, rows.schema, compression="lz4", write_page_checksum=True, **encoding) as writer:
        for start, stop in itertools.pairwise(cuts):
            writer.write_table(rows.slice(start, stop - start), row_group_size=max(1, stop - start))


class ColumnFile:
    """A .npy file that grows by rows; its header is completed when it is closed."""

    _HEADER_BYTES = 128

    def __init__(self, path: Path, dtype: str, width: int = 0) -> None:
        self._path, self._dtype, self._width, self._rows = path, np.dtype(dtype), width, 0
        self._file, self._digest = path.open("wb"), hashlib.sha256()
        self._file.write(bytes(self._HEADER_BYTES))

    def append(self, rows: np.ndarray) -> None:
        """Add rows: [R], or [R, width]."""
        data = np.ascontiguousarray(rows, self._dtype).data
        self._file.write(data)
        self._digest.update(data)
        self._rows += len(rows)

    def close(self) -> None:
        """Complete the file and flush it to disk."""
        dtype, shape, _ = self.described()
        self._file.seek(0)
        descr = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, descr)
        if self._file.tell() != self._HEADER_BYTES:
            raise RuntimeError(f"{self._path}: the header of a .npy file took {self._file.tell()} bytes")
        self._file.close()
        flush(self._path)

    def abandon(self) -> None:
        """Let go of the file as it is; nothing happens after `close`."""
        self._file.close()

    def described(self) -> tuple[str, tuple[int, ...], str]:
        """Type, shape, and SHA-256 of the values."""
        shape = (self._rows, self._width) if self._width else (self._rows,)
        return self._dtype.str, shape, self._digest.hexdigest()
