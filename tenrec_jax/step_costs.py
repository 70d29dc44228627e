"""What a training step costs, told by its compiled program. Shapes are enough: no log is read and no model is allocated."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from tenrec_jax.config import RankingConfig, RetrievalConfig, RunConfig
from tenrec_jax.data.batches import TimelineBatch
from tenrec_jax.data.sampling import NegativeSampler, UniformItems, WholeCatalogue
from tenrec_jax.models.blocks import NO_REMATERIALISATION
from tenrec_jax.models.features import Vocabulary
from tenrec_jax.models.hashing import HashedIds
from tenrec_jax.parameters import named
from tenrec_jax.run_data import refuse_uneven_micro_batches
from tenrec_jax.timeline import Events, Profile, Timeline
from tenrec_jax.training.id_spaces import ITEM, USER
from tenrec_jax.training.optimizers import make_optimizer
from tenrec_jax.training.parallel import DataParallel
from tenrec_jax.training.tasks import RankingTask, RetrievalTask
from tenrec_jax.training.trainer import Task, compile_step

DEFAULT_POLICY = "nothing_saveable"
StageConfig = RetrievalConfig | RankingConfig


class Program(NamedTuple):
    """A step to be compiled: the stage's name, its configuration and the rematerialisation in place of the configured one."""

    stage: str
    config: StageConfig
    remat: str


class StepCost(NamedTuple):
    """Of a step, on one device.

    Attributes:
        flops: floating-point operations, recomputed ones counted again.
        argument_bytes: the state and the batch. output_bytes: the state after the step and its metrics.
        temporary_bytes: beside them; activations above all.
        peak_bytes: all of them, where what is updated in place counts once.
    """

    flops: float
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    peak_bytes: int


class ExampleBatches:
    """Batches of a configuration's shape, in place of `TimelineBatches`: rows of one timeline of `max_length` events each."""

    steps_per_epoch = 1

    def __init__(self, config: StageConfig, vocabulary: Vocabulary, devices: int) -> None:
        length = config.model.features.max_length
        self.shape = max(1, config.events_per_batch // (length * devices)) * devices, length
        self._vocabulary = vocabulary

    def __call__(self, step: int) -> TimelineBatch:
        nothing_BT, all_BT = np.zeros(self.shape, np.int32), np.ones(self.shape, bool)
        action_BTA, nothing_BU = np.zeros((*self.shape, self._vocabulary.actions), np.int8), nothing_BT[:, :1]
        events = Events(nothing_BT, nothing_BT, action_BTA, all_BT)
        timeline = Timeline(Profile(nothing_BU, nothing_BU, nothing_BU), nothing_BU, events)
        return TimelineBatch(timeline, all_BT, nothing_BT, nothing_BU)


def programs(config: RunConfig) -> list[Program]:
    """The steps of all stages, each without rematerialisation and with it: by the configured policy, or else by `DEFAULT_POLICY`."""
    stages: dict[str, StageConfig] = {"retrieval": config.retrieval}
    if config.ranking.enabled:
        stages["ranking"] = config.ranking
    found = []
    for name, stage in stages.items():
        policy = stage.model.encoder.remat
        found.append(Program(name, stage, NO_REMATERIALISATION))
        found.append(Program(name, stage, DEFAULT_POLICY if policy == NO_REMATERIALISATION else policy))
    return found


def step_cost(program: Program, vocabulary: Vocabulary, parallel: DataParallel) -> StepCost:
    """Compile a step on `ExampleBatches`.

    XLA counts the body of a loop once, so operations are those of the same step with its layers unrolled and without micro-batches, before
    the compiler optimises them. Memory is that of the step as it would run.

    Raises:
        UserError: the batch cannot be divided into micro-batches.
    """
    memory: Any = _lowered(program, vocabulary, parallel).compile().memory_analysis()
    train = dataclasses.replace(program.config.train, accumulate=1)
    without_loops = program._replace(config=dataclasses.replace(program.config, train=train))
    counted: Any = _lowered(without_loops, vocabulary, parallel, unroll=True).cost_analysis()
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return StepCost(counted["flops"], *sizes, peak_bytes=sum(sizes) - memory.alias_size_in_bytes)


def _lowered(program: Program, vocabulary: Vocabulary, parallel: DataParallel, **encoder: Any) -> jax.stages.Lowered:
    config: Any = program.config
    encoder_config = dataclasses.replace(config.model.encoder, remat=program.remat, **encoder)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder_config))
    batches = ExampleBatches(config, vocabulary, parallel.size)
    refuse_uneven_micro_batches(program.stage, config, batches.shape[0] // parallel.size)
    task = _task(config, vocabulary, batches)
    train = config.train
    shards = train.shards(parallel.size)
    optimizer = make_optimizer(
        train.optimizer, 1, task.tables, train.average_decay, shards=shards, rate_factors=task.rate_factors
    )
    parameters = jax.eval_shape(task.init, jax.random.key(0))
    state = jax.eval_shape(optimizer.init, named(parameters))
    batch, key = jax.eval_shape(lambda: (task.batch(0), jax.random.key(0)))
    # The body on a device is the same under pmap, whose arrays would have one axis more.
    mesh = DataParallel(parallel.devices, "shard_map")
    step_fn = compile_step(task, optimizer, mesh, like=parameters, accumulate=train.accumulate)
    return step_fn.lower(state, *batch, key)


def _task(config: StageConfig, vocabulary: Vocabulary, batches: ExampleBatches) -> Task:
    def evaluate(_: Any) -> tuple[float, dict[str, float]]:
        raise NotImplementedError("an example is not trained")

    rows = {ITEM: vocabulary.items, USER: vocabulary.users}
    tables = config.model.features.hashed_tables
    hashed = {space: HashedIds.of(np.arange(rows[space]), table) for space, table in tables.items()}
    common: dict[str, Any] = {"batches": batches, "hashed": hashed, "item_start": None, "evaluate": evaluate}
    if isinstance(config, RetrievalConfig):
        items = UniformItems(np.arange(vocabulary.items, dtype=np.int32), vocabulary.items)
        whole = config.loss == "softmax"
        return RetrievalTask(
            config.model,
            vocabulary,
            negatives=WholeCatalogue(items) if whole else NegativeSampler(items, config.negatives, seed=0),
            in_batch=items,
            category=np.zeros(vocabulary.items, np.int32),
            log_q=config.log_q,
            label_smoothing=config.label_smoothing,
            **common,
        )
    return RankingTask(
        config.model,
        vocabulary,
        action_weights=config.action_weights[: vocabulary.actions],
        pairwise_weight=config.pairwise_weight,
        item_rate=np.full((vocabulary.items, vocabulary.actions), 0.5),
        user_rate=np.full((vocabulary.users, vocabulary.actions), 0.5),
        **common,
    )
