"""One model's weights as a `.safetensors` file in PyTorch's names and layout, which the mirror `torch_mlu_backend` reads and writes too.

Its header says all that the numbers depend on: format version, kind of model, config, vocabulary sizes, eps of the layer norms, form of
GELU, and a SHA-256 of the data (`digest`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tenrec_jax.artifact import Model, settings
from tenrec_jax.errors import UserError
from tenrec_jax.files import parsed_json, written_whole
from tenrec_jax.interop import names
from tenrec_jax.interop.original_models import OriginalRanker, OriginalTwoTower
from tenrec_jax.models.blocks import EncoderConfig
from tenrec_jax.models.features import Vocabulary
from tenrec_jax.models.ranker import Ranker, RankerConfig
from tenrec_jax.models.two_tower import TwoTower, TwoTowerConfig
from tenrec_jax.parameters import assembled, named

FORMAT_VERSION = 1
# Both frameworks' own defaults differ from these: Flax has the tanh form of GELU, PyTorch an eps of 1e-5.
LAYER_NORM_EPS, GELU_FORM = 1e-6, "erf"
TWO_TOWER, RANKER, ORIGINAL_RANKER, ORIGINAL_TWO_TOWER = "two_tower", "ranker", "original_ranker", "original_two_tower"


@dataclass(frozen=True)
class OriginalConfig:
    """A model of the original system.

    Attributes:
        encoder: of the ranker; of the two-tower's user tower, which is twice as wide as its vectors.
        positions: rows of the positional table.
        item_hidden, temperature: of the two-tower alone.
    """

    encoder: EncoderConfig
    positions: int
    item_hidden: int = 0
    temperature: float = 0.07


class Kind(NamedTuple):
    """A kind of model: its config's class, how a module is made of config and vocabulary, and its names in PyTorch."""

    config: type
    build: Callable[[Any, Vocabulary], nnx.Module]
    names: Sequence[names.Row]


class Description(NamedTuple):
    """What a file says of itself."""

    kind: str
    config: Any
    vocabulary: Vocabulary


KINDS: Mapping[str, Kind] = {
    TWO_TOWER: Kind(TwoTowerConfig, lambda config, v: TwoTower(config, v, rngs=nnx.Rngs(0)), names.TOWERS),
    RANKER: Kind(RankerConfig, lambda config, v: Ranker(config, v, rngs=nnx.Rngs(0)), names.TOWERS),
    ORIGINAL_RANKER: Kind(
        OriginalConfig,
        lambda config, v: OriginalRanker(config.encoder, v, config.positions, rngs=nnx.Rngs(0)),
        names.ORIGINAL_RANKER,
    ),
    ORIGINAL_TWO_TOWER: Kind(
        OriginalConfig,
        lambda config, v: OriginalTwoTower(
            config.encoder, v, config.positions, config.item_hidden, config.temperature, rngs=nnx.Rngs(0)
        ),
        names.ORIGINAL_TWO_TOWER,
    ),
}


def structure(description: Description) -> Model:
    """The module that a file describes, with abstract parameters."""
    build = KINDS[description.kind].build
    return Model(*nnx.split(nnx.eval_shape(lambda: build(description.config, description.vocabulary))))


def save(path: Path, description: Description, parameters: nnx.State) -> None:
    """Write a model's parameters.

    Raises:
        UserError: the mirror has no name for a parameter.
    """
    weights = names.to_torch(KINDS[description.kind].names, named(parameters))
    header = {
        "format_version": str(FORMAT_VERSION),
        "model": description.kind,
        "config": json.dumps(dataclasses.asdict(description.config)),
        "vocabulary": json.dumps(dataclasses.asdict(description.vocabulary)),
        "layer_norm_eps": repr(LAYER_NORM_EPS),
        "gelu": GELU_FORM,
        "sha256": digest(weights),
    }
    with written_whole(path) as temporary:
        save_file(weights, temporary, header)


def load(path: Path, *expected: str) -> tuple[Description, Model]:
    """Read a file of `save` or of the mirror.

    Args:
        expected: kinds of model that it may hold; by default all that there are.

    Raises:
        UserError: the file is absent, damaged, of another format version or another model, or an entry is missing, left over or misshapen.
    """
    header, weights = read(path)
    version = header.get("format_version")
    if version != str(FORMAT_VERSION):
        raise UserError(f"{path} has format version {version}; this code reads {FORMAT_VERSION}.")
    if header.get("sha256") != digest(weights):
        raise UserError(f"{path} is damaged: the SHA-256 of its data is not its header's. Copy it again.")
    if (header.get("layer_norm_eps"), header.get("gelu")) != (repr(LAYER_NORM_EPS), GELU_FORM):
        raise UserError(f"{path} wants another eps or GELU than {LAYER_NORM_EPS} and {GELU_FORM}.")
    if header.get("model") not in (expected or KINDS):
        raise UserError(f"{path} holds a {header.get('model')!r}, not a {' or '.join(expected or KINDS)}.")
    kind = KINDS[header["model"]]
    try:
        config, vocabulary = (parsed_json(header[name], f"{path}: {name}") for name in ("config", "vocabulary"))
    except KeyError as error:
        raise UserError(f"{path} is damaged: its header lacks {error}.") from error
    description = Description(
        header["model"],
        settings(config, kind.config, path, "config"),
        settings(vocabulary, Vocabulary, path, "vocabulary"),
    )
    model = structure(description)
    try:
        arrays = names.to_flax(kind.names, weights, named(model.parameters))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    parameters = assembled(model.parameters, {name: jnp.asarray(array) for name, array in arrays.items()})
    return description, model._replace(parameters=parameters)


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The header and the arrays of a safetensors file.

    Raises:
        UserError: the file is absent or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}. Copy it again.") from error


def arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, which must hold some names.

    Raises:
        UserError: the file is absent or damaged, or lacks one of them; all such are named.
    """
    _, found = read(path)
    missing = sorted(set(names) - found.keys())
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}. Copy or export it again.")
    return found


def digest(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the entries in order of their names: name, shape and bytes, little-endian."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(f"{name}:{','.join(map(str, weights[name].shape))}\n".encode())
        total.update(np.ascontiguousarray(weights[name]).data)
    return total.hexdigest()
