"""Devices by name, and the few things that are asked of them, in one table by type.

`torch_mlu` is imported only when an MLU is asked for: the import patches parts of PyTorch.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch

from torch_mlu_backend.errors import UserError

Autocast = Literal["bfloat16", "float16"]
AUTOCAST_TYPES: tuple[Autocast, ...] = ("bfloat16", "float16")
INSTALL_MLU = (
    "Use Cambricon's PyTorch container, or install the torch_mlu wheel that matches this PyTorch from developer.cambricon.com; "
    "source: https://github.com/Cambricon/torch_mlu"
)


class Resolved(NamedTuple):
    """A device that can be used, and why others were passed over, in words."""

    device: torch.device
    notes: tuple[str, ...]


@dataclass(frozen=True)
class DeviceType:
    """What differs between types of devices.

    Attributes:
        synchronize: wait for all work on a device.
        peak_memory: largest number of bytes that tensors took there; None where that is not counted.
        autocast: the reason why autocast to a type is refused, or None.
        tolerance: how far from the CPU's float32 outputs it may be; see `verify`.
    """

    synchronize: Callable[[torch.device], None]
    peak_memory: Callable[[torch.device], int | None]
    autocast: Callable[[Autocast], str | None]
    tolerance: float


def resolve(name: str) -> Resolved:
    """The device that `name` stands for: "cpu", "cuda", "cuda:1", "mlu", "mlu:1", or "auto", an MLU, else a GPU, else the CPU.

    Raises:
        UserError: an unknown name, or a device that this machine or this PyTorch does not have; it says what to install.
    """
    if name == "auto":
        return _first_available()
    try:
        device = torch.device(name if not name.startswith("mlu") else name.replace("mlu", "cpu", 1))
    except RuntimeError as error:
        raise UserError(
            f"{name!r} is not a device: choose auto, mlu, cuda or cpu, with a number such as mlu:1."
        ) from error
    kind = name.partition(":")[0]
    if kind not in TYPES:
        raise UserError(f"{name!r} is not a device: choose auto, mlu, cuda or cpu, with a number such as mlu:1.")
    if (problem := _PROBLEMS[kind]()) is not None:
        raise UserError(problem)
    if kind != "cpu" and device.index is not None and device.index >= (count := _module(kind).device_count()):
        raise UserError(f"{name} was asked for, but this machine has {count} of that type, from {kind}:0.")
    return Resolved(torch.device(name), ())


def autocast(device: torch.device, to: Autocast | None) -> AbstractContextManager[Any]:
    """Products in a shorter type, or nothing where `to` is None.

    Raises:
        UserError: the device lacks that type.
    """
    if to is None:
        return nullcontext()
    if (reason := TYPES[device.type].autocast(to)) is not None:
        raise UserError(f"autocast to {to} on {device}: {reason}")
    return torch.autocast(device.type, dtype=getattr(torch, to))


def _first_available() -> Resolved:
    notes: list[str] = []
    for kind in ("mlu", "cuda"):
        problem = _PROBLEMS[kind]()
        if problem is None:
            return Resolved(torch.device(kind), tuple(notes))
        notes.append(problem)
    return Resolved(torch.device("cpu"), tuple(notes))


def _mlu_problem() -> str | None:
    try:
        importlib.import_module("torch_mlu")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # the last two: built for another PyTorch
        return f"mlu: torch_mlu cannot be imported ({error}). {INSTALL_MLU}"
    return None if _module("mlu").is_available() else "mlu: torch_mlu is installed, but sees no MLU. Look at cnmon."


def _cuda_problem() -> str | None:
    if torch.version.cuda is None and torch.version.hip is None:
        return "cuda: this PyTorch is built without CUDA. Install one from https://pytorch.org/get-started/locally"
    return None if torch.cuda.is_available() else "cuda: PyTorch sees no GPU. Look at nvidia-smi."


def _module(kind: str) -> ModuleType:
    """`torch.cuda` or `torch.mlu`, whose functions have the same names."""
    return getattr(torch, kind)


def _accelerator(kind: str, tolerance: float) -> DeviceType:
    def refused(to: Autocast) -> str | None:
        if to == "bfloat16" and not _module(kind).is_bf16_supported():
            return f"this {kind} device has no bfloat16; float16 it has."
        return None

    return DeviceType(
        lambda device: _module(kind).synchronize(device),
        lambda device: _module(kind).max_memory_allocated(device),
        refused,
        tolerance,
    )


TYPES = {
    "cpu": DeviceType(
        lambda _: None,
        lambda _: None,
        lambda to: None if to == "bfloat16" else "float16 is not computed there; bfloat16 is.",
        1e-5,
    ),
    # Products in TF32 are off by default in PyTorch; the rest is another order of sums.
    "cuda": _accelerator("cuda", 1e-4),
    # What Cambricon's own tests of torch_mlu allow.
    "mlu": _accelerator("mlu", 3e-3),
}
_PROBLEMS: dict[str, Callable[[], str | None]] = {"cpu": lambda: None, "cuda": _cuda_problem, "mlu": _mlu_problem}
