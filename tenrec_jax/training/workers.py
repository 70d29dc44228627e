"""The processes of a run on one machine: started together, watched, stopped together, and started again if one of them dies."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import NamedTuple, TextIO

from tenrec_jax.training.heartbeat import HEARTBEAT
from tenrec_jax.training.stopping import SIGNALS

# How a process is told its place, where no scheduler that JAX knows does it. JAX itself reads the first. This module does without JAX.
COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LIFELINE = "TENREC_JAX_LIFELINE"
WRONG_USE = 2
# A worker imports what it needs before it is heard of for the first time.
START_SECONDS = 600.0
RESUMES = "The same command resumes the run."
STOPPED = {128 + number: number for number in SIGNALS}


class Ended(NamedTuple):
    """A worker has ended, with this exit code; below 0 it is the signal that killed it."""

    worker: int
    code: int


class Silent(NamedTuple):
    """A worker has not been heard of for so long that it is taken for hung."""

    worker: int


Event = Ended | Silent | signal.Signals


class Outcome(NamedTuple):
    """How an attempt ended: an exit code, and why workers died, where that is why."""

    code: int
    death: str = ""


def supervise(
    command: Sequence[str],
    count: int,
    *,
    max_restarts: int = 0,
    heartbeat_seconds: float = 0.0,
    grace_seconds: float = 30.0,
) -> int:
    """Run a command as `count` workers of one run until all have ended. If one dies or hangs, all are stopped and started again.

    Each worker finds its place in its environment, as `join_processes` reads it. Worker 0 has this process's output; what the others
    print goes to standard error, every line under its worker's name. SIGINT and SIGTERM to this process stop the workers. Call it in the
    main thread.

    Args:
        command: what each worker runs; started again, it goes on from its last checkpoint.
        count: of workers.
        max_restarts: times that all are started again.
        heartbeat_seconds: a worker is hung if its `heartbeat.Heartbeat` is silent for so long; 0 listens to none.
        grace_seconds: from SIGTERM to SIGKILL, for a worker that is to save what it has done.

    Returns:
        0 if all workers ended well; 2 if one found its use or input wrong, of which it tells itself; 128 + the signal if this process or
        a worker was told to stop; 1 if a worker died or hung once more than `max_restarts` times.
    """
    events: SimpleQueue[Event] = SimpleQueue()
    with signals_to(events):
        for restart in range(1, max_restarts + 2):
            code, death = _attempt(command, count, events, heartbeat_seconds, grace_seconds)
            if not death:
                return code
            if asked := _asked(events):
                return _told_to_stop(asked).code
            if restart <= max_restarts:
                sys.stderr.write(f"{death}: restart {restart} of {max_restarts}, from the last checkpoint.\n")
    used = f" {max_restarts} restarts are used up." if max_restarts else ""
    sys.stderr.write(f"error: {death}, so the others were stopped.{used} {RESUMES[:-1]} from its last checkpoint.\n")
    return 1


def end_with_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """In a worker: end when the launcher is gone, however it ended. A worker left over would write into the next run's folder."""
    if LIFELINE not in environment:
        return
    lifeline = int(environment[LIFELINE])

    def watch() -> None:
        os.read(lifeline, 1)  # nothing is ever written: it returns when the launcher's end is closed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _places(count: int) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    return [
        {
            **share_of_cores(count),
            # A worker takes one GPU, where there are any.
            "JAX_LOCAL_DEVICE_IDS": str(i),
            **os.environ,
            COORDINATOR: address,
            PROCESSES: str(count),
            PROCESS: str(i),
        }
        for i in range(count)
    ]


