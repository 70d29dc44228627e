"""Row-wise updates of an embedding table: against dense AdamW, against torch.optim.SparseAdam, as the table grows, and in a training.

    python experiments/benchmarks/tables.py [--json FILE] [--quick] [--rounds N] [--wall] [--only updates|training]

updates   All sides get the same unique ids and gradients, other ids in every step, so that rows come from memory and not from a cache;
          they take turns step by step (A B A B) in one process, and medians count. PyTorch's threads spin while they wait for each other,
          which a busy neighbour turns into seconds: the default is therefore CPU time on one core. `--wall` measures elapsed time on all
          cores, for a machine that does nothing else. What is left of growth is latency: rows of a larger table lie outside the caches
          and the page tables' own cache. On Linux the environment variable GLIBC_TUNABLES=glibc.malloc.hugetlb=1, set before Python
          starts, gives tables huge pages and takes away about half of it.
training  A ranker of 4 x 128 with 5 million items and as many users goes through the trainer, from its first weights to the result that
          is read back from a checkpoint, in a process of its own, on the same 10 batches again and again. Told are the elapsed time of a
          step (of the fastest 20) and of the checkpoint, the peak of the resident memory, and the loss. The checkpoint must hold all rows
          that no batch named as they were at first. The same training with 100,000 of each shows what does not grow with the tables. It
          takes 11 GB of memory and 6 GB of disk.

Bars: 30 times dense AdamW with 4,096 ids and 8 times with 18,000; level with SparseAdam.
"""

import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import WARM_UP, Clock, Result, Step, Usage, measure, median_milliseconds, report, start_clock, timed_parser
from timelines import SyntheticBatches, ranking_task

from tenrec_jax.parameters import named
from tenrec_jax.stages import METRICS
from tenrec_jax.training import tables
from tenrec_jax.training.checkpoints import Checkpoints
from tenrec_jax.training.metrics_writer import TIMINGS, read_lines
from tenrec_jax.training.optimizers import TrainState, make_optimizer
from tenrec_jax.training.parallel import DataParallel
from tenrec_jax.training.tables import TableOptimizerConfig
from tenrec_jax.training.tasks import RankingTask
from tenrec_jax.training.trainer import TrainConfig, fit

WIDTH, RATE = 64, 0.01
KINDS = (TableOptimizerConfig("rowwise_adagrad"), TableOptimizerConfig("lazy_adam", b2=0.999))


class Training(NamedTuple):
    """Rows of the item and of the user table, the shape of a batch, its distinct items, different batches, and how often they come."""

    rows: int
    shape: tuple[int, int]
    distinct: int
    batches: int
    epochs: int

    def task(self) -> RankingTask:
        """What is trained."""
        batches = SyntheticBatches(self.shape, self.rows, self.rows, self.distinct, self.batches)
        return ranking_task(batches, self.rows, self.rows, self.shape[1])


class Sizes(NamedTuple):
    """Rows of the table in the comparisons, rows between which it grows, (ids of a batch, times faster than dense AdamW) pairs, and rows of
    the tables that are trained: few and many."""

    rows: int
    grows: tuple[int, int]
    ids: tuple[tuple[int, float], ...]
    trained: tuple[Training, Training]


FULL = Sizes(
    1_000_000,
    (100_000, 3_000_000),
    ((4_096, 30.0), (18_000, 8.0)),
    (Training(100_000, (64, 120), 3_840, 10, 6), Training(5_000_000, (64, 120), 3_840, 10, 6)),
)
QUICK = Sizes(
    20_000,
    (5_000, 20_000),
    ((256, 0.0), (1_024, 0.0)),
    (Training(2_000, (4, 12), 24, 10, 2), Training(20_000, (4, 12), 24, 10, 2)),
)


class Batches:
    """Unique ids [P] and gradients of their rows [P, D], the same for all sides."""

    def __init__(self, rows: int, ids: int, steps: int) -> None:
        generator = np.random.default_rng(0)
        self.rows = rows
        self.ids = [np.sort(generator.choice(rows, ids, replace=False)).astype(np.int32) for _ in range(steps)]
        self.gradient_PD = generator.standard_normal((ids, WIDTH)).astype(np.float32)
        self.table_ND = generator.standard_normal((rows, WIDTH), np.float32)


