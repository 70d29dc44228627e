"""Where the wall time of a training loop goes, and the memory it takes."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import jax

Activity = Literal["startup", "evaluation", "checkpoint"]


class LoopClock:
    """Divides the time of a loop into start-up, evaluations, checkpoints and windows of steps.

    Args:
        now: the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._began = self._window_began = now()
        self._spent: dict[Activity, float] = {"startup": 0.0, "evaluation": 0.0, "checkpoint": 0.0}
        self._waited, self._steps = 0.0, 0

    def first_step_runs(self) -> None:
        """The first step is compiled and dispatched: the time so far was spent on starting up."""
        self._window_began, self._waited = self._now(), 0.0
        self._spent["startup"] = self._window_began - self._began

    @contextmanager
    def spending_on(self, activity: Activity) -> Iterator[None]:
        """Time in this context belongs to no window of steps."""
        began = self._now()
        yield
        seconds = self._now() - began
        self._spent[activity] += seconds
        self._window_began += seconds

    def waited(self, seconds: float) -> None:
        """So long no step ran, for want of a batch."""
        self._waited += seconds

    def end_window(self, *, steps: int, examples: int, labels: int, steps_left: int) -> dict[str, float]:
        """Figures of the steps since the last call, with `shares`; see `TrainLog`.

        Args:
            steps, examples, labels: done and learned since then.
            steps_left: of the whole run.
        """
        now = self._now()
        seconds, waited = now - self._window_began, self._waited
        self._window_began, self._waited, self._steps = now, 0.0, self._steps + steps
        pace = (now - self._began - self._spent["startup"]) / self._steps
        return {
            "steps_per_second": steps / seconds,
            "examples_per_second": examples / seconds,
            "labels_per_second": labels / seconds,
            "data_wait_share": waited / seconds,
            "eta_seconds": steps_left * pace,
            **self.shares(),
        }

    def shares(self) -> dict[str, float]:
        """The shares of the time so far that were not spent on steps."""
        total = self._now() - self._began
        return {f"{activity}_share": seconds / total for activity, seconds in self._spent.items()}


def peak_memory(devices: Sequence[jax.Device]) -> dict[str, float]:
    """The most memory held so far, in MiB: of any of the devices or, where they do not tell (CPU), of this process. The name says which."""
    stats = [device.memory_stats() for device in devices]
    peaks = [each["peak_bytes_in_use"] for each in stats if each]
    if peaks:
        return {"peak_device_memory_mib": max(peaks) / 2**20}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_process_memory_mib": resident / (2**20 if sys.platform == "darwin" else 2**10)}
