"""The engine "ray": blocks are parsed by Ray tasks, encoded and brought to their users by a Ray Data pipeline over Arrow blocks.

The driver, which is the process that called `ingest`, reads the source, holds the dictionaries of users and items, and writes the
table; so no other machine needs to see either. It hands each block to a task and gets back the bad rows and the rows that tell the
dictionaries something new; the good rows stay in Ray's object store, which spills to disk. When the dictionaries are complete, tasks
encode those rows, Ray sorts them into one block a bucket of users, and tasks turn each into the bytes of its shard.

A worker that dies loses nothing: all work is tasks without a state of their own, which Ray runs again.
"""

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data.context import DataContext, ShuffleStrategy
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError

from tenrec_jax.data.arrow import as_arrow, as_numpy
from tenrec_jax.data.blocks import Piece
from tenrec_jax.data.encoder import Encoder, telling_rows
from tenrec_jax.data.engines import Checked
from tenrec_jax.data.schema import ITEM, USER, Kind
from tenrec_jax.data.shards import CHUNK_ROWS, Oddities, RowOrder, Shard, bucket_of, make_shard
from tenrec_jax.errors import UserError

# Columns that rows have on their way; a line of a header cannot hold these names, since they hold a line end.
PLACE, BUCKET = "place\n", "bucket\n"
TASKS_PER_CPU = 2
NO_ROOM = (ObjectStoreFullError, OutOfDiskError, OutOfMemoryError)


@contextmanager
def ray_engine(scratch: Path) -> Iterator["RayEngine"]:
    """The engine on the session of Ray that this process has; otherwise on the cluster that RAY_ADDRESS names; otherwise on a Ray of
    its own, which ends with it.

    Args:
        scratch: folder in which a Ray of its own spills what does not fit the memory.

    Raises:
        UserError: the cluster cannot be reached, or has no room for the rows.
    """
    with nullcontext() if ray.is_initialized() else session(scratch):
        try:
            yield RayEngine()
        except NO_ROOM as error:
            raise UserError(
                f"Ray has no room for the rows on their way: {error}\nNo table was written. Make room, or take the engine local."
            ) from error


@contextmanager
def session(scratch: Path) -> Iterator[None]:
    """A connection to the Ray that RAY_ADDRESS names, or a Ray of its own; it ends afterwards."""
    address = os.environ.get("RAY_ADDRESS")
    own = {} if address else {"include_dashboard": False, "object_spilling_directory": str(scratch)}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # a Ray that is started here reports to nobody
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except ConnectionError as error:
        raise UserError(
            f"RAY_ADDRESS is {address!r}, and no Ray answers there ({error}). Correct it, or unset it to start a Ray on this machine."
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


class RayEngine:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._blocks: list[ray.ObjectRef] = []
        self._rows = 0

    def read(self, pieces: Iterator[Piece], encoder: Encoder) -> Iterator[Checked]:
        """See `Engine`."""
        limit = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
        parse = ray.remote(_parse).options(num_returns=2)
        ahead: deque[tuple[ray.ObjectRef, ray.ObjectRef]] = deque()
        for number, piece in enumerate(pieces):
            ahead.append(tuple(parse.remote(piece, number, encoder.kind)))
            if len(ahead) > limit:
                yield self._take(encoder, *ahead.popleft())
        while ahead:
            yield self._take(encoder, *ahead.popleft())

    def shards(self, encoder: Encoder, order: RowOrder, labels: Sequence[str]) -> Iterator[Shard]:
        """See `Engine`."""
        last = int(bucket_of(np.asarray(encoder.counts[:1]))[0])
        with DataContext.current(_context()):
            encoded = ray.data.from_arrow_refs(self._blocks).map_batches(
                _encode, fn_args=[ray.put(encoder)], batch_size=CHUNK_ROWS, batch_format="pyarrow"
            )
            buckets = encoded.sort(BUCKET, boundaries=list(range(1, last + 1)))
            made = buckets.map_batches(_make_shard, fn_args=[order, labels], batch_size=None, batch_format="pyarrow")
        number = rows = 0
        for row in made.iter_rows():
            if row["bucket"] != number:
                raise RuntimeError(f"Ray gave bucket {row['bucket']} of users where {number} was due")
            number, rows = number + 1, rows + row["rows"]
            columns = pq.read_table(pa.BufferReader(row["shard"]), columns=[USER, ITEM, *labels])
            oddities = Oddities(*(row[name] for name in Oddities._fields))
            yield Shard(pa.py_buffer(row["shard"]), columns, oddities)
        if (number, rows) != (last + 1, self._rows):
            raise RuntimeError(f"Ray gave {number} buckets of {rows} rows instead of {last + 1} of {self._rows}")

    def _take(self, encoder: Encoder, told: ray.ObjectRef, rows: ray.ObjectRef) -> Checked:
        """Learn from what a task tells of a block, and keep its rows where they are."""
        checked, telling, count = ray.get(told)
        if count:
            encoder.learn(telling)
            self._blocks.append(rows)
            self._rows += count
        return checked


def _context() -> DataContext:
    """Sorting by tasks, whose results Ray makes again when they are lost, and blocks in order."""
    context = DataContext.get_current().copy()
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    return context


def _parse(piece: Piece, number: int, kind: Kind) -> tuple[tuple[Checked, pa.RecordBatch, int], pa.Table]:
    """What the driver needs of a block, and its good rows with their places in the log."""
    rows, bad, lines = piece()
    place_R = np.arange(rows.num_rows) + (number << 32)
    placed = pa.Table.from_batches([rows]).append_column(PLACE, as_arrow(place_R))
    return (Checked(bad, lines), telling_rows(rows, kind), rows.num_rows), placed


def _encode(rows: pa.Table, encoder_ref: ray.ObjectRef) -> pa.Table:
    """Rows with dense ids and the number of their bucket."""
    encoder = ray.get(encoder_ref)
    known = encoder.counts
    (batch,) = rows.combine_chunks().to_batches()
    encoded = pa.Table.from_batches([encoder(batch)]).append_column(PLACE, batch[PLACE])
    if encoder.counts != known:
        raise RuntimeError(f"the dictionaries of {known} users and items lacked some of a block")
    return encoded.append_column(BUCKET, as_arrow(bucket_of(as_numpy(encoded[USER]))))


def _make_shard(rows: pa.Table, order: RowOrder, labels: Sequence[str]) -> pa.Table:
    """A bucket's rows to one row: number of the bucket, number of its rows, its file, and its oddities."""
    if not rows.num_rows:
        return pa.table({})
    rows = rows.take(as_arrow(np.argsort(as_numpy(rows[PLACE]))))
    bucket_R = as_numpy(rows[BUCKET])
    if bucket_R.min() != bucket_R.max():
        raise RuntimeError(f"Ray gave buckets {bucket_R.min()} to {bucket_R.max()} of users as one")
    shard = make_shard(rows.drop_columns([PLACE, BUCKET]), order, labels)
    made = {
        "bucket": [int(bucket_R[0])],
        "rows": [len(bucket_R)],
        "shard": pa.array([shard.data.to_pybytes()], pa.large_binary()),
    }
    return pa.table(made | {name: [count] for name, count in shard.oddities._asdict().items()})
