"""The mirror on an MLU: a real one where torch_mlu is installed, a simulated one elsewhere."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import simulated_mlu
from torch.utils import backend_registration

TESTS = Path(__file__).parent


@pytest.mark.skipif(
    importlib.util.find_spec("torch_mlu") is None and not hasattr(backend_registration, simulated_mlu.SETUP),
    reason=f"neither torch_mlu nor, in this PyTorch, the hook {simulated_mlu.SETUP} that a simulated device needs",
)
def test_the_recommender_on_an_mlu() -> None:
    # The device's name is given once a process.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", TESTS / "mlu_cases.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
