"""What the benchmarks share: measuring in fresh processes, turn by turn, and a table of ratios against bars.

Ours and the rival's take turns (A B A B), and medians are compared. An absolute time means little on a shared machine; a ratio from the
same minutes does. Where peak memory counts, or nothing may be warm, each measurement runs in a process of its own (`measure`); steps of
training or scoring take turns in one process (`median_milliseconds`).

PyTorch's threads spin while they wait for each other, which a busy neighbour turns into seconds: the default clock of steps is therefore
CPU time on one core. `--wall` measures elapsed time on all cores, for a machine that does nothing else.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

WARM_UP = 2
Clock = Callable[[], float]
Step = Callable[[int], Any]


@dataclass(frozen=True)
class Result:
    """One line of a benchmark.

    Attributes:
        work, rival: what was done and by what it was compared with.
        ours, theirs: medians, in the unit that `work` names.
        ratio: how many times better ours is; below 1 it is worse.
        bar: what the ratio must reach; 0 where it is only reported.
    """

    work: str
    rival: str
    ours: float
    theirs: float
    ratio: float
    bar: float

    @property
    def met(self) -> bool:
        """Whether the bar is reached."""
        return self.ratio >= self.bar


class Usage(NamedTuple):
    """Of one run in a process of its own: seconds, the peak resident memory, and what it was before, in MiB."""

    seconds: float
    peak_mib: float
    before_mib: float

    @property
    def growth_mib(self) -> float:
        """What the run added to the resident memory at its peak."""
        return self.peak_mib - self.before_mib


def measure(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> Usage:
    """Run `prepare(*arguments)()` in a fresh process; only the second call is measured (imports belong into the first)."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, prepare, arguments))
    process.start()
    sender.close()
    try:
        usage = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{prepare.__name__} failed; its error stands above") from None
    finally:
        process.join()
    return usage


def take_turns(rounds: int, *runs: Callable[[], Usage]) -> list[list[Usage]]:
    """Measure each of `runs` `rounds` times, in turns; the result has one list for each."""
    measured: list[list[Usage]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, usages in zip(runs, measured, strict=True):
            usages.append(run())
    return measured


def median_seconds(usages: Sequence[Usage]) -> float:
    """Median of the seconds."""
    return median(usage.seconds for usage in usages)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, not what is measured")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options.add_argument("--rounds", type=int, default=3, help="measurements of each side (default: %(default)s)")
    return options


def median_milliseconds(steps: Sequence[Step], rounds: int, clock: Clock) -> list[float]:
    """One step of each side in every round; the first rounds, which compile and allocate, do not count."""
    measured: list[list[float]] = [[] for _ in steps]
    for turn in range(WARM_UP + rounds):
        for step, times in zip(steps, measured, strict=True):
            began = clock()
            step(turn)
            times.append(1e3 * (clock() - began))
    return [median(times[WARM_UP:]) for times in measured]


def timed_parser(description: str) -> argparse.ArgumentParser:
    """The options of a benchmark that times steps."""
    options = parser(description)
    options.add_argument("--wall", action="store_true", help="elapsed time on all cores, not CPU time on one")
    return options


def start_clock(*, wall: bool) -> Clock:
    """The clock to measure with, named on standard output; keeps the process to one core unless `wall`. To be called before JAX starts."""
    cores = os.sched_getaffinity(0)
    if wall:
        clock, name = time.perf_counter, f"elapsed time on {len(cores)} cores"
    else:
        import torch

        # Before the first computation: the thread pools are made then.
        os.sched_setaffinity(0, {max(cores)})
        torch.set_num_threads(1)
        clock, name = time.process_time, f"CPU time on core {max(cores)}"
    sys.stdout.write(f"{name}; load of the machine in the last minute: {os.getloadavg()[0]:.1f}\n")
    return clock


def report(results: Sequence[Result], json_file: Path | None) -> None:
    """Print the table, and write it as JSON where asked to."""
    print(f"\n{'work':<58} {'rival':<34} {'ours':>10} {'theirs':>10} {'ratio':>8} {'bar':>6}  met")
    for r in results:
        met = ("yes" if r.met else "NO") if r.bar else ""
        print(f"{r.work:<58} {r.rival:<34} {r.ours:>10.4g} {r.theirs:>10.4g} {r.ratio:>8.2f} {r.bar:>6.2f}  {met}")
    if json_file:
        rows = [dataclasses.asdict(result) | {"met": result.met} for result in results]
        json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _run(sender: Any, prepare: Callable[..., Callable[[], Any]], arguments: tuple) -> None:
    run = prepare(*arguments)
    before = _resident_mib()
    _reset_peak()
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    sender.send(Usage(seconds, _peak_mib(), before))


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # not allowed everywhere; the peak then counts from the start of the process
        return


def _peak_mib() -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
