"""The training loop, the same for both stages.

Resume rules, which the code below obeys:

1. Batches and dropout keys are functions of (seed, step), so a checkpoint holds no iterator and no key.
2. A checkpoint is written after every evaluation, with the parameters, the optimiser's state and where selection stands.
3. A run that finds a checkpoint goes on after its step; lines of `metrics.jsonl` beyond that step are dropped, since they come again.
   Averages are flushed before a checkpoint, so they come again the same.
4. The result is the best evaluated step's parameters, read back from its checkpoint.
5. Of several processes, each assembles its rows of a batch and all write a checkpoint together, in a folder that all can reach. The first
   alone evaluates and writes metrics; the others take its selection value, so that all stop at the same step.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from clu.metrics import Collection
from flax import nnx

from tenrec_jax.parameters import assembled, named
from tenrec_jax.training.checkpoints import Checkpoints, Progress
from tenrec_jax.training.optimizers import Named, Optimizer, OptimizerConfig, TrainState, make_optimizer
from tenrec_jax.training.parallel import AXIS, DataParallel
from tenrec_jax.training.train_log import TrainLog, step_metrics


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train.

    Attributes:
        epochs: passes over the training timelines, at most.
        evaluate_every: epochs between evaluations on the validation rows.
        patience: evaluations without a new best after which training stops; 0 never stops early.
        average_decay: decay of the moving average of the parameters that is evaluated and kept; 0 takes the latest. See `Optimizer`.
        table_placement: "replicated" has all embedding tables on every device. "row_sharded" divides their rows, with what the optimiser
            and the moving average keep of them, over the devices: n devices hold tables of n times the size, and sum the rows of a batch
            over the devices in every step. The results are the same. Evaluation still gathers whole tables.
        accumulate: micro-batches into which each device splits its rows of a batch, one after the other, to hold the activations of one at
            a time. The update is that of the whole batch, but for what depends on more than a row: in-batch negatives are those of the
            micro-batch (over all devices), and dropout and pairs are drawn anew in each.
        optimizer: how the parameters move.
    """

    epochs: int
    evaluate_every: int = 1
    patience: int = 0
    average_decay: float = 0.0
    table_placement: Literal["replicated", "row_sharded"] = "replicated"
    accumulate: int = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(f"accumulate is {self.accumulate}; a batch has at least 1 micro-batch")

    def shards(self, devices: int) -> int:
        """Devices, of so many, over which the rows of embedding tables are divided."""
        return devices if self.table_placement == "row_sharded" else 1


class Batch(NamedTuple):
    """One step's arrays: `split` is divided over the devices by its leading axis, `shared` and `ids` are the same on all.

    `ids` are the unique ids [P] of each id space in the whole batch; the ids within `split` and `shared` are places among them.
    """

    split: Any
    shared: Any
    ids: dict[str, Any]


class LossSum(NamedTuple):
    """A loss as a sum over a device's examples, so that the mean over all devices is exact."""

    total: jax.Array
    examples: jax.Array


class Task(Protocol):
    """What the loop needs to know of a stage.

    Attributes:
        name: of the stage.
        steps_per_epoch: steps of one pass over the training rows.
        tables: id space of each embedding table, by parameter name.
        labels_per_example: labels that an example of `LossSum` teaches.
    """

    name: str
    steps_per_epoch: int
    tables: dict[str, str]
    labels_per_example: int

    def init(self, key: jax.Array) -> nnx.State:
        """Fresh parameters."""

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The host's arrays of one step, a pure function of it; of `split`, one process's stretch of the rows."""

    def loss(self, parameters: nnx.State, batch: Batch, key: jax.Array) -> LossSum:
        """One device's loss; may gather over the axis `AXIS`. Tables hold the rows of `batch.ids` alone."""

    def evaluate(self, parameters: nnx.State) -> tuple[float, dict[str, float]]:
        """The selection metric on the validation rows, larger is better, and all metrics to write down."""


class FitResult(NamedTuple):
    """The best parameters, the step they come from, the steps run in all, and the seconds that this process spent."""

    parameters: nnx.State
    best_step: int
    steps: int
    seconds: float


def fit(task: Task, config: TrainConfig, *, workdir: Path, seed: int, parallel: DataParallel) -> FitResult:
    """Train a stage, or go on with it.

    Args:
        task: the stage.
        config: how long and how.
        workdir: of the run; checkpoints go to `checkpoints/<task.name>`.
        seed: of the parameters and of dropout.
        parallel: devices to run on.

    Returns:
        The parameters of the best evaluation.
    """
    began = time.perf_counter()
    steps = config.epochs * task.steps_per_epoch
    shards, row_sharded = config.shards(parallel.size), config.table_placement == "row_sharded"
    optimizer = make_optimizer(config.optimizer, steps, task.tables, config.average_decay, shards)
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    parameters = jax.eval_shape(task.init, init_key)

    def begin(key: jax.Array) -> TrainState:
        return optimizer.init(named(task.init(key)))

    like = parallel.shapes(jax.eval_shape(begin, init_key), optimizer.divided)
    folder = workdir / "checkpoints" / task.name
    checkpoints = Checkpoints(folder, resize=row_sharded)
    restored = checkpoints.latest(like)
    if restored is None:
        # Made where it is to lie: no device holds the whole of what is divided.
        places = jax.tree.map(lambda x: x.sharding, like)
        restored = jax.jit(begin, out_shardings=places)(init_key), Progress(0, 0, float("-inf"), 0)
    step_fn = compile_step(task, optimizer, parallel, like=parameters, accumulate=config.accumulate)
    replicated, progress = parallel.replicate(restored[0], optimizer.divided), restored[1]
    del restored
    log = TrainLog(
        workdir,
        task.name,
        labels_per_example=task.labels_per_example,
        steps=steps,
        progress=progress,
        parallel=parallel,
    )
    for step, batch, blocked in _prefetched(task, parallel, progress.step, steps):
        if _stopped_early(config, progress):
            break
        log.waited(blocked)
        replicated, told = step_fn(replicated, *batch, jax.random.fold_in(dropout_key, step))
        log.add(told)
        if _evaluates_after(step, config, task):
            log.end_window()
            state = parallel.unreplicate(replicated, optimizer.divided)
            with log.spending_on("evaluation"):
                value, metrics = _evaluated(task, optimizer, parallel, state, like=parameters)
            progress = progress.after(step + 1, value)
            log.evaluated(progress, metrics)
            with log.spending_on("checkpoint"):
                checkpoints.save(state, progress, value)
            del state
    with log.spending_on("checkpoint"):
        checkpoints.close()
    log.close()
    del replicated  # room for the state that is read back
    best, _ = Checkpoints(folder, resize=row_sharded).restore(progress.best_step, like)
    best_parameters = whole_parameters(best, optimizer, parallel, like=parameters)
    return FitResult(best_parameters, progress.best_step, progress.step, time.perf_counter() - began)


