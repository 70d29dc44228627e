"""Metrics of large evaluations: pooled AUC, AUC by user, and ranks among candidates, against what one would write with scikit-learn.

Command:  python experiments/benchmarks/evaluation.py [--quick] [--rounds N] [--json FILE]

Scores are float32 and labels int8, as a model leaves them; rows are in no order. Each measurement runs in a process of its own that has
called the function on a little data before, ours and the rival's in turns, medians count. The loops over users and rows would take minutes:
they run over a part of the users or rows, with as many rows a user, and rates are compared. Memory is what a call adds to the resident
memory at its peak. Before anything is timed both sides must agree to 1e-9.

Bars: pooled AUC 5 times scikit-learn's speed at a quarter of its memory; GAUC 100 times a loop over users; ranking metrics 50 times a loop
over rows that sorts the candidates, in a function for each metric; the leanest loop one can write, one sort for all three, is
measured too.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from harness import Result, Usage, measure, median_seconds, parser, report, take_turns
from sklearn.metrics import roc_auc_score

from tenrec_jax.evaluation.metrics import auc, grouped_auc, hit_rate_at_k, mrr, ndcg_at_k, ranks_of

AUC_BAR, MEMORY_BAR, GAUC_BAR, RANKS_BAR = 5.0, 4.0, 100.0, 50.0
CANDIDATES, TOP = 128, 20
TOLERANCE = 1e-9
Function = Callable[..., Any]


class Sizes(NamedTuple):
    """Rows and users of the log, queries that are ranked, and the parts of users and queries that the loops cover."""

    rows: int
    users: int
    queries: int
    loop_users: int
    loop_queries: int


SIZES = Sizes(20_000_000, 150_000, 200_000, 7_500, 20_000)
QUICK_SIZES = Sizes(400_000, 3_000, 4_000, 500, 1_000)


class Log(NamedTuple):
    """Scored rows [R]."""

    labels: np.ndarray
    scores: np.ndarray
    users: np.ndarray


class Queries(NamedTuple):
    """Scores of candidates [B, C] and the column of each query's target [B]."""

    scores: np.ndarray
    target: np.ndarray


def make_log(rows: int, users: int) -> Log:
    """Scores that tell the labels apart a little; about one score in ten occurs elsewhere too."""
    random = np.random.default_rng(0)
    scores = random.random(rows, dtype=np.float32)
    labels = (random.random(rows, dtype=np.float32) < 0.2 + 0.3 * scores).astype(np.int8)
    return Log(labels, scores, random.integers(0, users, rows, dtype=np.int32))


def make_queries(queries: int) -> Queries:
    """Targets score a little higher than the other candidates."""
    random = np.random.default_rng(1)
    scores = random.standard_normal((queries, CANDIDATES), dtype=np.float32)
    target = random.integers(0, CANDIDATES, queries, dtype=np.int32)
    scores[np.arange(queries), target] += 1
    return Queries(scores, target)


def our_auc(log: Log) -> float:
    """Ours."""
    return auc(log.labels, log.scores)


def sklearn_auc(log: Log) -> float:
    """The rival."""
    return float(roc_auc_score(log.labels, log.scores))


def our_gauc(log: Log) -> float:
    """Ours."""
    return grouped_auc(log.labels, log.scores, groups=log.users).value


def user_loop(log: Log) -> float:
    """The rival: rows are brought together by user once, then one call for each user having both labels."""
    order = np.argsort(log.users, kind="stable")
    labels, scores = log.labels[order], log.scores[order]
    bounds = np.append(0, np.cumsum(np.bincount(log.users)))
    total = rows = 0.0
    for low, high in itertools.pairwise(bounds):
        if 0 < labels[low:high].sum() < high - low:
            total += (high - low) * float(roc_auc_score(labels[low:high], scores[low:high]))
            rows += high - low
    return total / rows


def our_ranking(queries: Queries) -> tuple[float, ...]:
    """Ours: NDCG@20, MRR, Hit@1."""
    ranks = ranks_of(queries.scores, queries.target)
    return ndcg_at_k(ranks, TOP), mrr(ranks), hit_rate_at_k(ranks, 1)


def ndcg_of_row(scores: np.ndarray, relevant: np.ndarray) -> float:
    """NDCG@20 as one writes it for a row."""
    discounts = 1 / np.log2(np.arange(2, TOP + 2))
    ideal = np.sort(relevant)[::-1][:TOP] @ discounts
    return float(relevant[np.argsort(-scores)[:TOP]] @ discounts / ideal)


def reciprocal_rank_of_row(scores: np.ndarray, relevant: np.ndarray) -> float:
    """1 / place of the relevant candidate."""
    return 1 / (1 + int(np.flatnonzero(relevant[np.argsort(-scores)])[0]))