def row_wise(config: TableOptimizerConfig, batches: Batches) -> Step:
    """Ours."""
    carry = jnp.array(batches.table_ND), tables.init(config, jnp.asarray(batches.table_ND))
    ids, gradient_PD = [jnp.asarray(ids_P) for ids_P in batches.ids], jnp.asarray(batches.gradient_PD)
    update = jax.jit(functools.partial(tables.update, config), donate_argnums=(0, 1))

    def step(turn: int) -> None:
        nonlocal carry
        carry = jax.block_until_ready(update(*carry, ids[turn], gradient_PD, RATE, turn))

    return step


def row_wise_with_gather(config: TableOptimizerConfig, batches: Batches) -> Step:
    """Ours, with reading the rows before; their gradient is that of half their squared length, which costs nothing."""
    carry = jnp.array(batches.table_ND), tables.init(config, jnp.asarray(batches.table_ND))
    ids = [jnp.asarray(ids_P) for ids_P in batches.ids]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def read_and_update(table_ND: jax.Array, state: tables.TableState, ids_P: jax.Array, turn: int) -> tuple:
        rows_PD = tables.gather(table_ND, state, ids_P)
        return tables.update(config, table_ND, state, ids_P, rows_PD, RATE, turn)

    def step(turn: int) -> None:
        nonlocal carry
        carry = jax.block_until_ready(read_and_update(*carry, ids[turn], turn))

    return step


def dense_adamw(batches: Batches) -> Step:
    """Rival: optax.adamw on the whole table, in place, with the gradient already dense."""
    adamw = optax.adamw(RATE, b2=0.999, weight_decay=0.0)
    table_ND = jnp.array(batches.table_ND)
    carry = table_ND, adamw.init(table_ND)
    gradient_ND = jnp.zeros(table_ND.shape).at[batches.ids[0]].set(batches.gradient_PD)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(table_ND: jax.Array, state: optax.OptState, gradient_ND: jax.Array) -> tuple:
        updates, state = adamw.update(gradient_ND, state, table_ND)
        return optax.apply_updates(table_ND, updates), state

    def step(_: int) -> None:
        nonlocal carry
        carry = jax.block_until_ready(update(*carry, gradient_ND))

    return step


def sparse_adam(batches: Batches) -> Step:
    """Rival: torch.optim.SparseAdam with a gradient that is already coalesced."""
    import torch

    weight = torch.nn.Parameter(torch.from_numpy(batches.table_ND.copy()))
    optimizer = torch.optim.SparseAdam([weight], lr=RATE)
    values = torch.from_numpy(batches.gradient_PD)
    gradients = [
        torch.sparse_coo_tensor(
            torch.from_numpy(ids_P.astype(np.int64))[None],
            values,
            weight.shape,
            is_coalesced=True,
            check_invariants=True,
        )
        for ids_P in batches.ids
    ]

    def step(turn: int) -> None:
        weight.grad = gradients[turn]
        optimizer.step()

    return step


def update_alone(sizes: Sizes, rounds: int, clock: Clock) -> list[Result]:
    """One update of one table, by both of our rules and both rivals."""
    results = []
    for ids, bar in sizes.ids:
        batches = Batches(sizes.rows, ids, WARM_UP + rounds)
        sides = [*(row_wise(config, batches) for config in KINDS), dense_adamw(batches), sparse_adam(batches)]
        *ours, dense, sparse = median_milliseconds(sides, rounds, clock)
        for config, mine in zip(KINDS, ours, strict=True):
            work = f"ms, {config.kind}, {sizes.rows:,} x {WIDTH}, {ids:,} ids"
            results += [
                Result(work, "dense optax.adamw, donated", mine, dense, dense / mine, bar),
                Result(work, "torch.optim.SparseAdam", mine, sparse, sparse / mine, 1.0),
            ]
    return results


def growth(sizes: Sizes, rounds: int, clock: Clock) -> list[Result]:
    """Reading the rows and updating them in a large table against a small one; no bar, since a step is more than this."""
    results = []
    small, large = sizes.grows
    for ids, _ in sizes.ids:
        batches = [Batches(rows, ids, WARM_UP + rounds) for rows in (large, small)]
        for config in KINDS:
            sides = [row_wise_with_gather(config, batch) for batch in batches]
            ours, theirs = median_milliseconds(sides, rounds, clock)
            work = f"ms, {config.kind} and gather, {large:,} x {WIDTH}, {ids:,} ids"
            results.append(Result(work, f"itself at {small:,} rows", ours, theirs, theirs / ours, 0.0))
    return results


def updates(sizes: Sizes, rounds: int, clock: Clock) -> list[Result]:
    """Of one table."""
    return [*update_alone(sizes, rounds, clock), *growth(sizes, rounds, clock)]


