"""Small runs by their command line, interrupted and finished, and what must be the same however often they were interrupted."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import launch
from tenrec_jax.data.synthetic import write_twin
from tenrec_jax.files import flat
from tenrec_jax.sealed import DamagedError, open_sealed

ROOT = Path(__file__).parents[1]
DEADLINE = 300
ROWS = 600
TRAINED = ("retrieval", "ranking")
# What the clock and the number of attempts decide.
OF_THE_CLOCK = {"seconds", "speed", "milliseconds", "test_opened"}
CONTEXT = multiprocessing.get_context("forkserver")
# The last two are imported late by a run, and take seconds.
CONTEXT.set_forkserver_preload([__name__, "matplotlib.backends.backend_svg", "tensorboardX"])


class Lab:
    """One small experiment, a folder for its runs and the compiled programs that they share.

    Args:
        folder: to work in.
        seed: of the moments at which runs are interrupted.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.random = folder, random.Random(seed)
        write_twin(folder / "log.csv", kind="qb_video", rows=ROWS, seed=0, progress=False)
        self.whole = folder / "whole"
        # Read when the server of processes, which the first run starts, imports everything. Before Python 3.13 it looks for modules where
        # the environment says, not where this process does.
        variables = {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            self.finish(self.whole)  # compiles
        self.result = result_of(self.whole)

    def start(self, workdir: Path, *options: str, limit_bytes: int | None = None) -> "Interruptible":
        """Start the run of a workdir, or go on with it. Every run is a process of its own, forked from one that has imported everything.

        Args:
            workdir: of the run.
            options: further ones of the command line.
            limit_bytes: what a file may hold; more is refused by the system, as on a full disk.
        """
        arguments = ["launch.py", *options, f"--workdir={workdir}", f"--config={ROOT / 'tests' / 'both_stages.py'}"]
        # Beside the runs, where there is room.
        log = self.folder / f"{workdir.parent.name}-{workdir.name}.log"
        return Interruptible([*arguments, f"--config.data.path={self.folder / 'log.csv'}"], workdir, log, limit_bytes)

    def finish(self, workdir: Path) -> str:
        """Run to the end; what it said."""
        run = self.start(workdir)
        code, said = run.wait()
        assert code == 0, said
        return said

    def moment(self, seconds: float) -> None:
        """Let up to so many seconds pass."""
        time.sleep(self.random.uniform(0, seconds))


class Interruptible:
    """A running experiment whose standard error is read as it comes."""

    def __init__(self, arguments: list[str], workdir: Path, log: Path, limit_bytes: int | None) -> None:
        self.workdir, self._log = workdir, log
        self._from = self._log.stat().st_size if self._log.exists() else 0
        self._process = CONTEXT.Process(target=_launch, args=(arguments, self._log, limit_bytes))
        self._process.start()

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return not self._process.is_alive()

    def said(self) -> str:
        """Its standard error so far."""
        if not self._log.exists():
            return ""
        with self._log.open() as log:
            log.seek(self._from)
            return log.read()

    def until(self, condition: Callable[[], Any]) -> bool:
        """Wait until something holds; False if the run ended first."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            if self.ended:
                return False
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.001)
        return True

    def writes_checkpoint(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(self.workdir.glob("checkpoints/*/*.writing"))

    def trains(self) -> bool:
        """Whether steps are done: lines of metrics have come since the start."""
        return re.search(r"train \w+ +:? *\d+%.*[1-9]\d*/", self.said()) is not None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def wait(self) -> tuple[int, str]:
        """Its exit code, below 0 the signal that killed it, and standard error, once it has ended."""
        self._process.join(DEADLINE)
        assert self.ended, self.said()
        return self._process.exitcode, self.said()


def _launch(arguments: list[str], log: Path, limit_bytes: int | None) -> None:
    """In the process of a run: what `python experiments/launch.py` does."""
    sys.argv = arguments  # where overrides of a config are looked for
    if limit_bytes is None:
        with log.open("a") as file:
            _print_to(file.fileno())
        sys.exit(launch.main(arguments))
    # The limit is not for the log, which another process writes.
    with subprocess.Popen(["tee", "-a", str(log)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as tee:
        _print_to(tee.stdin.fileno())
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        code = launch.main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        _print_to(os.open(os.devnull, os.O_WRONLY))
    sys.exit(code)


def _print_to(descriptor: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())


class Result(NamedTuple):
    """What a run gives, as far as clock and machine do not decide it."""

    files: dict[str, bytes]
    evaluations: dict[str, Any]
    checkpoints: dict[str, dict[str, np.ndarray]]


def result_of(workdir: Path) -> Result:
    """Weights, metrics and predictions by their bytes, evaluations without durations, and the last checkpoints with optimiser states."""
    names = [*workdir.glob("recommender/*"), *workdir.glob("eval/*.parquet"), workdir / "metrics.jsonl"]
    files = {path.relative_to(workdir).as_posix(): path.read_bytes() for path in names if path.is_file()}
    evaluations = {
        f"{path.name}: {key}": value
        for path in sorted(workdir.glob("eval/*.json"))
        for key, value in flat(json.loads(path.read_text())).items()
        if not OF_THE_CLOCK & {path.stem, *key.split(".")}
    }
    checkpoints = {}
    for stage in TRAINED:
        for step in steps(workdir, stage):
            place = workdir / "checkpoints" / stage / str(step) / "state"
            try:
                open_sealed(place.parent, name="manifest.json", remedy="")
            except (DamagedError, FileNotFoundError):
                continue  # an older one, of which a power cut brought back a part
            shapes = ocp.PyTreeCheckpointer().metadata(place).item_metadata.tree
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            leaves = jax.tree.leaves_with_path(ocp.PyTreeCheckpointer().restore(place, restore_args=how))
            checkpoints[f"{stage}/{step}"] = {jax.tree_util.keystr(path): np.atleast_1d(leaf) for path, leaf in leaves}
    return Result(files, evaluations, checkpoints)


def assert_same_result(found: Result, expected: Result) -> None:
    """Bit by bit. The last checkpoint of each stage is compared, and any other that both have."""
    assert found.files.keys() == expected.files.keys()
    for name, data in expected.files.items():
        assert found.files[name] == data, name
    assert found.evaluations == expected.evaluations
    for stage in TRAINED:
        last = max((name for name in expected.checkpoints if name.startswith(stage)), key=_step_of)
        assert last in found.checkpoints
    for name in found.checkpoints.keys() & expected.checkpoints.keys():
        assert found.checkpoints[name].keys() == expected.checkpoints[name].keys()
        for path, array in expected.checkpoints[name].items():
            other = found.checkpoints[name][path]
            assert (other.dtype, other.shape) == (array.dtype, array.shape)
            assert other.tobytes() == array.tobytes(), f"{name} {path}"


def _step_of(name: str) -> int:
    return int(name.split("/")[1])


def steps(workdir: Path, stage: str) -> list[int]:
    """The steps of a stage's checkpoints."""
    return sorted(int(path.name) for path in (workdir / "checkpoints" / stage).glob("*") if path.name.isdecimal())
