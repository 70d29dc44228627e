"""Commands as supervised workers, in processes of their own; and calls of the launcher in this one."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from absl.testing import flagsaver

ROOT = Path(__file__).parents[1]
DEADLINE = 300  # seconds after which a child process counts as hanging
SUPERVISE = """
import json, sys
from tenrec_jax.training.workers import supervise
sys.exit(supervise(sys.argv[2:], 2, **json.loads(sys.argv[1])))
"""


def environment(**variables: object) -> dict[str, str]:
    """This process's, in which scripts import the package that is tested."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | {name: str(value) for name, value in variables.items()}


def supervised(*command: object, options: str = "{}", **popen: object) -> subprocess.Popen[str]:
    """Two workers of a Python command under `supervise`, whose options are JSON."""
    arguments = [sys.executable, "-c", SUPERVISE, options, sys.executable, *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    return subprocess.Popen(list(map(str, arguments)), **(pipes | popen))


def children(pid: int) -> dict[str, int]:
    """Process ids of a launcher's workers, by their index."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pairs = [
        (dict(line.partition("=")[::2] for line in Path(f"/proc/{child}/environ").read_text().split("\0")), child)
        for child in found
    ]
    return {variables["JAX_PROCESS_ID"]: int(child) for variables, child in pairs}


@contextmanager
def in_this_process(monkeypatch: pytest.MonkeyPatch, *words: str) -> Iterator[list[str]]:
    """For calls of the launcher's functions: its command line, and flags that are as before afterwards."""
    line = ["launch.py", *words]
    monkeypatch.setattr(sys, "argv", line)  # where overrides of a config are looked for
    with flagsaver.flagsaver(), warnings.catch_warnings():
        # ml_collections loads config files in a way that Python gives up.
        warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
        yield line
