"""Does this machine compute what the exporting one did? The folder's own probe decides, layer by layer and at the outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torch_mlu_backend import device as devices
from torch_mlu_backend import probe
from torch_mlu_backend.device import Autocast
from torch_mlu_backend.errors import UserError

TOP = 20


@dataclass(frozen=True)
class Difference:
    """Of one tensor. `relative` is the largest absolute difference over the largest expected value; `met`: within the tolerance."""

    name: str
    absolute: float
    relative: float
    met: bool


@dataclass(frozen=True)
class Verdict:
    """The outcome.

    Attributes:
        device: where it ran, in words. tolerance: of that type of device.
        differences: of layers and outputs, in the order in which they are computed.
        top: by stage, the share of the best 20 candidates that are found again; a candidate of an equal score counts.
        judged: False with autocast, whose differences are stated, not promised.
        passed: every difference is within the tolerance, and the best candidates are the same.
    """

    device: str
    tolerance: float
    differences: tuple[Difference, ...]
    top: dict[str, float]
    judged: bool
    passed: bool


def verify(folder: Path, device: torch.device, autocast: Autocast | None = None) -> Verdict:
    """Run a folder's probe on a device.

    A difference is within the tolerance t if it is at most t in absolute terms, or t times the tensor's largest expected value where that
    exceeds one.

    Raises:
        UserError: not an exported folder, a file that is missing, damaged or another one, or an autocast that the device lacks.
    """
    with devices.autocast(device, autocast):
        inputs, expected = probe.stored(folder)
        found = probe.outputs(folder, inputs, device)
    if unlike := sorted(found.keys() ^ expected.keys()):
        raise UserError(f"{folder / 'probe.safetensors'} is of another model: {', '.join(unlike)}. Export again.")
    tolerance = devices.TYPES[device.type].tolerance
    differences = tuple(_difference(name, expected[name], found[name], tolerance) for name in found)
    lists = [name for name in found if name.rpartition("/")[2] == "scores"]
    top = {name: _found_again(expected[name], found[name], tolerance) for name in lists}
    passed = all(difference.met for difference in differences) and all(share == 1.0 for share in top.values())
    return Verdict(str(device), tolerance, differences, top, autocast is None, passed)


def report(verdict: Verdict) -> Sequence[str]:
    """The verdict as lines of text."""
    lines = [f"{'':<24} {'largest difference':>20} {'relative':>10}"]
    for name, absolute, relative, met in (
        (d.name, d.absolute, d.relative, d.met or not verdict.judged) for d in verdict.differences
    ):
        lines.append(f"{name:<24} {absolute:>20.3g} {relative:>10.3g}{'' if met else '  BEYOND'}")
    lines += [f"top {TOP} by {name}: {share:.1%} found again" for name, share in verdict.top.items()]
    if verdict.judged:
        word = "PASSED" if verdict.passed else "FAILED"
        lines.append(f"{word} on {verdict.device}: tolerance {verdict.tolerance:g} for this type of device")
    else:
        lines.append(f"not judged: with autocast on {verdict.device}, differences are stated, not promised")
    return lines


def _difference(name: str, expected: Tensor, found: Tensor, tolerance: float) -> Difference:
    if expected.shape != found.shape:
        raise UserError(f"{name} is {tuple(found.shape)}, the probe holds {tuple(expected.shape)}. Export again.")
    absolute, scale = float((found - expected).abs().max()), float(expected.abs().max())
    # Written so that NaN is not within it.
    return Difference(name, absolute, absolute / max(scale, 1e-30), absolute <= tolerance * max(1.0, scale))


def _found_again(expected_BC: Tensor, found_BC: Tensor, tolerance: float) -> float:
    """The share of the best candidates whose expected score is that of one of the best."""
    k = min(TOP, expected_BC.shape[1])
    worst_B1 = expected_BC.topk(k).values[:, -1:]
    chosen_BK = expected_BC.gather(1, found_BC.topk(k).indices)
    slack = 2 * tolerance * max(1.0, float(expected_BC.abs().max()))
    return float((chosen_BK >= worst_B1 - slack).float().mean())
