"""A ranker of width 128, batches of whole timelines to train it on, both of any size of catalogue, and a training step of the library."""

from typing import cast

import jax
import numpy as np
from harness import Step

from tenrec_jax.data.batches import TimelineBatch, TimelineBatches
from tenrec_jax.models.blocks import EncoderConfig
from tenrec_jax.models.features import FeatureConfig, Vocabulary
from tenrec_jax.models.ranker import RankerConfig
from tenrec_jax.parameters import named
from tenrec_jax.timeline import Events, Profile, Timeline
from tenrec_jax.training.optimizers import Optimizer
from tenrec_jax.training.parallel import DataParallel
from tenrec_jax.training.tasks import RankingTask
from tenrec_jax.training.trainer import Task, compile_step

ACTIONS, CATEGORIES, GENDERS, AGES = 4, 100, 3, 10
WIDTH = 128


class SyntheticBatches:
    """Batches of whole timelines, in place of `TimelineBatches`, always with the same number of distinct items.

    Args:
        shape: timelines of a batch, and events of each.
        items, users: rows of their tables.
        distinct: items of a batch.
        steps_per_epoch: steps after which the same batches come again; 0 is never.
    """

    def __init__(self, shape: tuple[int, int], items: int, users: int, distinct: int, steps_per_epoch: int = 0) -> None:
        self._shape, self._items, self._users, self._distinct = shape, items, users, distinct
        self._different, self.steps_per_epoch = steps_per_epoch, steps_per_epoch or 1

    def __call__(self, step: int) -> TimelineBatch:
        random = np.random.default_rng(step % self._different if self._different else step)
        shape = self._shape
        # Every one of the distinct ids at least once.
        known = random.choice(self._items - 1, self._distinct, replace=False, shuffle=False).astype(np.int32) + 1
        others = random.integers(0, self._distinct, shape[0] * shape[1] - self._distinct)
        item_BT = random.permutation(np.concatenate([known, known[others]])).reshape(shape)
        action_BTA = (random.random((*shape, ACTIONS)) < 0.2).astype(np.int8)
        category_BT = random.integers(1, CATEGORIES, shape, dtype=np.int32)
        events = Events(item_BT, category_BT, action_BTA, np.ones(shape, bool))
        profile_BU = (random.integers(1, rows, (shape[0], 1), dtype=np.int32) for rows in (self._users, GENDERS, AGES))
        timeline = Timeline(Profile(*profile_BU), np.zeros((shape[0], 1), np.int32), events)
        return TimelineBatch(timeline, np.ones(shape, bool), np.zeros(shape, int), np.zeros((shape[0], 1), int))


def ranking_task(batches: SyntheticBatches, items: int, users: int, events: int, *, num_layers: int = 4) -> RankingTask:
    """The ranking stage of the library, for timelines of so many events; evaluations tell nothing."""
    return RankingTask(
        RankerConfig(FeatureConfig(max_length=events), EncoderConfig(num_layers, WIDTH, 4, 2 * WIDTH, unroll=True)),
        Vocabulary(users=users, items=items, genders=GENDERS, ages=AGES, categories=CATEGORIES, actions=ACTIONS),
        batches=cast(TimelineBatches, batches),
        hashed={},
        action_weights=[1.0] * ACTIONS,
        pairwise_weight=0.0,
        item_rate=np.full((items, ACTIONS), 0.2),
        user_rate=np.full((users, ACTIONS), 0.2),
        item_start=None,
        evaluate=lambda _: (0.0, {}),
    )


def training_step(task: Task, optimizer: Optimizer) -> Step:
    """A whole training step of the library, the batch's ids made unique on the host included; returns its loss."""
    parallel, parameters = DataParallel(), jax.jit(task.init)(jax.random.key(0))
    state = parallel.replicate(optimizer.init(named(parameters)), optimizer.divided)
    step_fn = compile_step(task, optimizer, parallel, like=parameters)

    def step(turn: int) -> float:
        nonlocal state
        batch = task.batch(turn)
        state, told = step_fn(state, parallel.split(batch.split), batch.shared, batch.ids, jax.random.key(turn))
        return float(parallel.read(jax.block_until_ready((state, told))[1]).loss.compute())

    return step
