"""One model's weights as a `.safetensors` file whose header says all that the numbers depend on; tenrec_jax reads and writes the same."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from torch_mlu_backend import safetensors_file
from torch_mlu_backend.config import OriginalConfig, RankerConfig, TwoTowerConfig, Vocabulary, from_mapping
from torch_mlu_backend.errors import UserError
from torch_mlu_backend.modules.blocks import GELU_FORM, LAYER_NORM_EPS
from torch_mlu_backend.modules.original import OriginalRanker, OriginalTwoTower
from torch_mlu_backend.modules.ranker import Ranker
from torch_mlu_backend.modules.two_tower import TwoTower

FORMAT_VERSION = 1


class Kind(NamedTuple):
    """A kind of model: the classes of its module and of its config."""

    module: Any
    config: type


TWO_TOWER, RANKER = "two_tower", "ranker"
KINDS = {
    TWO_TOWER: Kind(TwoTower, TwoTowerConfig),
    RANKER: Kind(Ranker, RankerConfig),
    "original_ranker": Kind(OriginalRanker, OriginalConfig),
    "original_two_tower": Kind(OriginalTwoTower, OriginalConfig),
}


class Description(NamedTuple):
    """What a file says of itself."""

    kind: str
    config: Any
    vocabulary: Vocabulary


class Model(NamedTuple):
    """A module and what it was built from."""

    description: Description
    module: nn.Module


def build(description: Description) -> nn.Module:
    """The module that a file describes, with fresh weights, in evaluation mode."""
    return KINDS[description.kind].module(description.config, description.vocabulary).eval()


def load(path: Path, *expected: str) -> Model:
    """Read a model, on the CPU and in evaluation mode.

    Args:
        expected: kinds of model that it may hold; by default all that there are.

    Raises:
        UserError: the file is absent, damaged, of another format version or another model, or an entry is missing, left over or
            misshapen; all such are named.
    """
    metadata, tensors = safetensors_file.read(path)
    description = _description(path, metadata, expected or tuple(KINDS))
    if metadata.get("sha256") != safetensors_file.digest(tensors):
        raise UserError(f"{path} is damaged: the SHA-256 of its data is not its header's. Copy it again.")
    module = build(description)
    if problems := _problems(tensors, module.state_dict()):
        raise UserError(f"{path} does not fit the model: {'; '.join(problems)}.")
    module.load_state_dict(tensors)
    return Model(description, module)


def save(path: Path, model: Model) -> None:
    """Write a model, from whatever device it is on."""
    weights = model.module.state_dict()
    description = model.description
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "model": description.kind,
        "config": json.dumps(dataclasses.asdict(description.config)),
        "vocabulary": json.dumps(dataclasses.asdict(description.vocabulary)),
        "layer_norm_eps": repr(LAYER_NORM_EPS),
        "gelu": GELU_FORM,
        "sha256": safetensors_file.digest(weights),
    }
    safetensors_file.write(path, weights, metadata)


def _description(path: Path, metadata: dict[str, str], expected: tuple[str, ...]) -> Description:
    version = metadata.get("format_version")
    if version != str(FORMAT_VERSION):
        raise UserError(f"{path} has format version {version}; this mirror reads {FORMAT_VERSION}.")
    if (metadata.get("layer_norm_eps"), metadata.get("gelu")) != (repr(LAYER_NORM_EPS), GELU_FORM):
        raise UserError(f"{path} wants another eps or GELU than {LAYER_NORM_EPS} and {GELU_FORM}.")
    kind = metadata.get("model", "")
    if kind not in expected:
        raise UserError(f"{path} holds a {kind!r}, not a {' or '.join(expected)}.")
    try:
        config = from_mapping(json.loads(metadata["config"]), KINDS[kind].config, f"{path}: config")
        vocabulary = from_mapping(json.loads(metadata["vocabulary"]), Vocabulary, f"{path}: vocabulary")
    except (KeyError, RecursionError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged: its header lacks a readable {error}.") from error
    return Description(kind, config, vocabulary)


def _problems(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} is left over" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        found, wanted = tensors[name], expected[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            problems.append(
                f"{name} is {found.dtype} {tuple(found.shape)}, expected {wanted.dtype} {tuple(wanted.shape)}"
            )
        elif not found.isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
    return problems
