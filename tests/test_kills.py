"""Runs killed, stopped and starved of disk at random moments: the same command finishes them, and nothing differs from an undisturbed run.

Each proof prints its counts. The suite runs a small cut of each, `make test-slow` the whole; `experiments/benchmarks/RESULTS.md` keeps the
last full run.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from interrupted_runs import TRAINED, Lab, assert_same_result, result_of, steps

from tenrec_jax import stages
from tenrec_jax.verify import verify

STAGE_LINES = ("[1/7] data", "[3/7] index", "[5/7] validate", "[6/7] evaluate", "[7/7] export")
STOPPED = re.compile(r"Stopped by SIGTERM in stage (\w+) after step (\d+); everything is saved")


def cut(small: int, whole: int) -> pytest.MarkDecorator:
    """A small number of faults in the suite, the whole number with the slow tests."""
    return pytest.mark.parametrize("count", [small, pytest.param(whole, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize(("kills", "stops"), [(3, 1), pytest.param(100, 20, marks=pytest.mark.slow)])
def test_runs_killed_and_stopped_while_they_train_end_as_if_nothing_had_been(
    lab: Lab, kills: int, stops: int, tell: Callable[[str], None]
) -> None:
    """Every second kill waits until a checkpoint is being written. A stop saves the steps since the last one."""
    wanted = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGKILL] * kills
    left, done = {signal.SIGKILL: kills, signal.SIGTERM: stops}, Counter[str]()
    while any(left.values()):
        workdir, newest = lab.folder / f"interrupted-{done['runs']}", dict.fromkeys(TRAINED, 0)
        done["runs"] += 1
        for number in wanted[done["runs"] :][:12]:
            if not left[number]:
                continue
            run, in_a_save = lab.start(workdir), number == signal.SIGKILL and left[number] % 2
            if not run.until(run.writes_checkpoint if in_a_save else run.trains):
                break
            lab.moment(0.02 if in_a_save else 0.5)
            done["in a save"] += number == signal.SIGKILL and run.writes_checkpoint()
            began = time.monotonic()
            run.signal(number)
            code, said = run.wait()
            if code == 0:
                break
            left[number] -= 1
            if number == signal.SIGTERM:
                done["longest stop, ms"] = max(done["longest stop, ms"], round(1000 * (time.monotonic() - began)))
                assert_saved(workdir, code, said)
            else:
                assert code == -signal.SIGKILL, said
            for stage, step in newest.items():
                newest[stage] = max(steps(workdir, stage), default=0)
                done["lost"] += newest[stage] < step
        lab.finish(workdir)
        assert_same_result(result_of(workdir), lab.result)
        shutil.rmtree(workdir)
    tell(f"in training: {kills} SIGKILL, {done['in a save']} of them inside a save, {stops} SIGTERM, {dict(done)}")
    assert done["lost"] == 0
    assert done["in a save"] >= kills / 3
    assert done["longest stop, ms"] < 5000


def assert_saved(workdir: Path, code: int, said: str) -> None:
    """After SIGTERM: everything is in a checkpoint, whose step is told where it is a new one."""
    assert code == 128 + signal.SIGTERM, said
    assert "The same command goes on from there." in said
    stopped = STOPPED.search(said)
    if stopped:
        assert int(stopped[2]) == steps(workdir, stopped[1])[-1]


@cut(4, 40)
def test_runs_killed_in_other_stages_end_as_if_nothing_had_been(
    lab: Lab, count: int, tell: Callable[[str], None]
) -> None:
    """Of a run whose models are trained, or, for the data, of a new one."""
    done = Counter[str]()
    while done["kills"] < count:
        workdir = lab.folder / f"stages-{done['runs']}"
        done["runs"] += 1
        for line in STAGE_LINES:
            if line == "[3/7] index":
                shutil.rmtree(workdir)
                shutil.copytree(lab.whole, workdir)
                stages.write(workdir, {stage: stages.read(workdir)[stage] for stage in ("data", *TRAINED)})
            run = lab.start(workdir)
            assert run.until(lambda line=line, run=run: line in run.said())
            lab.moment(0.3)
            run.signal(signal.SIGKILL)
            killed = run.wait()[0] == -signal.SIGKILL
            done["kills" if killed else "too late"] += 1
            if line == "[1/7] data":
                assert_same_table(workdir, lab)
        lab.finish(workdir)
        assert_same_result(result_of(workdir), lab.result)
        shutil.rmtree(workdir)
    tell(f"SIGKILL in other stages: {dict(done)}")


def assert_same_table(workdir: Path, lab: Lab) -> None:
    """After another call that makes the table alone."""
    code, said = lab.start(workdir, "--stages=data").wait()
    assert code == 0, said
    manifest = Path("table", "manifest.json")
    assert (workdir / manifest).read_bytes() == (lab.whole / manifest).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("count", [20])
def test_a_power_cut_that_brings_back_older_files_changes_no_result(
    lab: Lab, count: int, tell: Callable[[str], None]
) -> None:
    """Half the files are as they were at an earlier kill, whichever they are: so a disk may be that had not written all."""
    restored = 0
    for number in range(count):
        workdir, older = lab.folder / f"cut-{number}", lab.folder / f"older-{number}"
        for place in (older, None):
            run = lab.start(workdir)
            run.until(run.trains)
            lab.moment(3.0)
            run.signal(signal.SIGKILL)
            run.wait()
            if place:
                shutil.copytree(workdir, place)
        for path in sorted(path for path in older.rglob("*") if path.is_file()):
            if lab.random.random() < 0.5:
                here = workdir / path.relative_to(older)
                here.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, here)
                restored += 1
        lab.finish(workdir)
        assert_same_result(result_of(workdir), lab.result)
        shutil.rmtree(workdir)
    tell(f"power cuts: {count}, {restored} files brought back, 0 wrong results")


@cut(2, 40)
def test_damage_to_what_a_stage_left_is_told_and_the_stage_done_again(
    lab: Lab, count: int, tell: Callable[[str], None]
) -> None:
    """Of a finished run, any file of the table, of weights, index, results and recommender."""
    left = [path for path in sorted(lab.whole.rglob("*")) if path.is_file() and is_left_by_a_stage(path)]
    for number in range(count):
        workdir = lab.folder / f"damaged-{number}"
        shutil.copytree(lab.whole, workdir)
        path = workdir / lab.random.choice(left).relative_to(lab.whole)
        data = bytearray(path.read_bytes())
        data[lab.random.randrange(len(data))] ^= 1 << lab.random.randrange(8)
        path.write_bytes(data)
        said = lab.finish(workdir)
        assert str(path.relative_to(workdir)) in said
        assert_same_result(result_of(workdir), lab.result)
        shutil.rmtree(workdir)
    tell(f"files of finished stages: {count} damages, {count} told and made again, 0 wrong results")


def is_left_by_a_stage(path: Path) -> bool:
    unread = ("checkpoints", "tensorboard", "timings.jsonl", "report.html", "config.json", "env.json", "DONE", "source")
    return not path.name.startswith(".") and not any(name in path.parts for name in (*unread, "verified.json"))


def assert_told_last(code: int, said: str) -> None:
    """Orbax may tell of its threads before; the last thing that is told is what to do."""
    assert code == 2, said
    last = said.rpartition("\nerror: ")[2]
    assert re.search(r"[Mm]ake room", last), said
    assert "Traceback" not in last, said


@pytest.mark.slow
@pytest.mark.parametrize("count", [10])
def test_a_run_without_room_says_so_and_ends_as_if_nothing_had_been_once_there_is(
    lab: Lab, count: int, tell: Callable[[str], None]
) -> None:
    """Under growing limits to what a file may hold."""
    largest = max(path.stat().st_size for path in lab.whole.rglob("*") if path.is_file())
    workdir = lab.folder / "full"
    for number in range(count):
        code, said = lab.start(workdir, limit_bytes=int(largest * (number + 0.5) / count)).wait()
        assert_told_last(code, said)
        for stage in TRAINED:
            for step in steps(workdir, stage):
                assert not [
                    verdict for verdict in verify(workdir / "checkpoints" / stage / str(step)) if verdict.damaged
                ]
    lab.finish(workdir)
    assert_same_result(result_of(workdir), lab.result)
    assert not list(workdir.rglob("*.tmp")) + list(workdir.rglob("*.writing"))
    tell(f"no room: {count} sizes, each refused with the remedy; finished afterwards")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_full_file_system_is_told_and_survived(lab: Lab, tmp_path: Path) -> None:
    for kilobytes in (300, 600, 900, 1200):
        place = tmp_path / str(kilobytes)
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("this system lets nobody mount a small file system")
        try:
            code, said = lab.start(place / "run").wait()
            assert_told_last(code, said)
            subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=True)
            lab.finish(place / "run")
            assert_same_result(result_of(place / "run"), lab.result)
        finally:
            subprocess.run(["umount", str(place)], check=True)
