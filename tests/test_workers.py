"""Workers and their launcher: real processes that die, hang, are stopped and are started again. No JAX."""

import os
import signal
import threading
from pathlib import Path

import pytest
from launched import DEADLINE, environment, supervised

from tenrec_jax.training.heartbeat import Heartbeat

WAITING_WORKER = """
import os, signal, sys
from pathlib import Path
index, folder = int(os.environ["JAX_PROCESS_ID"]), Path(sys.argv[1])
(folder / f"pid{index}").write_text(str(os.getpid()))
"""


def assert_ended(folder: Path) -> None:
    for index in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / f"pid{index}").read_text()), 0)


def test_when_a_worker_is_killed_the_others_are_stopped_even_if_they_will_not(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    script = f"""{WAITING_WORKER}
if index == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "ready").write_text("")  # returns when worker 1 reads
    signal.pause()
print("last words", flush=True)
(folder / "ready").read_text()
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = supervised("-c", script, tmp_path, options='{"grace_seconds": 0.1}')
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "worker 1 of 2 was killed by SIGKILL (exit code -9)" in err
    assert "The same command resumes the run from its last checkpoint." in err
    assert "[worker 1] last words" in err
    assert_ended(tmp_path)


def test_a_worker_that_refuses_its_input_speaks_for_itself(tmp_path: Path) -> None:
    script = (
        f"{WAITING_WORKER}\nif index == 0:\n    sys.stderr.write('error: no such log')\n    sys.exit(2)\nsignal.pause()"
    )
    process = supervised("-c", script, tmp_path)
    _, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (2, "error: no such log")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_stops_all_workers(number: signal.Signals, tmp_path: Path) -> None:
    process = supervised("-c", f"{WAITING_WORKER}\nprint('ready', flush=True)\nsignal.pause()", tmp_path)
    assert process.stdout.readline() == "ready\n"
    assert process.stderr.readline() == "[worker 1] ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + number
    assert f"Stopped by {number.name}. The same command resumes" in err
    assert_ended(tmp_path)


def test_workers_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    script = f"""{WAITING_WORKER}
from tenrec_jax.training.workers import end_with_launcher
end_with_launcher()
print("ready", flush=True)
signal.pause()
"""
    process = supervised("-c", script, tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    # Worker 0 holds the other end of the pipe: it is closed when the worker has ended.
    process.communicate(timeout=DEADLINE)


def test_a_local_worker_takes_its_share_of_the_cores_and_a_gpu_unless_told_otherwise(tmp_path: Path) -> None:
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS", "NPROC", "OMP_NUM_THREADS")
    script = f"import os; print([os.environ[name] for name in {names}])"
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for given, expected in (({}, [threads, threads]), ({"NPROC": 3, "OMP_NUM_THREADS": 5}, ["3", "5"])):
        process = supervised("-c", script, env=environment(**given))
        out, err = process.communicate(timeout=DEADLINE)
        assert out == f"{['2', '0', '0', *expected]}\n"
        assert err == f"[worker 1] {['2', '1', '1', *expected]}\n"


# Lives until it is told otherwise, and counts how often it was started.
BEATING_WORKER = f"""{WAITING_WORKER}
import time
from tenrec_jax.training import heartbeat
heartbeat.INTERVAL_SECONDS = 0.02
beats = heartbeat.Heartbeat(int(os.environ[heartbeat.HEARTBEAT]), step_seconds=0.1)
starts = folder / f"starts{{index}}"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
again = len(starts.read_text()) > 1
"""
# Both leave in peace once they were started a second time; before, worker 1 does what the test is about.
SECOND_TIME = """
if again:
    sys.exit(0)
"""
# Worker 1 goes on when worker 0 has counted its start; that one then waits.
BOTH_STARTED = """
if index == 0:
    (folder / "started").write_text("")  # returns when worker 1 reads
    signal.pause()
(folder / "started").read_text()
"""
OPTIONS = '{"max_restarts": 2, "heartbeat_seconds": 0.6}'


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "worker 1 of 2 was killed by SIGKILL (exit code -9)"),
        ("sys.exit(3)", "worker 1 of 2 failed (exit code 3)"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "worker 1 of 2 hung"),
        ("beats.step()\nwhile True: pass", "worker 1 of 2 hung"),
    ],
    ids=["killed", "failed", "stopped for good", "busy for ever in a step"],
)
def test_all_workers_are_started_again_when_one_dies_or_hangs(end: str, told: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "started")
    process = supervised("-c", BEATING_WORKER + SECOND_TIME + BOTH_STARTED + end, tmp_path, options=OPTIONS)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    assert told in err
    assert "restart 1 of 2, from the last checkpoint." in err
    assert len((tmp_path / "starts1").read_text()) == 2
    assert_ended(tmp_path)


def test_a_long_evaluation_is_not_taken_for_hanging(tmp_path: Path) -> None:
    """A main thread that runs for much longer than a step may, or than silence is borne, but not in a step."""
    script = (
        BEATING_WORKER + "beats.step()\nbeats.idle()\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass"
    )
    process = supervised("-c", script, tmp_path, options=OPTIONS)
    _, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (0, "")


def test_workers_are_started_again_as_often_as_was_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "started")
    process = supervised("-c", BEATING_WORKER + BOTH_STARTED + "sys.exit(3)", tmp_path, options=OPTIONS)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert [f"restart {number} of 2" in err for number in (1, 2, 3)] == [True, True, False]
    assert "2 restarts are used up. The same command resumes the run from its last checkpoint." in err
    assert len((tmp_path / "starts1").read_text()) == 3
    assert_ended(tmp_path)


def test_a_stop_while_workers_are_ended_for_a_restart_is_followed_by_none(tmp_path: Path) -> None:
    """A child of worker 1 outlives it, sees worker 0 end by the launcher's hand, and only then stops the launcher, which waits for it."""
    script = f"""{BEATING_WORKER}
if index == 0:
    held = (folder / "held").open("w")  # returns when the child of worker 1 reads
    signal.pause()
launcher = os.getppid()
if os.fork():
    (folder / "ready").read_text()
    os.kill(os.getpid(), signal.SIGKILL)
ends = (folder / "held").open()
(folder / "ready").write_text("")
ends.read()
os.kill(launcher, signal.SIGTERM)
"""
    for name in ("held", "ready"):
        os.mkfifo(tmp_path / name)
    process = supervised("-c", script, tmp_path, options='{"max_restarts": 2}')
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert err == "Stopped by SIGTERM. The same command resumes the run.\n"
    assert len((tmp_path / "starts1").read_text()) == 1
    assert_ended(tmp_path)


def test_after_a_machine_stood_still_nobody_is_taken_for_hung(tmp_path: Path) -> None:
    """A container that is paused, say: the launcher may wake before its workers have beaten."""
    script = f"""{BEATING_WORKER}
if index == 0:
    everybody = [os.getppid(), os.getpid(), int((folder / "other").read_text())]
    frozen = os.fork()
    if not frozen:
        for pid in everybody:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1.2)  # twice as long as silence is borne
        for pid in everybody:
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.1)  # the launcher wakes before anybody beats
        os._exit(0)
    os.waitpid(frozen, 0)
    end = time.monotonic() + 0.3
    while time.monotonic() < end: pass
    (folder / "done").write_text("")  # returns when worker 1 reads
else:
    (folder / "other").write_text(str(os.getpid()))
    (folder / "done").read_text()
"""
    for name in ("other", "done"):
        os.mkfifo(tmp_path / name)
    process = supervised("-c", script, tmp_path, options=OPTIONS)
    _, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("code", [130, 143])
def test_a_worker_that_was_stopped_by_somebody_else_stops_the_run_and_all_may_save(code: int, tmp_path: Path) -> None:
    script = f"""{BEATING_WORKER}
if index == 1:
    (folder / "ready").read_text()
    sys.exit({code})
def save(*_):
    (folder / "saved").write_text("")
    sys.exit({code})
signal.signal(signal.SIGTERM, save)
(folder / "ready").write_text("")
signal.pause()
"""
    os.mkfifo(tmp_path / "ready")
    process = supervised("-c", script, tmp_path, options=OPTIONS)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == code
    assert f"Worker 1 was stopped by {signal.Signals(code - 128).name}" in err
    assert "The same command resumes the run." in err
    assert (tmp_path / "saved").exists()
    assert len((tmp_path / "starts1").read_text()) == 1
    assert_ended(tmp_path)


def test_a_heartbeat_that_nobody_listens_to_does_nothing() -> None:
    beats = Heartbeat.of({})
    beats.step()
    beats.idle()
    assert "heartbeat" not in [thread.name for thread in threading.enumerate()]
