"""A run's configuration: typed frozen dataclasses, and the way between them and the `ConfigDict` of a config file."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ml_collections import ConfigDict

from tenrec_jax.errors import UserError
from tenrec_jax.models.blocks import EncoderConfig
from tenrec_jax.models.features import FeatureConfig
from tenrec_jax.models.ranker import RankerConfig
from tenrec_jax.models.two_tower import TwoTowerConfig
from tenrec_jax.retrieval.index import IndexConfig
from tenrec_jax.training.trainer import TrainConfig

STAGES = ("data", "retrieval", "index", "ranking", "evaluate", "export")


@dataclass(frozen=True)
class DataConfig:
    """Where the log comes from and how it is split.

    Attributes:
        kind: format of the source, a kind that `tenrec-jax ingest` knows.
        columns: for kind "custom", which column stands for what, as JSON: {"user": "uid", "item": "vid", "click": "watched"}.
        allow_post_event_features: let `columns` make a feature of what is known only after the exposure.
        ids: for the kinds "custom" and "sequences": whether ids are "integer" or "text"; "auto" takes them to be what the first one is.
        duplicates: rows that equal an earlier row of the user in every column: "keep" or "drop_exact".
        max_bad_fraction: share of damaged rows above which the log is refused; those below it are left out and listed.
        path: the source file, folder or archive; empty makes a synthetic twin of `kind`.
        twin_rows, twin_seed: size and seed of the twin.
        protocol: named split and evaluation protocol, or "split_file".
        split_seed: of the protocols that draw; apart from the run's seed, so that several runs share one split.
        split_file: the parts of the rows, for the protocol "split_file": a CSV or Parquet file with the columns row and part.
    """

    kind: str = "qb_video"
    path: str = ""
    columns: str = ""
    ids: Literal["auto", "integer", "text"] = "auto"
    allow_post_event_features: bool = False
    duplicates: Literal["keep", "drop_exact"] = "keep"
    max_bad_fraction: float = 0.0
    twin_rows: int = 300_000
    twin_seed: int = 0
    protocol: str = "per_user_order"
    split_seed: int = 0
    split_file: str = ""


@dataclass(frozen=True)
class RetrievalConfig:
    """The retrieval stage.

    Attributes:
        model, train: see their classes.
        events_per_batch: events in a batch, padding counted.
        negatives: draws a step, beside the in-batch negatives.
        negative_popularity: exponent of the items' training clicks by which they are drawn; 0 is uniform over the catalogue.
        log_q: correct scores for the sampling probabilities.
        unknown_rate: share of items and users made unknown while training.
        selection_users: validation users on which the best epoch is chosen; 0 takes all.
    """

    model: TwoTowerConfig
    train: TrainConfig
    events_per_batch: int = 4096
    negatives: int = 512
    negative_popularity: float = 0.0
    log_q: bool = True
    unknown_rate: float = 0.01
    selection_users: int = 5000


@dataclass(frozen=True)
class RankingConfig:
    """The ranking stage.

    Attributes:
        enabled: off where no exposures without a click are logged: then there is nothing true to learn a click probability from.
        model, train: see their classes.
        events_per_batch: events in a batch, padding counted.
        unknown_rate: share of items and users made unknown while training.
        action_weights: weight of each action's loss, in the order of the log's actions; the rest is not used.
        pairwise_weight: weight of the loss on pairs of a user's events, which GAUC measures, beside the cross-entropy.
        any_order: train on timelines in random order, for logs in which a user's order means little.
    """

    model: RankerConfig
    train: TrainConfig
    enabled: bool = True
    events_per_batch: int = 4096
    unknown_rate: float = 0.02
    action_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    pairwise_weight: float = 0.0
    any_order: bool = False


@dataclass(frozen=True)
class EvaluationConfig:
    """The test evaluation.

    Attributes:
        resamples: of the user-level bootstrap.
        exclude_seen: take items that the user has seen out of the full-catalogue ranking.
        max_users: users of the full-catalogue ranking; 0 takes all.
    """

    resamples: int = 1000
    exclude_seen: bool = True
    max_users: int = 0


@dataclass(frozen=True)
class ServingConfig:
    """How the recommender answers.

    Attributes:
        candidates: items that retrieval hands to ranking.
        action_values: worth of each action in the final order, in the order of the log's actions.
    """

    candidates: int = 200
    action_values: tuple[float, ...] = (1.0, 2.0, 4.0, 3.0)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result."""

    name: str
    seed: int
    data: DataConfig
    retrieval: RetrievalConfig
    index: IndexConfig
    ranking: RankingConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)


def default_config() -> RunConfig:
    """A small model that trains in minutes on two cores; config files start from it."""
    encoder = EncoderConfig(
        num_layers=2,
        width=64,
        num_heads=4,
        hidden=128,
        activation="relu",
        normalize=False,
        recency_bias=True,
        dropout=0.2,
        unroll=True,
    )
    features = FeatureConfig(max_length=128)
    train = TrainConfig(epochs=10, patience=3)
    return RunConfig(
        name="default",
        seed=0,
        data=DataConfig(),
        retrieval=RetrievalConfig(TwoTowerConfig(features, encoder), train),
        index=IndexConfig(),
        ranking=RankingConfig(RankerConfig(features, encoder), train),
    )


def to_config_dict(config: RunConfig) -> ConfigDict:
    """The same configuration as a locked, mutable `ConfigDict`."""
    return ConfigDict(dataclasses.asdict(config)).lock()


def from_mapping(values: Mapping[str, Any], kind: type = RunConfig, path: str = "config") -> Any:
    """Build a dataclass from nested mappings.

    Args:
        values: one entry a field; missing fields take their defaults.
        kind: the dataclass.
        path: dotted name of `values`, for messages.

    Raises:
        UserError: an unknown key (with the nearest known one), a missing key or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f" Did you mean {path}.{near[0]}?" if near else f" Known keys: {', '.join(hints)}."
            raise UserError(f"{path}.{key} is not a setting.{hint}")
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}.")
    typed = {key: _value(value, hints[key], f"{path}.{key}") for key, value in values.items()}
    try:
        return kind(**typed)
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from None


def _value(value: Any, hint: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise UserError(f"{path} is {value!r}; it must hold {', '.join(typing.get_type_hints(hint))}.")
        return from_mapping(value, hint, path)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise UserError(f"{path} is {value!r}; it must be one of {', '.join(map(repr, typing.get_args(hint)))}.")
        return value
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        return tuple(_value(entry, element, f"{path}[{i}]") for i, entry in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{path} is {value!r}, a {type(value).__name__}; it must be a {hint.__name__}.")
    return value
