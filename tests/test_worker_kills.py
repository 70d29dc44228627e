"""One of two workers of a real run is killed at a random moment: all are started again, and the result is that of one process."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from launched import DEADLINE, ROOT, children, environment
from safetensors.numpy import load_file

from tenrec_jax.stages import METRICS
from tenrec_jax.training.metrics_writer import read_lines

WEIGHTS = "recommender/retrieval.safetensors"
CHECKPOINTS = Path("checkpoints", "retrieval")
GOES_ON = re.compile(r"retrieval: going on after step (\d+) of")
PLACEMENTS = ("replicated", "row_sharded")


def launch(table: Path, workdir: Path, *options: str, processes: int = 2, **variables: object) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "experiments" / "launch.py"), f"--config={ROOT / 'tests' / 'tiny_run.py'}"]
    command += [f"--config.data.path={table.with_name('log.csv')}", f"--workdir={workdir}"]
    cache = {"JAX_COMPILATION_CACHE_DIR": table.with_name("xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0}
    with workdir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [*command, *options, f"--num_processes={processes}", "--max_restarts=20"],
            env=environment(JAX_DISABLE_MOST_OPTIMIZATIONS=1, **cache, **variables),
            stdout=log,
            stderr=log,
        )


def finish(process: subprocess.Popen, workdir: Path) -> str:
    code = process.wait(DEADLINE)
    said = workdir.with_suffix(".log").read_text()
    assert code == 0, said[-5000:]
    return said


def committed(workdir: Path) -> int:
    """The last step that a checkpoint holds."""
    steps = [int(path.name) for path in (workdir / CHECKPOINTS).glob("*") if path.name.isdecimal()]
    return max(steps, default=0)


def assert_same_run(found: Path, expected: Path) -> None:
    """Weights and metrics within 1e-6 of another run's: one process with as many devices sums in another order."""
    weights, others = load_file(found / WEIGHTS), load_file(expected / WEIGHTS)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, others[name], rtol=0, atol=1e-6, err_msg=name)
    for line, other in zip(read_lines(found / METRICS), read_lines(expected / METRICS), strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            assert line[name] == (value if name == "stage" else pytest.approx(value, rel=0, abs=1e-6)), (name, line)


def kill_a_worker(process: subprocess.Popen, workdir: Path, drawn: random.Random, after: int) -> int | None:
    """Kill one when so many restarts have been, at a random moment of training; the last committed step then. None if the run has ended."""
    log = workdir.with_suffix(".log")
    while process.poll() is None:
        said = log.read_text()
        if said.count("from the last checkpoint") == after and "train retrieval" in said.split("restart")[-1]:
            time.sleep(drawn.uniform(0, 4))
            victim = str(drawn.randrange(2))
            workers = children(process.pid)
            if victim in workers:
                before = committed(workdir)
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(workers[victim], signal.SIGKILL)
                return before
        time.sleep(0.05)
    return None


@pytest.mark.slow
@pytest.mark.parametrize(("count", "placement"), [(5, placement) for placement in PLACEMENTS])
def test_a_run_whose_workers_are_killed_ends_as_if_nothing_had_been(
    count: int, placement: str, short_table: Path, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    options = (f"--config.retrieval.train.table_placement={placement}",)
    whole = tmp_path / "whole"
    finish(launch(short_table, whole, *options, processes=1, JAX_NUM_CPU_DEVICES=2), whole)
    drawn, kills, lost, restarts, runs = random.Random(count), 0, 0, 0, 0
    while kills < count:
        workdir, runs = tmp_path / f"killed-{runs}", runs + 1
        process, before = launch(short_table, workdir, *options), []
        while kills + len(before) < count:
            step = kill_a_worker(process, workdir, drawn, len(before))
            if step is None:
                break
            before.append(step)
        said = finish(process, workdir)
        kills += said.count("was killed by SIGKILL")
        restarts += said.count("from the last checkpoint")
        went_on = [int(step) for step in GOES_ON.findall(said)]
        lost += sum(step < at_kill for step, at_kill in zip(went_on, (b for b in before if b), strict=False))
        assert_same_run(workdir, whole)
        shutil.rmtree(workdir)
    tell(f"{placement}: {kills} workers killed in {runs} runs, {restarts} restarts, {lost} checkpoints lost")
    assert lost == 0
    assert restarts == kills