def prepared_training(training: Training, folder: Path) -> Callable[[], object]:
    """A whole training into a folder, as its own process runs it."""
    task = training.task()
    config = TrainConfig(epochs=training.epochs, evaluate_every=training.epochs)
    return lambda: fit(task, config, workdir=folder, seed=0, parallel=DataParallel())


class Trained(NamedTuple):
    """What is told of a training: its process, milliseconds of a step, seconds of all checkpoints, their MiB, the mean loss of the first
    and of the last batches, and the MiB of tables and their states."""

    usage: Usage
    step: float
    checkpoint: float
    checkpoint_mib: float
    loss: tuple[float, float]
    tables_mib: float


def trained(training: Training) -> Trained:
    """Train, and check what is on disk."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        usage = measure(prepared_training, training, folder)
        timings = read_lines(folder / TIMINGS)
        rates = [line["steps_per_second"] for line in timings if "steps_per_second" in line]
        losses = [line["loss"] for line in read_lines(folder / METRICS) if "loss" in line]
        return Trained(
            usage,
            1e3 / max(rates),
            timings[-1]["checkpoint_share"] * usage.seconds,
            sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file()) / 2**20,
            (losses[0], losses[-1]),
            checked_tables(training, folder),
        )


def checked_tables(training: Training, folder: Path) -> float:
    """The MiB of the tables in a checkpoint and of their states; a RuntimeError if a row has changed that no batch named."""
    task = training.task()
    config = TrainConfig(epochs=training.epochs)
    optimizer = make_optimizer(config.optimizer, training.epochs * training.batches, task.tables)
    init_key = jax.random.split(jax.random.key(0))[0]

    def begin(key: jax.Array) -> TrainState:
        return optimizer.init(named(task.init(key)))

    parallel = DataParallel()
    like, origin = parallel.shapes(jax.eval_shape(begin, init_key)), {"stage": task.name, "seed": 0}
    found = Checkpoints(folder / "checkpoints" / task.name, parallel, origin).latest(like)
    assert found
    kept = found[0].tables, found[0].table_states
    first = jax.jit(begin)(init_key)
    batches = [task.batch(step).ids for step in range(training.batches)]
    for name, space in task.tables.items():
        same_N = (np.asarray(kept[0][name]) == np.asarray(first.tables[name])).all(1)
        touched = np.unique(np.concatenate([ids[space] for ids in batches]))
        same_N[touched[touched < len(same_N)]] = True
        if not same_N.all():
            raise RuntimeError(f"{name}: rows changed that no batch named: {np.flatnonzero(~same_N)[:10]}")
    return sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) / 2**20


def training(sizes: Sizes, rounds: int, clock: Clock) -> list[Result]:
    """Of two large tables, measured once."""
    few, many = (trained(each) for each in sizes.trained)
    small, large = (each.rows for each in sizes.trained)
    work = f"{large:,} items and users, 4 x 128"
    steps = sizes.trained[1].epochs * sizes.trained[1].batches
    sys.stdout.write(
        f"{work}: {steps} steps in {many.usage.seconds:.0f} s, {many.checkpoint:.0f} of them to write {many.checkpoint_mib:.0f} MiB\n"
    )
    peaks = many.usage.peak_mib, few.usage.peak_mib
    grown = peaks[0] - peaks[1], many.tables_mib - few.tables_mib
    first, last = many.loss
    return [
        Result(f"ms, a step, {work}", f"itself at {small:,}", many.step, few.step, few.step / many.step, 0.0),
        Result(
            f"peak MiB, {work}", "tables and their state", peaks[0], many.tables_mib, many.tables_mib / peaks[0], 0.0
        ),
        Result(f"MiB more than with {small:,}", "tables and their state", *grown, grown[1] / grown[0], 0.0),
        Result(f"loss of the last batches, {work}", "of the first", last, first, first / last, 0.0),
    ]


PARTS = {"updates": updates, "training": training}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    options = timed_parser(
        "Row-wise updates of an embedding table against dense and sparse optimisers, and in a training."
    )
    options.add_argument("--only", choices=PARTS, help="one part alone")
    options.set_defaults(rounds=21)
    chosen = options.parse_args(arguments)
    sizes, rounds = (QUICK, 3) if chosen.quick else (FULL, chosen.rounds)
    clock = start_clock(wall=chosen.wall)
    parts = [PARTS[chosen.only]] if chosen.only else PARTS.values()
    report([result for part in parts for result in part(sizes, rounds, clock)], chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
