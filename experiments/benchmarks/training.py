"""Training steps: against the original's way of training, against the same mathematics in PyTorch, and as the catalogue grows.

    python experiments/benchmarks/training.py [--json FILE] [--quick] [--rounds N] [--wall] [--only labels|mathematics|growth]

labels       Logged exposures learned from per second. Ours reads timelines of 120 events, two tokens an exposure; the rival encodes a
             user, 64 events and 128 candidates for every logged row, as the original does. Both update all they learn from, tables
             included; ours also makes the ids of the batch unique, on the host.
mathematics  One step of the original's joint ranker: forward, backward, clipping by the global norm and AdamW, from the same weights on the
             same batch, with the same losses. Ours takes slices of the batch in turn and sums their gradients, which changes nothing but
             the order of summation and keeps the activations in the cache. The share of the peak is the FLOPs of the matrix products of the
             plain formula, over what the best matrix product of either library reaches in the same minutes.
growth       One whole training step as the catalogue grows, with as many distinct ids in the batch.

The rival is `torch_rival.py`, eager and through torch.compile, with the fused AdamW; the faster one counts. Tables are small (1,000 rows;
10,000 for `labels`): with large ones the rival would pay for a dense AdamW over all rows.

Bars: 50 times the labels; 1.4, 1.3 and 1.05 times the speed at 2 x 64, 4 x 128 and 12 x 512; 3 million rows cost at most 1.2 times 100,000.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch_rival
from flax import nnx
from harness import WARM_UP, Clock, Result, Step, median_milliseconds, report, start_clock, timed_parser
from timelines import ACTIONS, AGES, CATEGORIES, GENDERS, SyntheticBatches, ranking_task, training_step

from tenrec_jax.interop.original import load_ranker
from tenrec_jax.interop.original_models import RankerInputs
from tenrec_jax.models.losses import action_losses
from tenrec_jax.training.optimizers import OptimizerConfig, make_optimizer

WAYS = ("torch, eager", "torch.compile")


class Joint(NamedTuple):
    """A joint batch: encoder, rows, tokens, rows that one slice of ours holds, and the bar."""

    layers: int
    width: int
    heads: int
    rows: int
    history: int
    candidates: int
    slice: int
    bar: float

    @property
    def tokens(self) -> int:
        """Of the batch."""
        return self.rows * (1 + self.history + self.candidates)

    @property
    def flops(self) -> float:
        """Of the matrix products of a step: two a weight and token forward, four backward."""
        weights = self.layers * self.width * (4 * self.width + 2 * 2 * self.width + 2 * self.heads)
        return 6.0 * weights * self.tokens


class Sizes(NamedTuple):
    """What to measure.

    Attributes:
        joint: batches for the same mathematics.
        rival: the original's batch for `labels`.
        timelines, events: of a batch of ours; items: of the catalogue.
        grows: rows of the catalogue between which it grows.
    """

    joint: tuple[Joint, ...]
    rival: Joint
    timelines: int
    events: int
    items: int
    grows: tuple[int, int]


FULL = Sizes(
    (
        Joint(2, 64, 4, 256, 64, 32, 8, 1.4),
        Joint(4, 128, 4, 64, 10, 128, 8, 1.3),
        Joint(12, 512, 8, 4, 10, 128, 4, 1.05),
    ),
    Joint(4, 128, 4, 32, 64, 128, 8, 50.0),
    timelines=64,
    events=120,
    items=10_000,
    grows=(100_000, 3_000_000),
)
QUICK = Sizes(
    (Joint(2, 64, 4, 16, 8, 8, 8, 0.0),),
    Joint(4, 128, 4, 2, 8, 16, 2, 0.0),
    timelines=4,
    events=24,
    items=500,
    grows=(2_000, 8_000),
)


def joint_batch(joint: Joint, items: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs without padding, by name, and labels."""
    random = np.random.default_rng(0)

    def ids(rows: int, *shape: int) -> np.ndarray:
        return random.integers(1, rows, shape)

    inputs = {
        "user_id": ids(1_000, joint.rows),
        "history_item_ids": ids(items, joint.rows, joint.history),
        "candidate_item_ids": ids(items, joint.rows, joint.candidates),
        "gender": ids(GENDERS, joint.rows),
        "age": ids(AGES, joint.rows),
        "candidate_categories": ids(CATEGORIES, joint.rows, joint.candidates),
    }
    label_BCA = random.random((joint.rows, joint.candidates, ACTIONS)) < 0.2
    return inputs, label_BCA.astype(np.float32)