def compile_step(
    task: Task, optimizer: Optimizer, parallel: DataParallel, like: nnx.State, *, accumulate: int = 1
) -> jax.stages.Wrapped:
    """The step of a task: (replicated state, split batch, shared batch, ids, key) -> (state, `step_metrics`), the same on every device.

    Args:
        task, optimizer, parallel: what, how and where.
        like: parameters of the task, for their structure.
        accumulate: see `TrainConfig`.
    """

    def step(
        state: TrainState, split: Any, shared: Any, ids: dict[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, Collection]:
        rows = optimizer.rows(state, ids)

        def total(dense: Named, rows: Named, split: Any, key: jax.Array) -> LossSum:
            return task.loss(assembled(like, dense | rows), Batch(split, shared, ids), key)

        def differentiate(split: Any, key: jax.Array) -> tuple[LossSum, tuple[Named, Named]]:
            (loss, examples), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
                state.dense, rows, split, key
            )
            return LossSum(loss, examples), gradients

        key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        sums = _over_micro_batches(differentiate, split, key, accumulate)
        (loss, examples), gradients = jax.lax.psum(sums, AXIS)
        examples = jnp.maximum(examples, 1)
        rates = optimizer.learning_rates(state.step)
        state, norms = optimizer.update(state, ids, *jax.tree.map(lambda x: x / examples, gradients))
        return state, step_metrics(loss, examples, norms, rates)

    return parallel.compile(step, broadcast=(2, 3, 4), divided=optimizer.divided)


def whole_parameters(state: TrainState, optimizer: Optimizer, parallel: DataParallel, like: nnx.State) -> nnx.State:
    """The parameters to evaluate and to keep, on this process's first device. All processes call it.

    Args:
        state: as `DataParallel.unreplicate` returns it.
        optimizer, parallel: of the state.
        like: parameters of the task, for their structure and shapes.
    """
    leaves, shapes = parallel.local(optimizer.parameters(state)), named(like)
    padded = [name for name in leaves if leaves[name].shape != shapes[name].shape]
    return assembled(like, leaves | {name: leaves[name][: len(shapes[name])] for name in padded})


def _over_micro_batches(function: Callable, split: Any, key: jax.Array, count: int) -> Any:
    """The sum of `function(rows, key)` over `count` equal stretches of a device's rows, computed one after the other."""
    if count == 1:
        return function(split, key)
    rows = len(jax.tree.leaves(split)[0])
    if rows % count:
        raise ValueError(f"{rows} rows of a device cannot be divided into {count} micro-batches")
    micro_batches = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), split), jax.random.split(key, count)
    sums = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)

    def add(sums: Any, each: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, function(*each)), None

    return jax.lax.scan(add, zeros, micro_batches)[0]


def _evaluated(
    task: Task, optimizer: Optimizer, parallel: DataParallel, state: TrainState, like: nnx.State
) -> tuple[float, dict[str, float]]:
    """The main process's selection value, in every process; there all metrics too."""
    parameters = whole_parameters(state, optimizer, parallel, like)
    if not parallel.is_main:
        return parallel.from_main(float("nan")), {}
    value, metrics = task.evaluate(parameters)
    return parallel.from_main(value), metrics


def _evaluates_after(step: int, config: TrainConfig, task: Task) -> bool:
    done = step + 1
    return done % (config.evaluate_every * task.steps_per_epoch) == 0 or done == config.epochs * task.steps_per_epoch


def _prefetched(task: Task, parallel: DataParallel, start: int, stop: int) -> Iterator[tuple[int, Batch, float]]:
    """Steps [start, stop) with their batches, each assembled while the step before it runs, and the seconds waited for it."""

    def load(step: int) -> Batch:
        batch = task.batch(step, parallel.process_index, parallel.process_count)
        return batch._replace(split=parallel.split(batch.split))

    with ThreadPoolExecutor(1) as pool:
        ahead: deque[Future[Batch]] = deque()
        for step in range(start, stop):
            while len(ahead) < min(2, stop - step):
                ahead.append(pool.submit(load, step + len(ahead)))
            began = time.perf_counter()
            batch = ahead.popleft().result()
            yield step, batch, time.perf_counter() - began


def _stopped_early(config: TrainConfig, progress: Progress) -> bool:
    return config.patience > 0 and progress.evaluations_since_best >= config.patience
