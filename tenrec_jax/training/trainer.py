"""The training loop, the same for both stages.

Resume rules, which the code below obeys:

1. Batches and dropout keys are functions of (seed, step), so a checkpoint holds no iterator and no key.
2. A checkpoint is written before every evaluation, and when the run is told to stop. It holds the parameters, the optimiser's state, where
   selection stands, the window of steps that it cuts in two, and the run's `metrics.jsonl` and `bad_batches.jsonl`.
3. A run goes on from its newest checkpoint that is whole. Those files are written anew from it: lines beyond its step come again. If an
   evaluation was due at its step, it comes first.
4. The result is the best evaluated step's parameters, read back from its checkpoint.
5. Of several processes, each assembles its rows of a batch and all write a checkpoint together, in a folder that all can reach. The first
   alone evaluates and writes metrics; the others take its selection value, and all stop at the same step.
6. A step whose loss or gradient is not finite moves nothing. After `max_bad_steps` of them in a row the run stops without a checkpoint.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Collection
from flax import nnx

from tenrec_jax.errors import UserError
from tenrec_jax.parameters import assembled, named
from tenrec_jax.settings import Count, Natural, Settings, Share
from tenrec_jax.training.bad_steps import BadSteps
from tenrec_jax.training.checkpoints import Checkpoints, Progress, Saved
from tenrec_jax.training.heartbeat import Heartbeat
from tenrec_jax.training.metrics_writer import BAD_BATCHES
from tenrec_jax.training.optimizers import Named, Optimizer, OptimizerConfig, TrainState, make_optimizer
from tenrec_jax.training.parallel import AXIS, DataParallel
from tenrec_jax.training.stopping import Stopping
from tenrec_jax.training.train_log import TrainLog, step_metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig(Settings):
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
        max_bad_steps: steps in a row with a loss or gradient that is not finite after which training stops.
        optimizer: how the parameters move.
    """

    epochs: Count
    evaluate_every: Count = 1
    patience: Natural = 0
    average_decay: Share = 0.0
    table_placement: Literal["replicated", "row_sharded"] = "replicated"
    accumulate: Count = 1
    max_bad_steps: Count = 3
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

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
        rate_factors: of the learning rate, broadcast to the dense parameters of these names; the others move at the whole rate.
    """

    name: str
    steps_per_epoch: int
    tables: dict[str, str]
    labels_per_example: int
    rate_factors: Mapping[str, np.ndarray]

    def init(self, key: jax.Array) -> nnx.State:
        """Fresh parameters."""

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The host's arrays of one step, a pure function of it; of `split`, one process's stretch of the rows."""

    def examples(self, step: int) -> dict[str, Any]:
        """What a step's batch was made of, for people to look at: JSON."""

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


def fit(
    task: Task,
    config: TrainConfig,
    *,
    workdir: Path,
    seed: int,
    parallel: DataParallel,
    stopping: Stopping | None = None,
    heartbeat: Heartbeat | None = None,
    origin: Mapping[str, Any] = MappingProxyType({}),
) -> FitResult:
    """Train a stage, or go on where an interrupted run stopped.

    Args:
        task: the stage.
        config: how long and how.
        workdir: of the run; checkpoints go to `checkpoints/<task.name>`.
        seed: of the parameters and of dropout.
        parallel: devices to run on.
        stopping: hears whether the run is told to stop.
        heartbeat: tells a launcher that steps get on.
        origin: what the checkpoints are of, beside stage and seed: those of anything else are refused.

    Returns:
        The parameters of the best evaluation.

    Raises:
        UserError: no evaluation gave a number, too many steps in a row were bad, or a checkpoint cannot be written or is another run's.
        Stopped: the run was told to stop; a checkpoint is written.
    """
    began = time.perf_counter()
    watched = stopping or Stopping(), heartbeat or Heartbeat()
    with closing(_Training(task, config, workdir, seed, parallel, *watched, origin)) as training:
        progress = training.run()
        if progress.best_value is None:
            raise UserError(
                f"No evaluation of stage {task.name} gave a number to choose by: the validation rows are too few, or all of one kind."
            )
        return FitResult(training.best(), progress.best_step, progress.step, time.perf_counter() - began)