def rival_ranker(joint: Joint, items: int) -> torch_rival.Ranker:
    """The rival with fresh weights, the same ones every time."""
    torch.manual_seed(0)
    return torch_rival.Ranker(
        torch_rival.Shape(
            layers=joint.layers,
            width=joint.width,
            heads=joint.heads,
            hidden=2 * joint.width,
            users=1_000,
            items=items,
            categories=CATEGORIES,
            positions=max(joint.history, joint.candidates),
        )
    )


def rival_step(joint: Joint, items: int, way: str) -> Step:
    """A training step of the rival; returns the loss before it."""
    inputs, label_BCA = joint_batch(joint, items)
    tensors = torch_rival.Inputs(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    step = torch_rival.training_step(
        rival_ranker(joint, items), tensors, torch.from_numpy(label_BCA), compiled=way == "torch.compile"
    )
    return lambda _: step()


def joint_step(joint: Joint, items: int) -> Step:
    """The same step of ours, from the same weights."""
    state = {name: leaf.detach().numpy() for name, leaf in rival_ranker(joint, items).state_dict().items()}
    # Part of every checkpoint of the original, though no logit depends on it.
    state["action_embedding.weight"] = np.zeros((ACTIONS + 1, joint.width), np.float32)
    ranker = load_ranker(state, num_heads=joint.heads)
    ranker.encoder.config = dataclasses.replace(ranker.encoder.config, unroll=True)
    graphdef, *states = nnx.split(ranker, nnx.Param, ...)
    parameters, positions = states
    inputs, label_BCA = joint_batch(joint, items)
    batch = RankerInputs(**{name: jnp.asarray(array, jnp.int32) for name, array in inputs.items()})
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.01))

    def total(parameters: nnx.State, rows: tuple[RankerInputs, jax.Array]) -> jax.Array:
        logit_BCA = nnx.merge(graphdef, parameters, positions).forward(rows[0])["logits"]
        losses_A = action_losses(logit_BCA, rows[1], jnp.ones(rows[1].shape[:2], bool))
        # Divided here, not in the gradient, which may be larger than the activations.
        return losses_A.sum() / label_BCA.size

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(parameters: nnx.State, state: optax.OptState, batch: RankerInputs, label_BCA: jax.Array) -> tuple:
        loss, gradient = in_slices(total, parameters, (batch, label_BCA), joint.rows // joint.slice)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    carry, labels = (parameters, optimizer.init(parameters)), jnp.asarray(label_BCA)

    def step(_: int) -> float:
        nonlocal carry
        *carry, loss = update(*carry, batch, labels)
        return float(jax.block_until_ready((carry, loss))[1])

    return step


def in_slices(total: Callable, parameters: nnx.State, batch: Any, slices: int) -> tuple[jax.Array, nnx.State]:
    """A sum over a batch and its gradient, one slice of the rows after the other."""
    if slices == 1:
        return jax.value_and_grad(total)(parameters, batch)

    def add(sums: Any, rows: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(total)(parameters, rows)), None

    sliced = jax.tree.map(lambda x: x.reshape(slices, -1, *x.shape[1:]), batch)
    nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters)
    return jax.lax.scan(add, nothing, sliced)[0]


def timeline_step(sizes: Sizes, items: int, distinct: int) -> Step:
    """A training step of the library: row-wise updates of the tables, and the ids of the batch made unique on the host."""
    batches = SyntheticBatches((sizes.timelines, sizes.events), items, 1_000, distinct)
    task = ranking_task(batches, items, 1_000, sizes.events)
    return training_step(task, make_optimizer(OptimizerConfig(), 1_000, task.tables))


