"""How parameters are called here and in PyTorch: one table for the mirror `torch_mlu_backend`, in both directions.

A layer has the same name on both sides, except that the blocks of an encoder are stacked on a leading axis here and numbered there
(`{layer}`). Its parameters are called and laid out as each framework does: a dense `kernel` [in, out] is a `weight` [out, in].
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tenrec_jax.errors import UserError

Shape = tuple[int, ...]


class Leaf(NamedTuple):
    """A parameter of a layer: its name there and here, and whether it is transposed on the way."""

    torch: str
    flax: str
    transpose: bool = False


LINEAR = (Leaf("weight", "kernel", transpose=True), Leaf("bias", "bias"))
LAYER_NORM = (Leaf("weight", "scale"), Leaf("bias", "bias"))
EMBEDDING = (Leaf("weight", "embedding"),)
EINSUM = (Leaf("kernel", "kernel"), Leaf("bias", "bias"))


def _own(name: str) -> tuple[Leaf, ...]:
    """A parameter that belongs to no layer of the framework's, the same on both sides."""
    return (Leaf(name, name),)


class Row(NamedTuple):
    """A layer: a pattern of its path here (`{level}` stands for a number), its name there, its parameters."""

    flax: str
    torch: str
    leaves: tuple[Leaf, ...]


ENCODER = (
    Row("blocks.norm1", "blocks.{layer}.norm1", LAYER_NORM),
    Row("blocks.attention.query", "blocks.{layer}.attention.query", LINEAR),
    Row("blocks.attention.key", "blocks.{layer}.attention.key", LINEAR),
    Row("blocks.attention.value", "blocks.{layer}.attention.value", LINEAR),
    Row("blocks.attention.query_weight", "blocks.{layer}.attention.query_weight", LINEAR),
    Row("blocks.attention.key_weight", "blocks.{layer}.attention.key_weight", LINEAR),
    Row("blocks.attention.out_proj", "blocks.{layer}.attention.out_proj", LINEAR),
    Row("blocks.attention", "blocks.{layer}.attention", _own("recency_rate")),
    Row("blocks.norm2", "blocks.{layer}.norm2", LAYER_NORM),
    Row("blocks.ffn.up", "blocks.{layer}.ffn.up", LINEAR),
    Row("blocks.ffn.gate", "blocks.{layer}.ffn.gate", LINEAR),
    Row("blocks.ffn.down", "blocks.{layer}.ffn.down", LINEAR),
    Row("final_norm", "final_norm", LAYER_NORM),
)
PAPER_ATTENTION = (
    Row("query", "query", LINEAR),
    Row("query_att", "query_att", LINEAR),
    Row("key", "key", LINEAR),
    Row("key_att", "key_att", LINEAR),
    Row("transform", "transform", LINEAR),
)
CROSSES = {
    "user_norms.{level}": LAYER_NORM,
    "item_norms.{level}": LAYER_NORM,
    "past_norms.{level}": LAYER_NORM,
    "rates": _own("log_strength"),
    "cross.layers.{level}": LINEAR,
    "deep.layers.{level}": LINEAR,
}
TOWERS = (
    Row("users.id", "users.id", EMBEDDING),
    Row("users.gender", "users.gender", EMBEDDING),
    Row("users.age", "users.age", EMBEDDING),
    Row("users", "users", _own("bias")),
    Row("items.id", "items.id", EMBEDDING),
    Row("items.category", "items.category", EMBEDDING),
    Row("events.action", "events.action", LINEAR),
    Row("events", "events", _own("target")),
    Row("events.position", "events.position", EMBEDDING),
    Row("events.position", "events.position", _own("scale")),
    *(Row(f"encoder.{row.flax}", f"encoder.{row.torch}", row.leaves) for row in ENCODER),
    Row("item_bias", "item_bias", EMBEDDING),
    Row("user_bias", "user_bias", EMBEDDING),
    *(Row(f"crosses.{layer}", f"crosses.{layer}", leaves) for layer, leaves in CROSSES.items()),
    Row("output_norm", "output_norm", LAYER_NORM),
    Row("head", "head", LINEAR),
    Row("head.experts", "head.experts", LINEAR),
    Row("head.gates", "head.gates", LINEAR),
    Row("head.towers", "head.towers", EINSUM),
    Row("head.levels.{level}.experts", "head.levels.{level}.experts", EINSUM),
    Row("head.levels.{level}.gates", "head.levels.{level}.gates", EINSUM),
    Row("head.levels.{level}.shared_gate", "head.levels.{level}.shared_gate", LINEAR),
)
ORIGINAL_RANKER = (
    Row("user_embedding", "user_embedding", EMBEDDING),
    Row("item_embedding", "item_embedding", EMBEDDING),
    Row("gender_embedding", "gender_embedding", EMBEDDING),
    Row("age_embedding", "age_embedding", EMBEDDING),
    Row("category_embedding", "category_embedding", EMBEDDING),
    Row("segment_embedding", "segment_embedding", EMBEDDING),
    Row("pos_encoding", "pos_encoding", _own("pe")),
    *(Row(f"encoder.{row.flax}", f"encoder.{row.torch}", row.leaves) for row in ENCODER),
    Row("output_norm", "output_norm", LAYER_NORM),
    Row("unembedding", "unembedding", LINEAR),
)
ORIGINAL_TWO_TOWER = (
    Row("user_tower.user_embedding", "user_tower.user_embedding", EMBEDDING),
    Row("user_tower.gender_embedding", "user_tower.gender_embedding", EMBEDDING),
    Row("user_tower.age_embedding", "user_tower.age_embedding", EMBEDDING),
    Row("user_tower.item_embedding", "user_tower.item_embedding", EMBEDDING),
    Row("user_tower.action_projection", "user_tower.action_projection", LINEAR),
    Row("user_tower.pos_encoding", "user_tower.pos_encoding", _own("pe")),
    *(Row(f"user_tower.encoder.{row.flax}", f"user_tower.encoder.{row.torch}", row.leaves) for row in ENCODER),
    Row("user_tower.output_projection", "user_tower.output_projection", LINEAR),
    Row("item_tower.item_embedding", "item_tower.item_embedding", EMBEDDING),
    Row("item_tower.category_embedding", "item_tower.category_embedding", EMBEDDING),
    Row("item_tower.up", "item_tower.up", LINEAR),
    Row("item_tower.down", "item_tower.down", LINEAR),
    Row("output_norm", "output_norm", LAYER_NORM),
    Row("unembedding", "unembedding", LINEAR),
)


