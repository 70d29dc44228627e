"""Where the blocks of a log are parsed and encoded, and its rows brought to their users: in this process, or on Ray."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from tenrec_jax.data.blocks import Piece
from tenrec_jax.data.encoder import Encoder
from tenrec_jax.data.quarantine import BadRow
from tenrec_jax.data.shards import RowOrder, Shard, Spill, make_shard
from tenrec_jax.errors import UserError

LOCAL, RAY = "local", "ray"
ENGINES = (LOCAL, RAY)
NO_RAY = 'The engine ray needs Ray Data ({error}). Install it: pip install "tenrec_jax[ray]"'
THREADS = 2

T = TypeVar("T")
Made = TypeVar("Made")


class Checked(NamedTuple):
    """What a block held: its bad rows, and the number of all its lines."""

    bad: list[BadRow]
    lines: int


class Engine(Protocol):
    """Two passes over a log. Every engine runs the same functions on the same blocks, so every engine gives the same table."""

    def read(self, pieces: Iterator[Piece], encoder: Encoder) -> Iterator[Checked]:
        """Parse and check all pieces, keep their good rows, and teach them to the encoder; in the order of the log."""

    def shards(self, encoder: Encoder, order: RowOrder, labels: Sequence[str]) -> Iterator[Shard]:
        """The rows that were read, as shards in the order of dense user ids.

        Args:
            encoder: which has learned from all rows.
            order: of a user's rows.
            labels: columns that hold actions.
        """


def open_engine(name: str, scratch: Path) -> AbstractContextManager[Engine]:
    """The engine of that name.

    Args:
        name: one of `ENGINES`.
        scratch: an empty folder for temporary files.

    Raises:
        UserError: it is not installed.
    """
    if name == LOCAL:
        return nullcontext(LocalEngine(scratch))
    try:
        from tenrec_jax.data.ray_engine import ray_engine
    except ImportError as error:
        raise UserError(NO_RAY.format(error=error)) from error
    return ray_engine(scratch)


class LocalEngine:
    """`THREADS` threads of this process; rows wait on disk between the passes."""

    def __init__(self, scratch: Path) -> None:
        self._spill = Spill(scratch)

    def read(self, pieces: Iterator[Piece], encoder: Encoder) -> Iterator[Checked]:
        """See `Engine`."""
        # One more than there are threads: they go on while a block is encoded here.
        for block in _ahead(lambda piece: piece(), pieces, THREADS + 1):
            if block.rows.num_rows:
                self._spill.add(encoder(block.rows))
            yield Checked(block.bad, block.lines)

    def shards(self, encoder: Encoder, order: RowOrder, labels: Sequence[str]) -> Iterator[Shard]:
        """See `Engine`."""
        yield from _ahead(partial(make_shard, order=order, labels=labels), self._spill.buckets(), THREADS)


def _ahead(work: Callable[[T], Made], todo: Iterable[T], depth: int) -> Iterator[Made]:
    """The results, in order, while threads work on those to come; `depth` are held at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        ahead: deque[Future[Made]] = deque()
        for entry in todo:
            ahead.append(pool.submit(work, entry))
            if len(ahead) == depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
