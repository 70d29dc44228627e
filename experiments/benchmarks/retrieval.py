"""Retrieval: ranks over the full catalogue, approximate search, and intervals of metrics.

Command:  python experiments/benchmarks/retrieval.py [--quick] [--only ranks search intervals] [--indexes FOLDER] [--vectors N] [--rounds N]

Needs the extra `bench` (faiss and hnswlib). Building HNSW graphs over a million vectors takes minutes: `--indexes` keeps what was built, so
that a second run measures at once, and `--vectors` takes a smaller catalogue. Every side is set to the same recall on tuning queries, and
the recall that is told is of other queries. Sides take turns, medians count; ranks and intervals run in processes of their own.

Bars: ranks 3 times as fast as NumPy's product and argpartition, in 1 GiB beyond the inputs; search level with the best rival at
recall@100 of .95, in batches of 256 on two threads (ScaNN takes all cores: run it on two), and 10 times exact search; ten intervals of
1,000 resamples in 10 seconds.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from harness import Result, measure, median_seconds, parser, report, take_turns

from tenrec_jax.data.batches import TrainVocabulary
from tenrec_jax.data.interactions import Interactions, Items, Users
from tenrec_jax.evaluation.evaluator import RetrievalEvaluator
from tenrec_jax.evaluation.statistics import bootstrap_means

RANKS_BAR, MEMORY_MIB, SEARCH_BAR, EXACT_BAR, SECONDS = 3.0, 1024, 1.0, 10.0, 10.0
HISTORY, DEEPEST, BLOCK = 10, 100, 256
TARGET_RECALL, MARGIN = 0.95, 0.01  # the margin is for queries that none was tuned by
METRICS, RESAMPLES = 10, 1_000
WORKS = ("ranks", "search", "intervals")


class Sizes(NamedTuple):
    """Users and items to rank, dimension; vectors and queries to search; users of the intervals."""

    users: int
    items: int
    dim: int
    vectors: int
    queries: int
    sampled: int


FULL = Sizes(20_000, 100_000, 64, 1_000_000, 1_024, 100_000)
QUICK = Sizes(500, 3_000, 64, 20_000, 256, 2_000)


class Towers(NamedTuple):
    """A log in which every user has some rows and a last one to be predicted, and random queries and vectors."""

    table: Interactions
    queries: np.ndarray
    vectors: np.ndarray


def make_towers(users: int, items: int, dim: int) -> Towers:
    """The items of the last rows lie near their queries."""
    random = np.random.default_rng(0)
    length = HISTORY + 1
    item = random.integers(1, items + 1, users * length, dtype=np.int32)
    queries, vectors = (random.standard_normal((n, dim), dtype=np.float32) for n in (users, items))
    queries += 0.3 * vectors[item[HISTORY::length] - 1]
    table = Interactions(
        kind="custom",
        actions=("click",),
        has_exposures=False,
        user_R=np.repeat(np.arange(1, users + 1, dtype=np.int32), length),
        item_R=item,
        labels_RA=np.ones((users * length, 1), np.int8),
        offsets=np.concatenate([[0], np.arange(users + 1) * length]),
        users=Users(np.arange(-1, users), *np.zeros((2, users + 1), np.int32)),
        items=Items(np.arange(-1, items), np.zeros(items + 1, np.int32)),
        sha256="",
    )
    return Towers(table, queries, vectors)


def our_ranks(towers: Towers) -> np.ndarray:
    """Ours: the rank of every user's target, seen items excluded."""
    table = towers.table
    is_target = np.arange(table.num_rows) % (HISTORY + 1) == HISTORY
    vocabulary = TrainVocabulary(*(np.arange(n + 1, dtype=np.int32) for n in (table.num_users, table.num_items)))
    evaluator = RetrievalEvaluator(
        table,
        vocabulary,
        np.flatnonzero(~is_target),
        np.flatnonzero(is_target),
        max_length=HISTORY,
        events_per_batch=1_024,
        block=BLOCK,
    )
    return evaluator.rank_by(towers.queries, towers.vectors).places.first


def numpy_ranks(towers: Towers) -> np.ndarray:
    """The rival: the best of a block of products by argpartition, sorted; the place of the target, or infinity beyond the best."""
    item_UL = towers.table.item_R.reshape(-1, HISTORY + 1) - 1
    ranks = np.full(len(item_UL), np.inf)
    for start in range(0, len(item_UL), BLOCK):
        block = slice(start, start + BLOCK)
        seen, target = item_UL[block, :HISTORY], item_UL[block, HISTORY:]
        scores = towers.queries[block] @ towers.vectors.T
        np.put_along_axis(scores, seen, -np.inf, axis=1)
        best = np.argpartition(-scores, DEEPEST, axis=1)[:, :DEEPEST]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
        row, place = np.nonzero(np.take_along_axis(best, order, axis=1) == target)
        ranks[start + row] = place + 1
    return ranks


def prepared(function: Callable[[Towers], Any], size: tuple[int, ...]) -> Callable[[], Any]:
    """`function` on data of that size, after a call on little data."""
    function(make_towers(BLOCK, *size[1:]))
    return partial(function, make_towers(*size))


