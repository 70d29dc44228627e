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
from pathlib import Path

import pytest
from interrupted_runs import Lab, assert_same_result, result_of, steps

STAGE_LINES = ("[1/6] data", "[3/6] index", "[5/6] evaluate", "[6/6] export")
STOPPED = re.compile(r"Stopped by SIGTERM in stage (\w+) after step (\d+); everything is saved")
SAVED_WITHIN = 5.0


def cut(small: int, whole: int) -> pytest.MarkDecorator:
    """A small number of faults in the suite, the whole number with the slow tests."""
    return pytest.mark.parametrize("count", [small, pytest.param(whole, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@cut(8, 100)
def test_runs_killed_while_they_train_end_as_if_nothing_had_been(lab: Lab, count: int) -> None:
    """Every second kill waits until a checkpoint is being written."""
    kills = in_a_save = runs = failed = lost = 0
    while kills < count:
        workdir, runs = lab.folder / f"killed-{runs}", runs + 1
        newest = dict.fromkeys(("retrieval", "ranking"), 0)
        for _ in range(min(8, count - kills)):
            run = lab.start(workdir)
            ready = run.writes_checkpoint if kills % 2 else run.trains
            if not run.until(ready):
                break
            lab.moment(0.02 if kills % 2 else 0.5)
            in_a_save += run.writes_checkpoint()
            run.signal(signal.SIGKILL)
            code, _ = run.wait()
            failed += code not in (0, -signal.SIGKILL)
            kills += code == -signal.SIGKILL
            for stage, step in newest.items():
                now = max(steps(workdir, stage), default=0)
                lost += now < step
                newest[stage] = now
        lab.finish(workdir)
        assert_same_result(result_of(workdir), lab.result)
        shutil.rmtree(workdir)
    print(f"\nSIGKILL in training: {kills} kills, {in_a_save} inside a save, {runs} runs, {failed} failed, {lost} lost")
    assert failed == lost == 0
    assert in_a_save >= count / 3


@cut(4, 40)
def test_runs_killed_in_other_stages_end_as_if_nothing_had_been(lab: Lab, count: int) -> None:
    kills = missed = runs = 0
    while kills < count:
        workdir, runs = lab.folder / f"stages-{runs}", runs + 1
        for line in STAGE_LINES:
            run = lab.start(workdir)
            assert run.until(lambda line=line, run=run: line in run.said())
            lab.moment(0.5)
            run.signal(signal.SIGKILL)
            killed = run.wait()[0] == -signal.SIGKILL
            kills, missed = kills + killed, missed + (not killed)
            if not killed:
                break
        lab.finish(workdir)
        assert_same_result(result_of(workdir), lab.result)
        shutil.rmtree(workdir)
    print(f"\nSIGKILL in other stages: {kills} kills in {runs} runs, {missed} came too late")


@cut(2, 20)
def test_a_stopped_run_saves_what_it_has_done_and_ends_as_if_nothing_had_been(lab: Lab, count: int) -> None:
    stops, waits, workdir, number = 0, [], lab.folder / "stopped-0", 0
    while stops < count:
        run = lab.start(workdir)
        if not run.until(run.trains):
            number += 1
            assert_same_result(result_of(workdir), lab.result)
            workdir = lab.folder / f"stopped-{number}"
            continue
        lab.moment(0.5)
        began = time.monotonic()
        run.signal(signal.SIGTERM)
        code, said = run.wait()
        if code == 0:
            continue
        waits.append(time.monotonic() - began)
        assert code == 128 + signal.SIGTERM, said
        assert "The same command goes on from there." in said
        stopped = STOPPED.search(said)
        if stopped:  # between two evaluations: the steps since the last checkpoint are in a new one
            assert int(stopped[2]) == steps(workdir, stopped[1])[-1]
        stops += 1
    lab.finish(workdir)
    assert_same_result(result_of(workdir), lab.result)
    print(f"\nSIGTERM: {stops} stops, the longest took {max(waits):.2f} s, 0 steps lost")
    assert max(waits) < SAVED_WITHIN


@cut(1, 20)
def test_a_power_cut_that_brings_back_older_files_changes_no_result(lab: Lab, count: int) -> None:
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
    print(f"\npower cuts: {count}, {restored} files brought back, 0 wrong results")


@cut(2, 40)
def test_damage_to_what_a_stage_left_is_told_and_the_stage_done_again(lab: Lab, count: int) -> None:
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
    print(f"\nfiles of finished stages: {count} damages, {count} told and made again, 0 wrong results")


def is_left_by_a_stage(path: Path) -> bool:
    unread = ("checkpoints", "tensorboard", "timings.jsonl", "report.html", "config.json", "env.json", "DONE", "source")
    return not path.name.startswith(".") and not any(name in path.parts for name in (*unread, "verified.json"))


@cut(2, 10)
def test_a_run_without_room_says_so_and_ends_as_if_nothing_had_been_once_there_is(lab: Lab, count: int) -> None:
    largest = max(path.stat().st_size for path in lab.whole.rglob("*") if path.is_file())
    refused = 0
    for number in range(count):
        workdir = lab.folder / f"full-{number}"
        run = lab.start(workdir, limit_bytes=int(largest * (number + 0.5) / count))
        code, said = run.wait()
        assert code == 2, said
        assert "error: " in said
        assert re.search(r"[Mm]ake room", said), said
        assert "Traceback" not in said
        refused += 1
        lab.finish(workdir)
        assert_same_result(result_of(workdir), lab.result)
        assert not list(workdir.rglob("*.tmp")) + list(workdir.rglob("*.writing"))
        shutil.rmtree(workdir)
    print(f"\nno room: {refused} sizes, each refused with the remedy and finished afterwards")


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
            assert code == 2, said
            assert re.search(r"[Mm]ake room", said), said
            subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=True)
            lab.finish(place / "run")
            assert_same_result(result_of(place / "run"), lab.result)
        finally:
            subprocess.run(["umount", str(place)], check=True)
