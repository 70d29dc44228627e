"""What a training loop tells of itself: metrics averaged over windows of steps, and its speed."""

import functools
from collections.abc import Mapping
from pathlib import Path

import jax
from clu.metrics import Average, Collection, LastValue

from tenrec_jax.training.checkpoints import Progress
from tenrec_jax.training.loop_clock import LoopClock, peak_memory
from tenrec_jax.training.metrics_writer import MetricsWriter, progress_bar
from tenrec_jax.training.optimizers import Named, Norms
from tenrec_jax.training.parallel import DataParallel

LOG_EVERY = 20


def step_metrics(loss: jax.Array, examples: jax.Array, norms: Norms, learning_rates: Named) -> Collection:
    """What a step tells, as metrics that merge over steps: the loss of all their examples, mean norms, the last rates.

    Args:
        loss: summed over all devices' `examples`.
        norms, learning_rates: of the step.
    """
    return Collection.create_collection(
        loss=Average(total=loss, count=examples),
        **{f"{name}_norm": Average.from_model_output(norm) for name, norm in norms._asdict().items()},
        **{name: LastValue.from_model_output(rate) for name, rate in learning_rates.items()},
    )


class TrainLog:
    """Measures the loop of a stage. Of several processes the main one alone writes and shows what comes out.

    A window of steps ends at every `LOG_EVERY`th step and at every evaluation. A resumed run begins after an evaluation, so its windows
    are those of a run that nobody interrupted, and it leaves the same `metrics.jsonl`. What depends on the clock or the machine stands
    apart, in `timings.jsonl`, a line a window:

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
        steps: of the stage. progress: where the loop begins.
        parallel: what it runs on.
    """

    def __init__(
        self,
        workdir: Path,
        stage: str,
        *,
        labels_per_example: int,
        steps: int,
        progress: Progress,
        parallel: DataParallel,
    ) -> None:
        self._labels_per_example, self._parallel, self._steps = labels_per_example, parallel, steps
        self._done, self._best = progress.step, progress.best_value
        self._writer = MetricsWriter(workdir, stage, resume_from=progress.step) if parallel.is_main else None
        self._bar = progress_bar(steps, f"train {stage}", initial=progress.step, disable=not parallel.is_main)
        self._window: list[Collection] = []
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
        if self._done % LOG_EVERY == 0 and self._window:
            self.end_window()
        self._window.append(metrics)
        self._latest = metrics
        self._done += 1
        self._bar.update()

    def end_window(self) -> None:
        """Write down the steps since the last window, waiting for them to end."""
        window, self._window = self._window, []
        if self._writer is None:
            return
        merged = functools.reduce(lambda a, b: a.merge(b), self._parallel.read(window))
        metrics = {name: float(value) for name, value in merged.compute().items()}
        examples = int(merged.loss.count)
        timings = self._clock.end_window(
            steps=len(window),
            examples=examples,
            labels=examples * self._labels_per_example,
            steps_left=self._steps - self._done,
        )
        self._writer.write(self._done, metrics)
        self._writer.write_timings(self._done, timings | peak_memory(jax.local_devices()))
        self._bar.set_postfix(
            loss=f"{metrics['loss']:.4f}",
            best=f"{self._best:.4f}",
            labels=f"{timings['labels_per_second']:.3g}/s",
            wait=f"{timings['data_wait_share']:.0%}",
            refresh=False,
        )

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
