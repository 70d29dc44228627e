"""What a training loop tells of itself: metrics averaged over windows of steps, its speed, and what went wrong."""

import functools
import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average, Collection, LastValue, Metric

from tenrec_jax.stages import METRICS
from tenrec_jax.training.checkpoints import Progress, Saved
from tenrec_jax.training.loop_clock import LoopClock, peak_memory
from tenrec_jax.training.metrics_writer import MetricsWriter, progress_bar, read_lines
from tenrec_jax.training.optimizers import Named, Norms
from tenrec_jax.training.parallel import DataParallel

logger = logging.getLogger(__name__)

LOG_EVERY = 20
# A window's loss is a spike if it lies so many deviations above the median of so many windows before it, and a tenth above it.
SPIKE_DEVIATIONS, SPIKE_WINDOWS, SPIKE_SHARE = 6.0, 20, 0.1


@flax.struct.dataclass
class Mean(Average):
    """The mean over all good steps, once it is read; NaN if there is none."""

    def compute(self) -> Any:
        return self.total / self.count if self.count else math.nan


@flax.struct.dataclass
class Total(Metric):
    """The sum over all steps."""

    total: jax.Array

    def merge(self, other: "Total") -> "Total":
        return Total(self.total + other.total)

    def compute(self) -> jax.Array:
        return self.total


def step_metrics(
    loss: jax.Array, examples: jax.Array, norms: Norms, learning_rates: Named, good: jax.Array
) -> Collection:
    """What a step tells, as metrics that merge over steps: the loss of all their examples, mean norms, the last rates, the bad steps.

    Args:
        loss: summed over all devices' `examples`.
        norms, learning_rates: of the step.
        good: see `Optimizer.update`. Bad steps are counted and enter no mean.
    """
    one = jnp.where(good, 1, 0)
    return Collection.create_collection(
        loss=Mean(total=jnp.where(good, loss, 0), count=jnp.where(good, examples, 0)),
        **{f"{name}_norm": Mean(jnp.where(good, norm, 0), one) for name, norm in norms._asdict().items()},
        **{name: LastValue.from_model_output(rate) for name, rate in learning_rates.items()},
        bad_steps=Total(1 - one),
    )


def is_spike(loss: float, before: "deque[float]") -> bool:
    """Whether a window's loss stands out from those before it, by the median absolute deviation."""
    if len(before) < SPIKE_WINDOWS // 2:
        return False
    median = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in before)
    return loss > median + max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * abs(median))


