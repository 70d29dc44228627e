"""Row-wise updates of an embedding table: against dense AdamW, against torch.optim.SparseAdam, and as the table grows.

    python experiments/benchmarks/tables.py [--json FILE] [--quick] [--rounds N] [--wall]

All sides get the same unique ids and gradients, other ids in every step, so that rows come from memory and not from a cache; they take
turns step by step (A B A B) in one process, and medians count. PyTorch's threads spin while they wait for each other, which a busy
neighbour turns into seconds: the default is therefore CPU time on one core. `--wall` measures elapsed time on all cores, for a machine that
does nothing else.

What is left of growth is latency: rows of a larger table lie outside the caches and the page tables' own cache. On Linux the environment
variable GLIBC_TUNABLES=glibc.malloc.hugetlb=1, set before Python starts, gives tables huge pages and takes away about half of it.

Bars: 30 times dense AdamW with 4,096 ids and 8 times with 18,000; level with SparseAdam.
"""

import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import WARM_UP, Clock, Result, Step, median_milliseconds, report, start_clock, timed_parser

from tenrec_jax.training import tables
from tenrec_jax.training.tables import TableOptimizerConfig

WIDTH, RATE = 64, 0.01
KINDS = (TableOptimizerConfig("rowwise_adagrad"), TableOptimizerConfig("lazy_adam", b2=0.999))


class Sizes(NamedTuple):
    """Rows of the table in the comparisons, rows between which it grows, and (ids of a batch, times faster than dense AdamW) pairs."""

    rows: int
    grows: tuple[int, int]
    ids: tuple[tuple[int, float], ...]


FULL = Sizes(1_000_000, (100_000, 3_000_000), ((4_096, 30.0), (18_000, 8.0)))
QUICK = Sizes(20_000, (5_000, 20_000), ((256, 0.0), (1_024, 0.0)))


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    options = timed_parser("Row-wise updates of an embedding table against dense and sparse optimisers.")
    options.set_defaults(rounds=21)
    chosen = options.parse_args(arguments)
    sizes, rounds = (QUICK, 3) if chosen.quick else (FULL, chosen.rounds)
    clock = start_clock(wall=chosen.wall)
    report([*update_alone(sizes, rounds, clock), *growth(sizes, rounds, clock)], chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