class Name(NamedTuple):
    """A parameter's name there, `{layer}` in it where it is stacked here, and whether it is transposed."""

    torch: str
    transpose: bool

    @property
    def stacked(self) -> bool:
        """Whether layers are stacked on the leading axis here."""
        return "{layer}" in self.torch


def to_torch(table: Iterable[Row], parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters by our dotted names to those of the mirror, every one a contiguous copy.

    Raises:
        UserError: a parameter has no row in the table; all such are named.
    """
    weights = {}
    for path, name in _names(table, parameters).items():
        for torch_name, array in _unstacked(name, np.asarray(parameters[path])):
            # `safetensors` writes a transposed view wrong, and says nothing.
            weights[torch_name] = np.array(array.T if name.transpose else array, order="C", copy=True)
    return weights


def to_flax(table: Iterable[Row], weights: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `to_torch`; `like` has our names, shapes and dtypes.

    Raises:
        UserError: an entry is missing, left over, misshapen, of another dtype or not finite, or has no row; all such are named.
    """
    names = _names(table, like)
    expected = {
        torch_name: (_torch_shape(name, like[path].shape), np.dtype(like[path].dtype))
        for path, name in names.items()
        for torch_name in _torch_names(name, like[path].shape)
    }
    problems = [f"{name} is missing" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"{name} is left over" for name in sorted(weights.keys() - expected.keys())]
    for name in sorted(expected.keys() & weights.keys()):
        shape, dtype = expected[name]
        array = np.asarray(weights[name])
        if array.shape != shape or array.dtype != dtype:
            problems.append(f"{name} is {array.dtype} {array.shape}, expected {dtype} {shape}")
        elif not np.isfinite(array).all():
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        raise UserError(f"the weights do not fit the model: {'; '.join(problems)}.")
    return {path: _restacked(name, like[path].shape, weights) for path, name in names.items()}


def _names(table: Iterable[Row], paths: Iterable[str]) -> dict[str, Name]:
    patterns = {
        re.escape(f"{row.flax}.{leaf.flax}").replace(r"\{level\}", r"(?P<level>\d+)"): Name(
            f"{row.torch}.{leaf.torch}", leaf.transpose
        )
        for row in table
        for leaf in row.leaves
    }
    names, unknown = {}, []
    for path in paths:
        found = [(match, name) for pattern, name in patterns.items() if (match := re.fullmatch(pattern, path))]
        if not found:
            unknown.append(path)
            continue
        match, name = found[0]
        numbers = match.groupdict()
        names[path] = name._replace(torch=name.torch.replace("{level}", numbers.get("level", "")))
    if unknown:
        raise UserError(f"the mirror has no name for {', '.join(sorted(unknown))}: add a row to interop/names.py.")
    return names


def _torch_names(name: Name, shape: Shape) -> list[str]:
    return [name.torch.replace("{layer}", str(layer)) for layer in range(shape[0])] if name.stacked else [name.torch]


def _torch_shape(name: Name, shape: Shape) -> Shape:
    shape = shape[1:] if name.stacked else shape
    return shape[::-1] if name.transpose else shape


def _unstacked(name: Name, array: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
    return zip(_torch_names(name, array.shape), array if name.stacked else [array], strict=True)


def _restacked(name: Name, shape: Shape, weights: Mapping[str, Any]) -> np.ndarray:
    layers = [np.asarray(weights[torch_name]) for torch_name in _torch_names(name, shape)]
    layers = [layer.T if name.transpose else layer for layer in layers]
    return np.stack(layers) if name.stacked else np.array(layers[0], order="C", copy=True)
