"""Several commands at once, each in a process of its own with its share of the machine."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from tenrec_jax.errors import UserError
from tenrec_jax.training.stopping import Stopped
from tenrec_jax.training.workers import LIFELINE, Ended, Event, share_of_cores, signals_to, stop_processes

GPUS = "CUDA_VISIBLE_DEVICES"


class Job(NamedTuple):
    """A command; `log` takes what it prints, after what stands there."""

    name: str
    command: tuple[str, ...]
    log: Path


class Done(NamedTuple):
    """A job that has ended, with its exit code, below 0 the signal that killed it."""

    job: Job
    code: int
    seconds: float


class Pool:
    """Runs jobs, `size` at a time. None outlives this process, however it ends: they call `workers.end_with_launcher`.

    Make it by `opened`, in the main thread.
    """

    def __init__(self, size: int, events: "SimpleQueue[Event]", lifeline: int, grace_seconds: float) -> None:
        self._size, self._events, self._lifeline, self._grace = size, events, lifeline, grace_seconds
        self._places = _places(size, os.environ)

    @classmethod
    @contextmanager
    def opened(cls, size: int, *, grace_seconds: float = 30.0) -> Iterator["Pool"]:
        """A pool that hears SIGINT and SIGTERM for as long as the context lasts.

        Args:
            size: jobs at a time.
            grace_seconds: that they are given to save what they have done, once this process is told to stop.

        Raises:
            UserError: CUDA_VISIBLE_DEVICES lists fewer GPUs than `size`.
        """
        events: SimpleQueue[Event] = SimpleQueue()
        lifeline, held = os.pipe()
        try:
            with signals_to(events):
                yield cls(size, events, lifeline, grace_seconds)
        finally:
            os.close(lifeline)
            os.close(held)

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """Run jobs in their order, and give each as it ends.

        Raises:
            Stopped: this process was told to stop, and all jobs have ended.
        """
        waiting, free = list(jobs), list(range(self._size))
        running: dict[int, tuple[Job, subprocess.Popen[str], float]] = {}
        try:
            while waiting or running:
                while waiting and free:
                    place = free.pop(0)
                    job = waiting.pop(0)
                    running[place] = job, self._start(job, place), time.monotonic()
                event = self._events.get()
                if isinstance(event, signal.Signals):
                    raise self._stopped(event, [process for _, process, _ in running.values()])
                if isinstance(event, Ended):
                    job, _, began = running.pop(event.worker)
                    free.append(event.worker)
                    yield Done(job, event.code, time.monotonic() - began)
        finally:
            stop_processes([process for _, process, _ in running.values()], 0.0)

    def _stopped(self, number: signal.Signals, processes: "Sequence[subprocess.Popen[str]]") -> Stopped:
        stop_processes(processes, self._grace)
        killed = sum(process.returncode == -signal.SIGKILL for process in processes)
        late = f" ({killed} units had not ended after {self._grace:.0f} s: they go on from their last checkpoints)"
        return Stopped(number, "in the sweep" + late * bool(killed))

    def _start(self, job: Job, place: int) -> "subprocess.Popen[str]":
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a") as log:
            # In a session of its own: Ctrl-C reaches this process alone, which then stops the jobs in order.
            process = subprocess.Popen(
                job.command,
                env={**self._places[place], LIFELINE: str(self._lifeline)},
                pass_fds=[self._lifeline],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )
        threading.Thread(target=lambda: self._events.put(Ended(place, process.wait())), daemon=True).start()
        return process


def _places(size: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each job that runs at a time: its share of the cores, and one of the GPUs where these are named."""
    places = [{**share_of_cores(size), **environment} for _ in range(size)]
    gpus = [name for name in environment.get(GPUS, "").split(",") if name.strip()]
    if size == 1 or not gpus:
        return places
    if len(gpus) < size:
        raise UserError(f"--parallel_units is {size}, but {GPUS} names {len(gpus)} GPUs: each unit takes one.")
    return [place | {GPUS: gpu} for place, gpu in zip(places, gpus, strict=False)]
