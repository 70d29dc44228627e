"""What a model is built from, field for field as tenrec_jax writes it into an export.

A setting that is not listed here is an error: numbers must not differ in silence from those of the model that was trained.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch_mlu_backend.errors import UserError


@dataclass(frozen=True)
class Vocabulary:
    """Table sizes, entry 0 ("unknown" or "missing") counted; `actions` has no such entry."""

    users: int
    items: int
    genders: int
    ages: int
    categories: int
    actions: int


@dataclass(frozen=True)
class TableConfig:
    """How ids become rows of an embedding table: a row for each. Fields other than `kind` are of hashed tables, which are absent here."""

    kind: Literal["exact"] = "exact"
    hashes: int = 2
    rows: int = 100_000
    combine: str = "sum"


@dataclass(frozen=True)
class FeatureConfig:
    """Which inputs the towers read. `init_scale` and `item_start` are of training from the beginning: not used here.

    Attributes:
        user_id: embed the user's id.
        actions: embed what the user did at an event.
        positions: what is added for an event's place in the timeline.
        max_length: events a timeline may hold; the size of the learned position table.
        dropout: rate on the tokens that go into the encoder, in training mode alone.
        item_table, user_table: how the ids become rows of the embedding tables.
    """

    user_id: bool = True
    actions: bool = True
    positions: Literal["none", "learned", "sinusoidal"] = "none"
    max_length: int = 512
    dropout: float = 0.0
    init_scale: float = 0.02
    item_start: Literal["normal", "spectral", "neighbours"] = "normal"
    item_table: TableConfig = field(default_factory=TableConfig)
    user_table: TableConfig = field(default_factory=TableConfig)


@dataclass(frozen=True)
class EncoderConfig:
    """Shape and options of an encoder. `remat` and `unroll` change no number and are not used here.

    Attributes:
        num_layers, width, num_heads: L, D and H; D is a multiple of H.
        hidden, activation, feed_forward: the feed-forward layer's width, activation, and whether there is one.
        normalize: L2-normalise the pooled query and key per head; of additive attention alone.
        pool_residual: add the pooled key to the output, beside its product with the value; of additive attention alone.
        recency_bias: add `rate_h * position` to the attention's logits.
        dropout: rate inside the encoder, in training mode alone.
        attention: "additive" or "softmax".
        pre_norm: normalise the inputs of attention and feed-forward, not the sums after them.
        dtype: of the matrix products; float32 here. Lower precision is the autocast argument's.
    """

    num_layers: int
    width: int
    num_heads: int
    hidden: int
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    normalize: bool = True
    pool_residual: bool = False
    recency_bias: bool = False
    dropout: float = 0.0
    remat: str = "none"
    unroll: bool = False
    attention: Literal["additive", "softmax"] = "additive"
    pre_norm: bool = True
    feed_forward: bool = True
    dtype: Literal["float32"] = "float32"

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise UserError(f"width {self.width} is no multiple of num_heads {self.num_heads}")


@dataclass(frozen=True)
class HeadsConfig:
    """How the ranker's actions share their last layers; see `modules.heads`."""

    kind: Literal["shared_bottom", "mmoe", "ple", "esmm"] = "shared_bottom"
    experts: int = 4
    expert_width: int = 64
    levels: int = 1


@dataclass(frozen=True)
class CrossConfig:
    """Sizes of the crosses; see `modules.crosses`.

    Attributes:
        layers: of the cross network; 0 leaves all of it out.
        hidden: width of the two layers of the deep network; 0 is none.
        matched_rates: one more field, of how the user has met the candidate's category.
    """

    layers: int = 0
    hidden: int = 128
    matched_rates: bool = True


@dataclass(frozen=True)
class RankerConfig:
    """Inputs, encoder, heads and crosses of the ranking model."""

    features: FeatureConfig
    encoder: EncoderConfig
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    crosses: CrossConfig = field(default_factory=CrossConfig)


@dataclass(frozen=True)
class TwoTowerConfig:
    """Options of the retrieval model.

    Attributes:
        similarity: "dot", or "cosine" over `temperature`.
        item_bias: a learned bias an item, one more entry of its vector.
    """

    features: FeatureConfig
    encoder: EncoderConfig
    similarity: Literal["dot", "cosine"] = "dot"
    temperature: float = 0.07
    item_bias: bool = False


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


def from_mapping(values: Mapping[str, Any], kind: type, path: str) -> Any:
    """Build a dataclass from nested mappings, as read from JSON.

    Args:
        values: one entry a field; missing fields take their defaults.
        kind: the dataclass.
        path: dotted name of `values`, for messages.

    Raises:
        UserError: a setting that the mirror does not know or support, or a missing one.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path} holds no settings.")
    hints = typing.get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise UserError(f"{path} has settings that this mirror does not know: {', '.join(unknown)}. Update it.")
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - values.keys()):
        raise UserError(f"{path} lacks {', '.join(missing)}.")
    return kind(**{key: _value(value, hints[key], f"{path}.{key}") for key, value in values.items()})


def _value(value: Any, hint: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_mapping(value, typing.cast(type, hint), path)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            known = ", ".join(map(repr, typing.get_args(hint)))
            raise UserError(f"{path} is {value!r}, which this mirror does not support; it has {known}.")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{path} is {value!r}; it must be a {hint.__name__}.")
    return value
