"""Runs the inputs of a folder's probe and gathers what the models give, layer by layer, under the names that the exporter uses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_mlu_backend import artifact, safetensors_file, weights
from torch_mlu_backend.modules.blocks import Encoder
from torch_mlu_backend.modules.ranker import Ranker
from torch_mlu_backend.modules.records import Events, Profile
from torch_mlu_backend.modules.two_tower import TwoTower

INPUTS = "inputs/"
Tensors = dict[str, Tensor]


def stored(folder: Path) -> tuple[Tensors, Tensors]:
    """The probe's inputs and the outputs that they should give, on the CPU."""
    tensors = safetensors_file.read(folder / artifact.PROBE).tensors
    inputs = {name.removeprefix(INPUTS): tensor for name, tensor in tensors.items() if name.startswith(INPUTS)}
    return inputs, {name: tensor for name, tensor in tensors.items() if not name.startswith(INPUTS)}


def outputs(folder: Path, inputs: Tensors, device: torch.device) -> Tensors:
    """What the folder's models give on a device, brought back to the CPU as float32."""
    kind = artifact.read_manifest(folder)["kind"]
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    with torch.no_grad():
        found = (
            _of_recommender(folder, inputs, device)
            if kind == artifact.RECOMMENDER
            else _of_original(folder, inputs, device)
        )
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def recorded(folder: Path) -> Tensors:
    """A probe of the folder's own inputs and of what its models give on the CPU now."""
    inputs, _ = stored(folder)
    return {INPUTS + name: tensor for name, tensor in inputs.items()} | outputs(folder, inputs, torch.device("cpu"))


def _of_recommender(folder: Path, inputs: Tensors, device: torch.device) -> Tensors:
    loaded = artifact.load(folder)
    profile = Profile(*(inputs[name] for name in Profile._fields))
    events = Events(*(inputs[name] for name in Events._fields))
    candidates = inputs["candidate_item"], inputs["candidate_category"]
    two_tower = cast(TwoTower, loaded.retrieval.module.to(device))
    start = two_tower.start(profile)
    with _layers(two_tower.encoder) as layers:
        query_BD = two_tower.extend(start, events).query_BD
    scores_BC = (two_tower.item_vectors(*candidates) * query_BD[:, None]).sum(-1)
    found = _prefixed("retrieval", layers | {"query": query_BD, "scores": scores_BC})
    if loaded.ranking is not None:
        ranker = cast(Ranker, loaded.ranking.module.to(device))
        state = ranker.extend(ranker.start(profile), events)
        with _layers(ranker.encoder) as layers:
            logits_BCA = ranker.score(state, *candidates)
        values_A = torch.tensor(loaded.rules.action_values, device=device)
        found |= _prefixed("ranking", layers | {"logits": logits_BCA, "scores": logits_BCA.sigmoid() @ values_A})
    return found


def _of_original(folder: Path, inputs: Tensors, device: torch.device) -> Tensors:
    model = weights.load(folder / artifact.MODEL, artifact.ORIGINAL_RANKER, artifact.ORIGINAL_TWO_TOWER)
    module = model.module.to(device)
    encoder = (
        module.encoder if model.description.kind == artifact.ORIGINAL_RANKER else cast(Any, module).user_tower.encoder
    )
    with _layers(cast(Encoder, encoder)) as layers:
        found = module(**inputs)
    if isinstance(found, Tensor):
        return layers | {"logits": found, "scores": found[..., 0]}
    return layers | found._asdict()


def _prefixed(stage: str, found: Tensors) -> Tensors:
    return {f"{stage}/{name}": tensor for name, tensor in found.items()}


@contextmanager
def _layers(encoder: Encoder) -> Iterator[Tensors]:
    """Gathers the outputs of the encoder's blocks while it runs."""
    found: Tensors = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: tuple[Tensor, Any]) -> None:
            found[name] = output[0]

        return hook

    hooks = [block.register_forward_hook(keep(f"layer_{i:02}")) for i, block in enumerate(encoder.blocks)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
