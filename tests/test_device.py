"""Devices by name: what is missing is an error where it was asked for, and a stated reason where it was not."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from torch_mlu_backend import device as devices
from torch_mlu_backend.errors import UserError


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)


def broken_torch_mlu(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    (folder / "torch_mlu.py").write_text(body)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "torch_mlu", raising=False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    "body", ["raise OSError('libcnrt.so: cannot open')", "raise RuntimeError('built for 2.1')", None]
)
def test_a_missing_or_broken_torch_mlu(body: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if body is None:
        monkeypatch.setitem(sys.modules, "torch_mlu", None)
    else:
        broken_torch_mlu(tmp_path, monkeypatch, body)
    with pytest.raises(UserError, match=r"torch_mlu cannot be imported .*Cambricon's PyTorch container"):
        devices.resolve("mlu")
    found = devices.resolve("auto")
    assert found.device == torch.device("cpu")
    assert found.notes[0].startswith("mlu: torch_mlu cannot be imported")
    assert found.notes[1].startswith("cuda: ")


@pytest.mark.usefixtures("no_gpu")
def test_a_named_device_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"built without CUDA"):
        devices.resolve("cuda")
    for name in ("tpu", "mlu:x", "cuda:-1", "", "meta"):
        with pytest.raises(UserError, match=r"is not a device: choose auto, mlu, cuda or cpu"):
            devices.resolve(name)


def test_the_cpu_never_imports_torch_mlu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken_torch_mlu(tmp_path, monkeypatch, "raise SystemExit('imported')")
    assert devices.resolve("cpu") == (torch.device("cpu"), ())


def test_an_mlu_number_beyond_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mlu(ModuleType):
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 2)

    monkeypatch.setitem(sys.modules, "torch_mlu", ModuleType("torch_mlu"))
    monkeypatch.setattr(torch, "mlu", Mlu("mlu"), raising=False)
    with pytest.raises(UserError, match=r"mlu:2 was asked for, but this machine has 2"):
        devices.resolve("mlu:2")


def test_autocast_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"float16 on cpu: float16 is not computed there"):
        devices.autocast(torch.device("cpu"), "float16")
    with devices.autocast(torch.device("cpu"), "bfloat16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with devices.autocast(torch.device("cpu"), None):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_the_table_answers_every_question_for_the_cpu() -> None:
    cpu = devices.TYPES["cpu"]
    cpu.synchronize(torch.device("cpu"))
    assert cpu.peak_memory(torch.device("cpu")) is None
    assert {name: kind.tolerance for name, kind in devices.TYPES.items()} == {"cpu": 1e-5, "cuda": 1e-4, "mlu": 3e-3}