def hit_of_row(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Whether the relevant candidate comes first."""
    return float(relevant[np.argsort(-scores)[:1]].any())


def metric_by_metric(queries: Queries) -> tuple[float, ...]:
    """The rival: a function of a row for each metric, which sorts the row, and the mean over rows."""
    relevant = np.arange(CANDIDATES) == queries.target[:, None]
    metrics = (ndcg_of_row, reciprocal_rank_of_row, hit_of_row)
    return tuple(
        sum(metric(scores, own) for scores, own in zip(queries.scores, relevant, strict=True)) / len(relevant)
        for metric in metrics
    )


def one_sort(queries: Queries) -> tuple[float, ...]:
    """The leanest loop: each row is sorted once, and the three metrics are taken from the place of its target."""
    ndcg = reciprocal = hits = 0.0
    for scores, target in zip(queries.scores, queries.target, strict=True):
        rank = int(np.flatnonzero(np.argsort(-scores) == target)[0]) + 1
        ndcg += 1 / math.log2(rank + 1) if rank <= TOP else 0.0
        reciprocal += 1 / rank
        hits += rank == 1
    return ndcg / len(queries.target), reciprocal / len(queries.target), hits / len(queries.target)


def prepared(function: Function, make: Function, small: tuple[int, ...], size: tuple[int, ...]) -> Callable[[], Any]:
    """`function` on data of the size that is measured, after one call on little data."""
    function(make(*small))
    return partial(function, make(*size))


def check(name: str, ours: Any, theirs: Any) -> None:
    """Print how far the two sides are apart, and stop where it is more than the tolerance."""
    difference = float(np.abs(np.subtract(ours, theirs)).max())
    print(f"{name}: the two sides differ by {difference:.1e}")
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{name}: {ours} is not {theirs}; nothing was measured")


def pooled(sizes: Sizes, rounds: int) -> list[Result]:
    """Seconds and additional memory of one AUC over all rows."""
    size = (sizes.rows, sizes.users)
    log = make_log(*size)
    check(f"AUC of {sizes.rows:,} rows", our_auc(log), sklearn_auc(log))
    del log
    runs = [partial(measure, prepared, f, make_log, (1_000, 10), size) for f in (our_auc, sklearn_auc)]
    mine, theirs = take_turns(rounds, *runs)
    fast, slow = median_seconds(mine), median_seconds(theirs)
    small, large = _median_growth(mine), _median_growth(theirs)
    return [
        Result(f"AUC of {sizes.rows:,} rows, s", "sklearn roc_auc_score", fast, slow, slow / fast, AUC_BAR),
        Result("the same, additional MiB", "sklearn roc_auc_score", small, large, large / small, MEMORY_BAR),
    ]


def by_user(sizes: Sizes, rounds: int) -> Result:
    """Rows a second; the loop's part of the log has as many rows a user as the whole."""
    size, part = (sizes.rows, sizes.users), (sizes.rows * sizes.loop_users // sizes.users, sizes.loop_users)
    log = make_log(*part)
    check(f"GAUC of {part[1]:,} users", our_gauc(log), user_loop(log))
    mine, theirs = take_turns(
        rounds,
        partial(measure, prepared, our_gauc, make_log, (1_000, 10), size),
        partial(measure, prepared, user_loop, make_log, (1_000, 10), part),
    )
    fast, slow = size[0] / median_seconds(mine), part[0] / median_seconds(theirs)
    work = f"GAUC of {size[0]:,} rows, {size[1]:,} users, rows/s"
    return Result(work, "sklearn, user by user", fast, slow, fast / slow, GAUC_BAR)


def ranking(sizes: Sizes, rounds: int) -> list[Result]:
    """Queries a second."""
    queries, rivals = make_queries(sizes.loop_queries), (metric_by_metric, one_sort)
    for rival in rivals:
        check(f"NDCG@{TOP}, MRR and Hit@1 of {sizes.loop_queries:,} queries", our_ranking(queries), rival(queries))
    mine, *theirs = take_turns(
        rounds,
        partial(measure, prepared, our_ranking, make_queries, (10,), (sizes.queries,)),
        *(partial(measure, prepared, rival, make_queries, (10,), (sizes.loop_queries,)) for rival in rivals),
    )
    fast = sizes.queries / median_seconds(mine)
    slow = [sizes.loop_queries / median_seconds(usages) for usages in theirs]
    work = f"NDCG@{TOP}, MRR, Hit@1 of {sizes.queries:,} x {CANDIDATES}, queries/s"
    return [
        Result(work, rival, fast, rate, fast / rate, RANKS_BAR)
        for rival, rate in zip(("argsort, row and metric at a time", "one argsort for all three"), slow, strict=True)
    ]


def _median_growth(usages: Sequence[Usage]) -> float:
    return median(usage.growth_mib for usage in usages)


def main() -> None:
    """Run all comparisons."""
    options = parser(__doc__.splitlines()[0]).parse_args()
    sizes = QUICK_SIZES if options.quick else SIZES
    results = [*pooled(sizes, options.rounds), by_user(sizes, options.rounds), *ranking(sizes, options.rounds)]
    report(results, options.json)


if __name__ == "__main__":
    main()