class TrainLog:
    """Measures the loop of a stage. Of several processes the main one alone writes and shows what comes out.

    A window of steps ends at every `LOG_EVERY`th step and at every evaluation. A checkpoint holds the window that it cuts in two (see
    `state`), so a resumed run leaves the same `metrics.jsonl` as one that nobody interrupted. What depends on the clock or the machine
    stands apart, in `timings.jsonl`, a line a window:

    - steps_per_second: of the window, without evaluations and checkpoints.
    - examples_per_second: examples are what the loss averages over, exposures in ranking and clicked positions in retrieval.
    - labels_per_second: an example teaches `Task.labels_per_example` labels; in ranking, one an action.
    - data_wait_share: of the window, when no step ran because the next batch was not assembled. An upper bound: a wait counts in full if
      the step before has ended by its end.
    - eta_seconds: for all steps that are left, at the pace so far, evaluations included. Stopping early needs less.
    - startup_share, evaluation_share, checkpoint_share: of the time since this process began the loop. Start-up ends when the first step is
      compiled; checkpoints are mostly written while training goes on, and only waiting for them counts.
    - peak_device_memory_mib or peak_process_memory_mib: see `peak_memory`.

    The stage's last line repeats shares and memory, at the end of the loop.

    Args:
        workdir: of the run. stage: name of the stage.
        labels_per_example: see `Task`.
        steps: of the stage. resumed: what its checkpoint holds; None in a fresh stage.
        parallel: what it runs on.
    """

    def __init__(
        self,
        workdir: Path,
        stage: str,
        *,
        labels_per_example: int,
        steps: int,
        resumed: Saved | None,
        parallel: DataParallel,
    ) -> None:
        self._labels_per_example, self._parallel, self._steps = labels_per_example, parallel, steps
        self._done, self._best = (resumed.progress.step, resumed.progress.best_value) if resumed else (0, None)
        self._writer = None
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOWS)
        if parallel.is_main:
            logs = resumed.logs if resumed else None
            self._writer = MetricsWriter(workdir, stage, resume_from=self._done, logs=logs)
            lines = read_lines(workdir / METRICS)
            self._losses.extend(line["loss"] for line in lines if line["stage"] == stage and "loss" in line)
        self._bar = progress_bar(steps, f"train {stage}", initial=self._done, disable=not parallel.is_main)
        self._window: list[Collection] = []
        # The part of this window that a checkpoint held: as the checkpoint has it, and merged, once a step has told its structure.
        self._cut: list[float] = resumed.loop["window"] if resumed else []
        self._before: Collection | None = None
        self._latest: Collection | None = None
        self._clock = LoopClock()
        self.spending_on = self._clock.spending_on

    def waited(self, seconds: float) -> None:
        """The loop stood still until a batch came. If the step before it still runs, that has cost nothing."""
        if self._latest is not None and self._latest.loss.total.is_ready():
            self._clock.waited(seconds)

    def add(self, metrics: Collection) -> None:
        """A step was dispatched; `metrics` are its `step_metrics`. A full window of steps before it is read now, while it runs."""
        if self._latest is None:
            self._clock.first_step_runs()
            self._before = _unflattened(self._cut, metrics) if self._cut else None
        if self._done % LOG_EVERY == 0:
            self.end_window()
        self._window.append(metrics)
        self._latest = metrics
        self._done += 1
        self._bar.update()

    def state(self) -> dict[str, Any]:
        """The window of steps so far, as JSON, for a checkpoint."""
        leaves = jax.tree.leaves(self._merged()) if self._window or self._before else []
        return {"window": [np.asarray(leaf).item() for leaf in leaves]}

    def logs(self) -> dict[str, str]:
        """The files that a checkpoint keeps, as they are now; none in another process than the main one."""
        return self._writer.logs() if self._writer else {}

    def bad_batch(self, step: int, examples: Mapping[str, Any]) -> None:
        """Write down the examples of a bad step."""
        if self._writer:
            self._writer.write_bad_batch(step, examples)

    def end_window(self) -> None:
        """Write down the steps since the last window, waiting for them to end."""
        if not self._window and self._before is None:
            return
        merged, steps = self._merged(), len(self._window)
        examples = int(merged.loss.count) - (int(self._before.loss.count) if self._before else 0)
        self._window, self._before = [], None
        if self._writer is None:
            return
        # Of a window without a good step, no mean is a number.
        metrics = {name: float(value) for name, value in merged.compute().items() if value == value}
        self._writer.write(self._done, metrics)
        if steps:
            self._tell_speed(steps, examples, metrics.get("loss"))
        if "loss" in metrics:
            self._tell_spike(metrics["loss"])

    def evaluated(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Write down an evaluation after the steps so far."""
        self._best = progress.best_value
        if self._writer:
            self._writer.write(self._done, metrics)

    def close(self) -> None:
        """Write down what the whole loop cost."""
        self._bar.close()
        if self._writer:
            if self._latest is not None:
                self._writer.write_timings(self._done, self._clock.shares() | peak_memory(jax.local_devices()))
            self._writer.close()

    def _merged(self) -> Collection:
        """All steps of the window, the earliest first."""
        steps = self._parallel.read(self._window)
        return functools.reduce(lambda a, b: a.merge(b), [self._before, *steps] if self._before else steps)

    def _tell_speed(self, steps: int, examples: int, loss: float | None) -> None:
        timings = self._clock.end_window(
            steps=steps,
            examples=examples,
            labels=examples * self._labels_per_example,
            steps_left=self._steps - self._done,
        )
        if self._writer:
            self._writer.write_timings(self._done, timings | peak_memory(jax.local_devices()))
        self._bar.set_postfix(
            loss="-" if loss is None else f"{loss:.4f}",
            best="-" if self._best is None else f"{self._best:.4f}",
            labels=f"{timings['labels_per_second']:.3g}/s",
            wait=f"{timings['data_wait_share']:.0%}",
            refresh=False,
        )

    def _tell_spike(self, loss: float) -> None:
        if is_spike(loss, self._losses):
            usual = statistics.median(self._losses)
            logger.warning("the loss jumped to %.4g after step %d; before, it was about %.4g", loss, self._done, usual)
        self._losses.append(loss)


def _unflattened(leaves: list[float], like: Collection) -> Collection:
    """Metrics from what `TrainLog.state` made of them: every float32 is exactly a JSON number."""
    known, structure = jax.tree.flatten(like)
    pairs = zip(leaves, known, strict=True)
    return jax.tree.unflatten(structure, [np.asarray(value, leaf.dtype) for value, leaf in pairs])
