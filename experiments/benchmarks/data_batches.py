"""Assembling training batches: histories of 64 events and 127 negatives that the user did not click.

Command:  python experiments/benchmarks/data_batches.py [--quick] [--json FILE]

The rival is a dataset of one example a call, as one writes it for a data loader: the same fields, drawn with NumPy, one example after
the other, and stacked. Both have the same number of loader threads; in each call ours spreads a batch over the cores, which the rival's
Python cannot. The bar is 100 times the rival.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from harness import Result, measure, median_seconds, parser, report, take_turns

from tenrec_jax.data.batches import TrainVocabulary
from tenrec_jax.data.history_batches import HistoryBatches
from tenrec_jax.data.interactions import Interactions, Items, Users, offsets_of
from tenrec_jax.data.protocols import Part, Split, per_user_order
from tenrec_jax.data.sampling import UniformItems

HISTORY, NEGATIVES, BATCH, BAR = 64, 127, 4096, 100.0
ACTIONS = ("click", "like", "share", "follow")


class Sizes(NamedTuple):
    """Of the log, and how much is assembled in a measurement: batches by the fast path, examples by the rival."""

    users: int
    items: int
    batches: int
    examples: int


SIZES, QUICK_SIZES = Sizes(34_240, 130_637, 40, 4_096), Sizes(4_000, 20_000, 8, 1_024)


class RowDataset:
    """The rival: one example a call."""

    def __init__(self, table: Interactions, split: Split, vocabulary: TrainVocabulary) -> None:
        self.table, self.vocabulary = table, vocabulary
        train = split.rows(Part.TRAIN)
        self.rows = train[table.labels_RA[train, 0] > 0]
        self.items = vocabulary.item[vocabulary.item > 0]
        users, items = table.user_R[self.rows], table.item_R[self.rows]
        bounds = np.searchsorted(users, np.arange(table.num_users + 2))
        self.positives = [np.unique(items[low:high]) for low, high in itertools.pairwise(bounds)]

    def __getitem__(self, example: int) -> tuple[Any, ...]:
        table, row = self.table, self.rows[example]
        user = table.user_R[row]
        history = slice(max(table.offsets[user], row - HISTORY), row)
        real = history.stop - history.start
        item = np.pad(table.item_R[history], (0, HISTORY - real))
        action = np.pad(table.labels_RA[history], ((0, HISTORY - real), (0, 0)))
        generator = np.random.default_rng((0, example))
        negative = generator.choice(self.items, NEGATIVES)
        hit = np.isin(negative, self.positives[user])
        while hit.any():
            negative[hit] = generator.choice(self.items, hit.sum())
            hit = np.isin(negative, self.positives[user])
        return (
            self.vocabulary.user[user],
            table.users.gender[user],
            table.users.age[user],
            item,
            table.items.category[item],
            action,
            np.arange(HISTORY) < real,
            table.item_R[row],
            table.labels_RA[row],
            negative,
        )

    def batch(self, examples: Sequence[int]) -> list[np.ndarray]:
        """The examples stacked, field by field."""
        return [np.stack(field) for field in zip(*map(self.__getitem__, examples), strict=True)]


def make_log(sizes: Sizes) -> Interactions:
    """A log with QB-video's long tails: log-normal lengths of users, items whose popularity falls steeply."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(34), 1.2, sizes.users), 1, 8876).astype(int)
    user_R = np.repeat(np.arange(1, sizes.users + 1), lengths).astype(np.int32)
    item_R = (sizes.items * random.random(len(user_R)) ** 3).astype(np.int32) + 1

    def feature(size: int, values: int) -> np.ndarray:
        return random.integers(0, values, size + 1).astype(np.int32)

    return Interactions(
        kind="qb_video",
        actions=ACTIONS,
        has_exposures=True,
        user_R=user_R,
        item_R=item_R,
        labels_RA=(random.random((len(user_R), 4)) < (0.7, 0.0085, 0.001, 0.001)).astype(np.int8),
        offsets=offsets_of(user_R, sizes.users),
        users=Users(np.arange(-1, sizes.users), feature(sizes.users, 3), feature(sizes.users, 8)),
        items=Items(np.arange(-1, sizes.items), feature(sizes.items, 3)),
        sha256="",
    )


def our_batches(sizes: Sizes, threads: int) -> Callable[[], object]:
    """Whole batches, in threads that have made one each already."""
    table = make_log(sizes)
    split = per_user_order(table)
    vocabulary = TrainVocabulary.of(table, split)
    batches = HistoryBatches(
        table,
        vocabulary,
        split,
        UniformItems.of_trained(vocabulary),
        history=HISTORY,
        negatives=NEGATIVES,
        batch_size=BATCH,
        seed=0,
    )
    return _in_threads(threads, batches, range(threads), range(threads, threads + sizes.batches))


def row_by_row(sizes: Sizes, threads: int) -> Callable[[], object]:
    """Pieces of a batch, example by example, in threads that have made one each already."""
    table = make_log(sizes)
    split = per_user_order(table)
    dataset = RowDataset(table, split, TrainVocabulary.of(table, split))
    order = np.random.default_rng(1).permutation(len(dataset.rows))
    pieces = order[: sizes.examples].reshape(8, -1)
    return _in_threads(threads, dataset.batch, pieces[:threads], pieces)


def _in_threads(
    threads: int, assemble: Callable[[Any], object], first: Sequence[Any] | np.ndarray, work: Sequence[Any] | np.ndarray
) -> Callable[[], object]:
    pool = ThreadPoolExecutor(threads)
    list(pool.map(assemble, first))

    def run() -> None:
        for _ in pool.map(assemble, work):  # nothing is kept, as in training
            pass

    return run


def compare(sizes: Sizes, threads: int, rounds: int) -> Result:
    """Examples a second."""
    mine, theirs = take_turns(
        rounds, partial(measure, our_batches, sizes, threads), partial(measure, row_by_row, sizes, threads)
    )
    fast, slow = sizes.batches * BATCH / median_seconds(mine), sizes.examples / median_seconds(theirs)
    work = f"examples/s, {HISTORY} history, {NEGATIVES} negatives, {threads} threads"
    return Result(work, "one example a call, NumPy", fast, slow, fast / slow, BAR)


def main() -> None:
    """Run all comparisons."""
    options = parser(__doc__.splitlines()[0]).parse_args()
    sizes = QUICK_SIZES if options.quick else SIZES
    report([compare(sizes, threads, options.rounds) for threads in (1, 2)], options.json)


if __name__ == "__main__":
    main()
