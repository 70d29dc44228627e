"""Requests to stop, in real processes and with real signals."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEADLINE = 60

LOOP = """
import sys, time
from tenrec_jax.training.stopping import Stopped, Stopping
with Stopping.installed() as stopping:
    stopping.place = "in stage x"
    stopping.before_exit = lambda: print("written", flush=True)
    {body}
"""
# Steps that must be saved: the loop looks after each.
STEPS = """stopping.hold()
    print("ready", flush=True)
    step = 0
    while not stopping.asked:
        step += 1
        time.sleep(0.001)
    print("saved", flush=True)
    stopped = stopping.stopped(step)
    print(stopped, flush=True)
    sys.exit(stopped.exit_code)"""
# Nothing to save, and a main thread that runs no Python until it is through: a sort of a minute.
BUSY = """import numpy as np
    numbers = np.random.default_rng(0).random(40_000_000, np.float32)
    stopping.hold()
    stopping.release()
    print("ready", flush=True)
    np.sort(numbers, kind="heapsort")"""
# Steps that are never saved: only a second signal ends it.
STUCK = """stopping.hold()
    print("ready", flush=True)
    while not stopping.asked:
        time.sleep(0.001)
    print("again", flush=True)
    time.sleep(3600)"""


def started(body: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP.format(body=body)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_loop_with_unsaved_steps_saves_them_before_it_leaves(number: signal.Signals) -> None:
    process = started(STEPS)
    process.send_signal(number)
    out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + number
    assert out.startswith(f"saved\nStopped by {number.name} in stage x after step ")
    assert "The same command goes on from there." in out


def test_a_process_with_nothing_to_save_ends_while_its_main_thread_is_busy() -> None:
    process = started(BUSY)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + signal.SIGTERM
    assert out == "written\n"  # what was being written is waited for
    assert "Stopped by SIGTERM in stage x; everything is saved." in err


def test_a_second_signal_ends_a_process_that_does_not_save() -> None:
    process = started(STUCK)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "again\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + signal.SIGINT