def labels(sizes: Sizes, rounds: int, clock: Clock) -> list[Result]:
    """Exposures learned from per second."""
    distinct = min(sizes.items // 2, sizes.timelines * sizes.events // 2)
    ours = timeline_step(sizes, sizes.items, distinct)
    rivals = [rival_step(sizes.rival, sizes.items, way) for way in WAYS]
    mine, *theirs = median_milliseconds([ours, *rivals], rounds, clock)
    rate = 1e3 * sizes.timelines * sizes.events / mine
    rival_rate, way = max((1e3 * sizes.rival.rows / each, way) for each, way in zip(theirs, WAYS, strict=True))
    work = f"exposures/s, 4 x 128, timelines of {sizes.events}"
    return [Result(work, f"the original's way, {way}", rate, rival_rate, rate / rival_rate, sizes.rival.bar)]


def mathematics(sizes: Sizes, rounds: int, clock: Clock) -> list[Result]:
    """The same step on the same batch, and how near it comes to the peak."""
    results = []
    for joint in sizes.joint:
        sides = [joint_step(joint, 1_000), *(rival_step(joint, 1_000, way) for way in WAYS)]
        _check_losses(sides)
        mine, *theirs = median_milliseconds([*sides, *_products(sizes is QUICK)], rounds, clock)
        theirs, products = theirs[: len(WAYS)], theirs[len(WAYS) :]
        best, way = min(zip(theirs, WAYS, strict=True))
        peak = 2.0 * _product_size(sizes is QUICK) ** 3 / min(products)
        work = f"ms, {joint.layers} x {joint.width}, {joint.tokens:,} tokens"
        others = ", ".join(f"{way} {each:.0f} ms" for each, way in zip(theirs, WAYS, strict=True))
        sys.stdout.write(f"{work}: ours {mine:.0f} ms, {others}; peak {peak / 1e6:.0f} GFLOP/s\n")
        results += [
            Result(work, way, mine, best, best / mine, joint.bar),
            Result(f"share of peak, {work}", way, *_shares(joint.flops / peak, mine, best), 0.6 if joint.bar else 0.0),
        ]
    return results


def _shares(least: float, mine: float, theirs: float) -> tuple[float, float, float]:
    """Of both, and ours again as what the bar is for."""
    return least / mine, least / theirs, least / mine


def _check_losses(sides: Sequence[Step]) -> None:
    """One step each: all sides must see the same loss, else they do not do the same."""
    found = [[float(step(turn)) for turn in range(WARM_UP)] for step in sides]
    if not np.allclose(found, found[0], rtol=1e-4):
        raise RuntimeError(f"the sides' losses differ: {found}")


def _product_size(quick: bool) -> int:
    return 256 if quick else 1536


def _products(quick: bool) -> list[Step]:
    """A large product of matrices in both libraries."""
    size = _product_size(quick)
    x = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    array, tensor = jnp.asarray(x), torch.from_numpy(x)
    product = jax.jit(jnp.matmul)
    return [lambda _: product(array, array).block_until_ready(), lambda _: tensor @ tensor]


def growth(sizes: Sizes, rounds: int, clock: Clock) -> list[Result]:
    """One whole training step with a large catalogue and with a small one."""
    small, large = sizes.grows
    distinct = min(small // 2, sizes.timelines * sizes.events // 2)
    theirs, ours = median_milliseconds([timeline_step(sizes, rows, distinct) for rows in (small, large)], rounds, clock)
    work = f"ms, whole step, {large:,} x 128 rows, {distinct:,} distinct (at most 1.2x)"
    return [Result(work, f"itself at {small:,}", ours, theirs, theirs / ours, 1 / 1.2 if sizes is FULL else 0.0)]


PARTS = {"labels": labels, "mathematics": mathematics, "growth": growth}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    options = timed_parser(
        "Training steps against the original's way, the same mathematics in PyTorch, and a growing catalogue."
    )
    options.add_argument("--only", choices=PARTS, help="one part alone")
    options.set_defaults(rounds=9)
    chosen = options.parse_args(arguments)
    sizes, rounds = (QUICK, 2) if chosen.quick else (FULL, chosen.rounds)
    clock = start_clock(wall=chosen.wall)
    parts = [PARTS[chosen.only]] if chosen.only else PARTS.values()
    report([result for part in parts for result in part(sizes, rounds, clock)], chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