def ranks(sizes: Sizes, rounds: int, bars: bool) -> list[Result]:
    """Users a second, and the memory that a call adds."""
    size = (sizes.users, sizes.items, sizes.dim)
    part = make_towers(min(sizes.users, 4 * BLOCK), *size[1:])
    mine, theirs = our_ranks(part), numpy_ranks(part)
    agree = float(np.mean(np.where(mine <= DEEPEST, mine, np.inf) == theirs))
    print(f"ranks: the two sides agree on {agree:.2%} of the targets", flush=True)
    if agree < 0.99:  # the rest: rounding decides which of two items comes first
        raise RuntimeError("the two sides rank differently; nothing was measured")
    mine_usage, their_usage = take_turns(
        rounds, *(partial(measure, prepared, f, size) for f in (our_ranks, numpy_ranks))
    )
    fast, slow = (sizes.users / median_seconds(usages) for usages in (mine_usage, their_usage))
    growth = median(usage.growth_mib for usage in mine_usage)
    work = f"ranks, {sizes.users:,} users x {sizes.items:,} x {sizes.dim}, users/s"
    return [
        Result(work, "NumPy, argpartition", fast, slow, fast / slow, RANKS_BAR * bars),
        Result("the same, additional MiB", "1 GiB", growth, MEMORY_MIB, MEMORY_MIB / growth, 1.0 * bars),
    ]


def searching(sizes: Sizes, rounds: int, folder: Path, bars: bool) -> list[Result]:
    """Queries a second at the same recall."""
    import search as sides_of  # faiss and hnswlib are needed here alone

    vectors, tuning, queries = (
        sides_of.clustered(n, sizes.dim, seed)
        for n, seed in ((sizes.vectors, 0), (sizes.queries, 1), (sizes.queries, 2))
    )
    exact = [sides_of.faiss_exact(vectors), sides_of.our_exact(vectors)]
    true_tuning, truth = (sides_of.in_batches(exact[0].search, some) for some in (tuning, queries))
    target, folder = TARGET_RECALL + MARGIN, folder / f"{sizes.vectors}x{sizes.dim}"
    folder.mkdir(parents=True, exist_ok=True)
    rivals = [sides_of.faiss_side(x, vectors, tuning, true_tuning, target, folder) for x in sides_of.FAISS]
    rivals.append(sides_of.hnswlib_side(vectors, tuning, true_tuning, target, folder))
    sides = [sides_of.ours(vectors, tuning, target, folder), *rivals, *exact]
    for side in sides:
        reached = sides_of.recall(side.search, queries, truth)
        print(f"{side.name}: recall@{sides_of.K} {reached:.4f}; {side.setting}", flush=True)
        if reached < TARGET_RECALL:
            raise RuntimeError(f"{side.name} does not reach {TARGET_RECALL}; nothing was measured")
    rates: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, measured in zip(sides, rates, strict=True):
            measured.append(sides_of.queries_per_second(side.search, queries))
    mine, *theirs = (median(measured) for measured in rates)
    work = f"search of {sizes.vectors:,} x {sizes.dim}, recall@100 {TARGET_RECALL}, queries/s"
    return [
        Result(work, side.name, mine, rate, mine / rate, (EXACT_BAR if side in exact else SEARCH_BAR) * bars)
        for side, rate in zip(sides[1:], theirs, strict=True)
    ]


def ten_intervals(users: int) -> None:
    """Ten metrics of so many users."""
    values = np.random.default_rng(0).random((METRICS, users))
    bootstrap_means({f"metric {i}": value_U for i, value_U in enumerate(values)}, seed=0, resamples=RESAMPLES)


def prepared_intervals(users: int) -> Callable[[], None]:
    """`ten_intervals`, after a call on few users."""
    ten_intervals(10)
    return partial(ten_intervals, users)


def intervals(sizes: Sizes, rounds: int, bars: bool) -> Result:
    """Seconds, against a limit."""
    (usages,) = take_turns(rounds, partial(measure, prepared_intervals, sizes.sampled))
    taken = median_seconds(usages)
    work = f"{RESAMPLES:,} resamples, {METRICS} metrics, {sizes.sampled:,} users, s"
    return Result(work, f"{SECONDS:.0f} s", taken, SECONDS, SECONDS / taken, 1.0 * bars)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--only", nargs="+", choices=WORKS, default=WORKS, help="the works to measure (default: all)")
    options.add_argument("--indexes", type=Path, metavar="FOLDER", help="keep built indexes there, and use those there")
    options.add_argument("--vectors", type=int, metavar="N", help="size of the catalogue that is searched")
    chosen = options.parse_args(arguments)
    sizes, bars = (QUICK if chosen.quick else FULL), not chosen.quick
    if chosen.vectors:
        sizes = sizes._replace(vectors=chosen.vectors)
    results: list[Result] = []
    if "ranks" in chosen.only:
        results += ranks(sizes, chosen.rounds, bars)
    if "search" in chosen.only:
        with tempfile.TemporaryDirectory() as temporary:
            results += searching(sizes, chosen.rounds, chosen.indexes or Path(temporary), bars)
    if "intervals" in chosen.only:
        results.append(intervals(sizes, chosen.rounds, bars))
    report(results, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
