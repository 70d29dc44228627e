"""The processes of a run on one machine: started together, watched, stopped together."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import NamedTuple, TextIO

from tenrec_jax.training.parallel import COORDINATOR, PROCESS, PROCESSES

LIFELINE = "TENREC_JAX_LIFELINE"
WRONG_USE = 2


class Ended(NamedTuple):
    """A worker has ended, with this exit code; below 0 it is the signal that killed it."""

    worker: int
    code: int


def supervise(command: Sequence[str], count: int, *, grace_seconds: float = 10.0) -> int:
    """Run a command as `count` workers of one run until all have ended; if one fails, stop the others.

    Each worker finds its place in its environment, as `join_processes` reads it. Worker 0 has this process's output; what the others
    print goes to standard error, every line under its worker's name. SIGINT and SIGTERM to this process stop the workers. Call it in the
    main thread.

    Args:
        command: what each worker runs.
        count: of workers.
        grace_seconds: from SIGTERM to SIGKILL, for a worker that is to stop.

    Returns:
        0 if all workers ended well; 2 if one found its use or input wrong, of which it tells itself; 128 + the signal if this process was
        told to stop; 1 if a worker died.
    """
    events: SimpleQueue[Ended | signal.Signals] = SimpleQueue()
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, _: events.put(signal.Signals(n))) for number in handled}
    lifeline, held = os.pipe()
    workers = [_start(command, i, place, lifeline) for i, place in enumerate(_places(count))]
    os.close(lifeline)
    watchers = [threading.Thread(target=_watch, args=(i, worker, events)) for i, worker in enumerate(workers)]
    watchers += [
        threading.Thread(target=_forward, args=(f"[worker {i}] ", worker.stdout))
        for i, worker in enumerate(workers)
        if worker.stdout
    ]
    for watcher in watchers:
        watcher.start()
    try:
        return _wait(events, workers, grace_seconds)
    finally:
        _stop(workers, grace_seconds)
        os.close(held)
        for watcher in watchers:
            watcher.join()
        for number, handler in before.items():
            signal.signal(number, handler)


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
    threads = str(max(1, _cores() // count))
    # NPROC is the number of threads that XLA computes with on a CPU. A worker takes one GPU, where there are any.
    shares = {"NPROC": threads, "OMP_NUM_THREADS": threads}
    return [
        {
            **shares,
            "JAX_LOCAL_DEVICE_IDS": str(i),
            **os.environ,
            COORDINATOR: address,
            PROCESSES: str(count),
            PROCESS: str(i),
        }
        for i in range(count)
    ]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(command: Sequence[str], index: int, environment: dict[str, str], lifeline: int) -> subprocess.Popen[str]:
    # In a session of its own: Ctrl-C reaches the launcher alone, which then stops the workers in order.
    return subprocess.Popen(
        command,
        env={**environment, LIFELINE: str(lifeline)},
        pass_fds=[lifeline],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        stdout=None if index == 0 else subprocess.PIPE,
        stderr=None if index == 0 else subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _watch(index: int, worker: subprocess.Popen[str], events: "SimpleQueue[Ended | signal.Signals]") -> None:
    events.put(Ended(index, worker.wait()))


def _forward(prefix: str, lines: TextIO) -> None:
    with lines:
        for line in lines:
            sys.stderr.write(prefix + line)


def _wait(
    events: "SimpleQueue[Ended | signal.Signals]", workers: Sequence[subprocess.Popen[str]], grace_seconds: float
) -> int:
    for _ in range(len(workers)):
        event = events.get()
        if isinstance(event, signal.Signals):
            _stop(workers, grace_seconds)
            sys.stderr.write(f"Stopped by {event.name}. The same command resumes the run.\n")
            return 128 + event
        if event.code == WRONG_USE:
            return WRONG_USE
        if event.code:
            _stop(workers, grace_seconds)
            cause = f"was killed by {signal.Signals(-event.code).name}" if event.code < 0 else "failed"
            sys.stderr.write(
                f"error: worker {event.worker} of {len(workers)} {cause} (exit code {event.code}), so the others were stopped. "
                "The same command resumes the run from its last checkpoint.\n"
            )
            return 1
    return 0


def _stop(workers: Sequence[subprocess.Popen[str]], grace_seconds: float) -> None:
    running = [worker for worker in workers if worker.poll() is None]
    for worker in running:
        worker.terminate()
    deadline = time.monotonic() + grace_seconds
    for worker in running:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
