"""Assembling training batches: histories of 64 events and 127 negatives that the user did not click.

    python experiments/benchmarks/data_batches.py [--json FILE] [--quick]

The rival is a dataset of one example a call, as one writes it for a data loader: the same fields, drawn with NumPy, one example after
the other, and stacked. Both run in turns (A B A B) in one process; the medians of the rounds count. The bar is 100 times the rival.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tenrec_jax.data.batches import TrainVocabulary
from tenrec_jax.data.history_batches import HistoryBatches
from tenrec_jax.data.interactions import Interactions, Items, Users, offsets_of
from tenrec_jax.data.protocols import Part, Split, per_user_order
from tenrec_jax.data.sampling import UniformItems

HISTORY, NEGATIVES, BATCH, BAR = 64, 127, 4096, 100.0
ACTIONS = ("click", "like", "share", "follow")


class Sizes(NamedTuple):
    """Of the log, and how much is assembled in a round: batches by the fast path, examples by the rival."""

    users: int
    items: int
    rounds: int
    batches: int
    examples: int


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


def measure(sizes: Sizes) -> list[dict[str, Any]]:
    """One result with one loader thread, one with two; both sides have the same number."""
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
    dataset = RowDataset(table, split, vocabulary)
    order = np.random.default_rng(1).permutation(len(dataset.rows))
    pieces = order[: sizes.examples].reshape(8, -1)
    results = []
    for threads in (1, 2):
        ours, theirs = [], []
        with ThreadPoolExecutor(threads) as pool:
            for turn in range(sizes.rounds + 1):
                theirs.append(len(pieces.ravel()) / _seconds(pool, dataset.batch, pieces))
                steps = range(turn * sizes.batches, (turn + 1) * sizes.batches)
                ours.append(sizes.batches * BATCH / _seconds(pool, batches, steps))
        # The first turn warms up.
        fast, slow = statistics.median(ours[1:]), statistics.median(theirs[1:])
        results.append(
            {
                "work": f"examples/s, {HISTORY} history, {NEGATIVES} negatives, {table.num_rows:,} rows, loader threads: {threads}",
                "rival": "one example a call, NumPy",
                "ours": fast,
                "theirs": slow,
                "ratio": fast / slow,
                "bar": BAR,
                "met": fast / slow >= BAR,
            }
        )
    return results


def _seconds(pool: ThreadPoolExecutor, assemble: Callable[[Any], Any], work: Any) -> float:
    began = time.perf_counter()
    for _ in pool.map(assemble, work):
        pass
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help="a small log and few rounds")
    options = parser.parse_args(arguments)
    quick, full = Sizes(4_000, 20_000, 3, 8, 1_024), Sizes(34_240, 130_637, 7, 40, 4_096)
    results = measure(quick if options.quick else full)
    for result in results:
        sys.stdout.write(
            f"{result['work']}\n  ours {result['ours']:,.0f}   {result['rival']} {result['theirs']:,.0f}   "
            f"ratio {result['ratio']:.0f}   bar {result['bar']:.0f}   {'met' if result['met'] else 'not met'}\n"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