def share_of_cores(count: int) -> dict[str, str]:
    """Environment of one of `count` processes that share this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // count))
    # NPROC is the number of threads that XLA computes with on a CPU.
    return {"NPROC": threads, "OMP_NUM_THREADS": threads}


def _start(
    command: Sequence[str], index: int, environment: dict[str, str], pipes: dict[str, int]
) -> subprocess.Popen[str]:
    # In a session of its own: Ctrl-C reaches the launcher alone, which then stops the workers in order.
    return subprocess.Popen(
        command,
        env=environment | {name: str(end) for name, end in pipes.items()},
        pass_fds=list(pipes.values()),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        stdout=None if index == 0 else subprocess.PIPE,
        stderr=None if index == 0 else subprocess.STDOUT,
        text=True,
        errors="replace",
    )


@contextlib.contextmanager
def signals_to(events: "SimpleQueue[Event]") -> Iterator[None]:
    """Put each SIGINT and SIGTERM into a queue, in the main thread, until the context ends."""
    before = {number: signal.signal(number, lambda n, _: events.put(signal.Signals(n))) for number in STOPPED.values()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _attempt(
    command: Sequence[str],
    count: int,
    events: "SimpleQueue[Event]",
    heartbeat_seconds: float,
    grace_seconds: float,
) -> Outcome:
    """Start the workers, wait, and see to it that none is left."""
    lifeline, held = os.pipe()
    workers, watchers = [], []
    for index, place in enumerate(_places(count)):
        listening, beating = os.pipe()
        worker = _start(command, index, place, {LIFELINE: lifeline, HEARTBEAT: beating})
        os.close(beating)
        workers.append(worker)
        watchers.append(threading.Thread(target=_watch, args=(index, worker, events)))
        watchers.append(threading.Thread(target=_listen, args=(index, listening, heartbeat_seconds, events)))
        if worker.stdout:
            watchers.append(threading.Thread(target=_forward, args=(f"[worker {index}] ", worker.stdout)))
    os.close(lifeline)
    for watcher in watchers:
        watcher.start()
    outcome = Outcome(1)
    try:
        outcome = _wait(events, count)
        return outcome
    finally:
        # After a death nobody can save: a checkpoint needs them all.
        stop_processes(workers, 0.0 if outcome.death else grace_seconds)
        os.close(held)
        for watcher in watchers:
            watcher.join()


def _watch(index: int, worker: subprocess.Popen[str], events: "SimpleQueue[Event]") -> None:
    events.put(Ended(index, worker.wait()))


def _listen(index: int, pipe: int, seconds: float, events: "SimpleQueue[Event]") -> None:
    """Until the worker has ended, which closes the pipe, or falls silent."""
    with os.fdopen(pipe, "rb", buffering=0) as beats:
        patience = max(seconds, START_SECONDS)
        while not seconds or select.select([beats], [], [], patience)[0]:
            if not beats.read(1):
                return
            patience = seconds
        events.put(Silent(index))


def _forward(prefix: str, lines: TextIO) -> None:
    with lines:
        for line in lines:
            sys.stderr.write(prefix + line)


def _wait(events: "SimpleQueue[Event]", count: int) -> Outcome:
    handled = tuple(STOPPED.values())
    for _ in range(count):
        event = events.get()
        if isinstance(event, signal.Signals):
            return _told_to_stop(event)
        if isinstance(event, Silent):
            return Outcome(1, f"worker {event.worker} of {count} hung: it was not heard of any more")
        if event.code == WRONG_USE:
            return Outcome(WRONG_USE)
        code = 128 - event.code if -event.code in handled else event.code  # also before the worker listens
        if code in STOPPED:
            sys.stderr.write(
                f"Worker {event.worker} was stopped by {STOPPED[code].name}, and so were the others. {RESUMES}\n"
            )
            return Outcome(code)
        if event.code:
            cause = f"was killed by {signal.Signals(-event.code).name}" if event.code < 0 else "failed"
            return Outcome(1, f"worker {event.worker} of {count} {cause} (exit code {event.code})")
    return Outcome(0)


def _asked(events: "SimpleQueue[Event]") -> signal.Signals | None:
    """The request to stop that came while workers were ended, if one did. What they left is forgotten."""
    left = [events.get() for _ in range(events.qsize())]
    return next((event for event in left if isinstance(event, signal.Signals)), None)


def _told_to_stop(number: signal.Signals) -> Outcome:
    sys.stderr.write(f"Stopped by {number.name}. {RESUMES}\n")
    return Outcome(128 + number)


def stop_processes(workers: Sequence[subprocess.Popen[str]], grace_seconds: float) -> None:
    """End all that still run: by SIGTERM, on which they save, and after so many seconds by SIGKILL; 0 kills at once."""
    running = [worker for worker in workers if worker.poll() is None]
    if grace_seconds:
        for worker in running:
            worker.terminate()
    deadline = time.monotonic() + grace_seconds
    for worker in running:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