class _Training:
    """A stage while it trains: its state, where selection stands, and what it tells. Arguments are those of `fit`."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        workdir: Path,
        seed: int,
        parallel: DataParallel,
        stopping: Stopping,
        heartbeat: Heartbeat,
        origin: Mapping[str, Any],
    ) -> None:
        self._task, self._config, self._parallel = task, config, parallel
        self._stopping, self._heartbeat = stopping, heartbeat
        self._steps, row_sharded = config.epochs * task.steps_per_epoch, config.table_placement == "row_sharded"
        shards = config.shards(parallel.size)
        self._optimizer = make_optimizer(
            config.optimizer,
            self._steps,
            task.tables,
            config.average_decay,
            shards=shards,
            rate_factors=task.rate_factors,
        )
        self._init_key, self._dropout_key = jax.random.split(jax.random.key(seed))
        self._parameters = jax.eval_shape(task.init, self._init_key)
        self._like = parallel.shapes(jax.eval_shape(self._begin, self._init_key), self._optimizer.divided)
        folder, origin = workdir / "checkpoints" / task.name, {"stage": task.name, "seed": seed, **origin}
        self._checkpoints = Checkpoints(folder, parallel, origin, resize=row_sharded)
        state, resumed = self._checkpoints.latest(self._like) or (self._fresh(), None)
        self._step_fn = compile_step(task, self._optimizer, parallel, self._parameters, accumulate=config.accumulate)
        self._replicated = parallel.replicate(state, self._optimizer.divided)
        del state
        self._progress = resumed.progress if resumed else Progress()
        if resumed:
            logger.info("%s: going on after step %d of %d", task.name, self._progress.step, self._steps)
        self._log = TrainLog(
            workdir,
            task.name,
            labels_per_example=task.labels_per_example,
            steps=self._steps,
            resumed=resumed,
            parallel=parallel,
        )
        self._bad_steps = BadSteps(
            workdir / BAD_BATCHES,
            config.max_bad_steps,
            resumed.loop["bad_steps_in_a_row"] if resumed else 0,
            read=parallel.read,
            write=lambda step: self._log.bad_batch(step + 1, task.examples(step)),
        )

    def run(self) -> Progress:
        """Train to the end."""
        self._stopping.place, self._stopping.before_exit = f"in stage {self._task.name}", self._checkpoints.finish
        asked = self._parallel.any_asked()
        if self._is_evaluated_after(self._progress.step):
            self._evaluate()
        for step, batch, blocked in _prefetched(self._task, self._parallel, self._progress.step, self._steps):
            if _stopped_early(self._config, self._progress):
                break
            self._log.waited(blocked)
            self._step(step, batch)
            stops, evaluates = asked(self._stopping.asked), self._is_evaluated_after(step + 1)
            if evaluates:
                self._log.end_window()
            if stops or evaluates:
                self._save()
            if stops:
                self._checkpoints.finish()
                raise self._stopping.stopped(self._progress.step)
            if evaluates:
                self._evaluate()
        with self._log.spending_on("checkpoint"):
            self._checkpoints.finish()
        return self._progress

    def best(self) -> nnx.State:
        """The best step's parameters. The state is given up: there is room for the one that is read back."""
        del self._replicated
        best, _ = self._checkpoints.restore(self._progress.best_step, self._like)
        return whole_parameters(best, self._optimizer, self._parallel, like=self._parameters)

    def close(self) -> None:
        """Wait until everything is on disk, and let go of files and threads."""
        self._heartbeat.idle()
        self._log.close()
        self._checkpoints.close()

    def _begin(self, key: jax.Array) -> TrainState:
        return self._optimizer.init(named(self._task.init(key)))

    def _fresh(self) -> TrainState:
        # Made where it is to lie: no device holds the whole of what is divided.
        places = jax.tree.map(lambda x: x.sharding, self._like)
        return jax.jit(self._begin, out_shardings=places)(self._init_key)

    def _step(self, step: int, batch: Batch) -> None:
        self._checkpoints.check()
        key = jax.random.fold_in(self._dropout_key, step)
        self._replicated, told = self._step_fn(self._replicated, *batch, key)
        # After the call, not before: the first one compiles, and until then there is nothing to save.
        self._stopping.hold()
        self._heartbeat.step()
        self._progress = self._progress._replace(step=step + 1)
        self._log.add(told)
        self._bad_steps.add(step, told.bad_steps.total)

    def _save(self) -> None:
        self._bad_steps.settle()
        loop = {**self._log.state(), "bad_steps_in_a_row": self._bad_steps.in_a_row}
        with self._log.spending_on("checkpoint"):
            state = self._parallel.unreplicate(self._replicated, self._optimizer.divided)
            self._checkpoints.save(state, Saved(self._progress, loop, self._log.logs()))

    def _evaluate(self) -> None:
        self._stopping.release()
        self._heartbeat.idle()
        with self._log.spending_on("evaluation"):
            state = self._parallel.unreplicate(self._replicated, self._optimizer.divided)
            value, metrics = _evaluated(self._task, self._optimizer, self._parallel, state, like=self._parameters)
        self._progress = self._progress.after(value)
        self._log.evaluated(self._progress, metrics)

    def _is_evaluated_after(self, steps: int) -> bool:
        """Whether an evaluation is due when so many steps are done."""
        return steps > 0 and (
            steps % (self._config.evaluate_every * self._task.steps_per_epoch) == 0 or steps == self._steps
        )


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
        dense, rows = jax.tree.map(lambda x: x / examples, gradients)
        state, norms, good = optimizer.update(state, ids, dense, rows, loss)
        return state, step_metrics(loss, examples, norms, rates, good)

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
