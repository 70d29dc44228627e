"""How many examples a second a device computes: an example is one candidate scored for a user with a full history."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

from torch_mlu_backend import artifact, probe, weights
from torch_mlu_backend import device as devices
from torch_mlu_backend.device import Autocast
from torch_mlu_backend.modules.ranker import Ranker
from torch_mlu_backend.modules.records import Events, Profile
from torch_mlu_backend.modules.two_tower import TwoTower

WARM_UP, ROUNDS = 3, 10


@dataclass(frozen=True)
class Speed:
    """Median over rounds: what was done, how many examples a second, and the peak memory of the device in bytes where it is known."""

    work: str
    examples_per_second: float
    peak_memory: int | None


def bench(folder: Path, device: torch.device, batch: int = 500, autocast: Autocast | None = None) -> list[Speed]:
    """Measure the models of a folder, with the users of its probe.

    Args:
        folder: exported folder. device: where to run.
        batch: candidates a user.

    Raises:
        UserError: not an exported folder, a damaged one, or an autocast that the device lacks.
    """
    kind = artifact.read_manifest(folder)["kind"]
    inputs, _ = probe.stored(folder)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    runs: dict[str, tuple[int, Callable[[], Any]]] = {}
    if kind != artifact.RECOMMENDER:
        module = weights.load(folder / artifact.MODEL, kind).module.to(device)
        runs["candidates scored, joint"] = inputs["candidate_item_ids"].numel(), lambda: module(**inputs)
    else:
        loaded = artifact.load(folder)
        profile = Profile(*(inputs[name] for name in Profile._fields))
        events = Events(*(inputs[name] for name in Events._fields))
        users = len(profile.user)
        two_tower = cast(TwoTower, loaded.retrieval.module.to(device))
        runs["user queries"] = users, lambda: two_tower.extend(two_tower.start(profile), events)
        if loaded.ranking is not None:
            ranker = cast(Ranker, loaded.ranking.module.to(device))
            # The same candidates over and over: what they are does not matter to the time.
            place_C = (torch.arange(batch) % inputs["candidate_item"].shape[1]).to(device)
            candidates = inputs["candidate_item"][:, place_C], inputs["candidate_category"][:, place_C]
            runs["candidates scored, histories read"] = (
                users * batch,
                lambda: ranker.score(ranker.extend(ranker.start(profile), events), *candidates),
            )
    with torch.no_grad(), devices.autocast(device, autocast):
        return [_speed(work, examples, run, device) for work, (examples, run) in runs.items()]


def _speed(work: str, examples: int, run: Callable[[], Any], device: torch.device) -> Speed:
    of_type, seconds = devices.TYPES[device.type], []
    for _ in range(WARM_UP + ROUNDS):
        began = time.perf_counter()
        run()
        of_type.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return Speed(work, examples / median(seconds[WARM_UP:]), of_type.peak_memory(device))
