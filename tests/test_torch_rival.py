"""The benchmarks' rival is the original's ranker: same weights, same outputs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FIXTURE = Path(__file__).parent / "fixtures" / "tenrec_ranker.npz"
BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"


@pytest.fixture
def torch_rival(monkeypatch):
    # Benchmarks are scripts, which find each other in their own folder.
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield __import__("torch_rival")
    sys.modules.pop("torch_rival")


@pytest.fixture
def golden():
    with np.load(FIXTURE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def test_the_rival_reproduces_the_outputs_of_the_original_ranker(torch_rival, golden):
    weights = {
        name.removeprefix("weights/"): torch.from_numpy(array)
        for name, array in golden.items()
        if name.startswith("weights/")
    }
    ranker = torch_rival.load_ranker(weights, json.loads(golden["meta"].tobytes())["num_heads"])
    inputs = torch_rival.Inputs(*(torch.from_numpy(golden[f"inputs/{name}"]) for name in torch_rival.Inputs._fields))
    with torch.no_grad():
        logits = ranker(inputs).numpy()
    np.testing.assert_allclose(logits, golden["outputs/logits"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(logits[..., 0], golden["outputs/scores"], atol=1e-5, rtol=1e-5)
