"""A run's configuration: typed frozen dataclasses, and the way between them and the `ConfigDict` of a config file."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from tenrec_jax.data.id_types import AUTO
from tenrec_jax.data.logs import KIND_NAMES, SEQUENCES, parse_columns, source_files
from tenrec_jax.data.protocols import PROTOCOLS, SPLIT_FILE
from tenrec_jax.data.schema import CUSTOM, TWIN_KINDS
from tenrec_jax.errors import UserError
from tenrec_jax.models.blocks import EncoderConfig
from tenrec_jax.models.features import FeatureConfig
from tenrec_jax.models.ranker import RankerConfig
from tenrec_jax.models.two_tower import TwoTowerConfig
from tenrec_jax.requests import Rules
from tenrec_jax.retrieval.index import IndexConfig
from tenrec_jax.settings import Count, Natural, NonNegative, Settings, Share
from tenrec_jax.settings_reader import read_settings
from tenrec_jax.training.trainer import TrainConfig

STAGES = ("data", "retrieval", "index", "ranking", "validate", "evaluate", "export")


@dataclass(frozen=True)
class DataConfig(Settings):
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
    max_bad_fraction: Share = 0.0
    twin_rows: Count = 300_000
    twin_seed: Natural = 0
    protocol: str = "per_user_order"
    split_seed: Natural = 0
    split_file: str = ""

    def conflicts(self) -> Iterator[str]:
        yield from self._unknown_names()
        if bool(self.columns) != (self.kind == CUSTOM):
            yield f"kind is {self.kind!r} and columns is {self.columns!r}: kind {CUSTOM!r} needs columns, and no other has them"
        elif self.columns:
            try:
                parse_columns(self.columns, "columns")
            except UserError as error:
                yield str(error)
        if self.ids != AUTO and self.kind not in (CUSTOM, SEQUENCES):
            yield f"ids is {self.ids!r}, which is for the kinds {CUSTOM} and {SEQUENCES} alone; those of {self.kind} are integers"
        if bool(self.split_file) != (self.protocol == SPLIT_FILE):
            yield f"protocol is {self.protocol!r} and split_file {self.split_file!r}: {SPLIT_FILE!r} needs one, and no other has it"

    def _unknown_names(self) -> Iterator[str]:
        for name, value, known in (
            ("kind", self.kind, KIND_NAMES),
            ("protocol", self.protocol, (*PROTOCOLS, SPLIT_FILE)),
        ):
            if value not in known:
                yield f"{name} is {value!r};{_nearest(value, known)}"


@dataclass(frozen=True)
class RetrievalConfig(Settings):
    """The retrieval stage.

    Attributes:
        model, train: see their classes.
        events_per_batch: events in a batch, padding counted.
        loss: "sampled_softmax", against in-batch negatives and further draws, or "softmax", against every item that training knows: it
            learns more from an epoch, and a step's cost grows with the catalogue. The next three are of the sampled one alone.
        negatives: draws a step, beside the in-batch negatives.
        negative_popularity: exponent of the items' training clicks by which they are drawn; 0 is uniform over the catalogue.
        log_q: correct scores for the sampling probabilities.
        label_smoothing: share of the target that is taken from the clicked item and spread evenly over all items.
        unknown_rate: share of users and of the rows' items made unknown while training, the rarer items before the others
            (`data.unknown`).
        selection_users: validation users on which the best epoch is chosen; 0 takes all.
    """

    model: TwoTowerConfig
    train: TrainConfig
    events_per_batch: Count = 4096
    loss: Literal["sampled_softmax", "softmax"] = "sampled_softmax"
    negatives: Natural = 512
    negative_popularity: NonNegative = 0.0
    log_q: bool = True
    label_smoothing: Share = 0.0
    unknown_rate: Share = 0.01
    selection_users: Natural = 5000


@dataclass(frozen=True)
class RankingConfig(Settings):
    """The ranking stage.

    Attributes:
        enabled: train a ranker; off where no exposures without a click are logged: then there is nothing true to learn a click probability
            from.
        co_visits: neighbours kept of each item (`tenrec_jax.co_visits`); with them, what retrieval, the ranker, co-visits, popularity and
            subjects say has a part in the order that is fitted on the validation part (`tenrec_jax.order`). 0 does without: the order is
            that of `serving.rules`.
        model, train: see their classes.
        events_per_batch: events in a batch, padding counted.
        unknown_rate: share of users and of the rows' items made unknown while training, the rarer items before the others
            (`data.unknown`).
        action_weights: weight of each action's loss, in the order of the log's actions; the rest is not used.
        pairwise_weight: weight of the loss on pairs of a user's events, which GAUC measures, beside the cross-entropy.
        bias_start: what training starts the biases of users and items from: "rates", the smoothed rate of each, or "effects", a logistic
            regression of all actions on both ids (`evaluation.id_model`), which leaves to each what the other does not explain, lets
            frequent actions tell of rare ones, and shrinks all as the training rows ask for.
        any_order: train on timelines in random order, for logs in which a user's order means little.
    """

    model: RankerConfig
    train: TrainConfig
    enabled: bool = True
    co_visits: Natural = 0
    events_per_batch: Count = 4096
    unknown_rate: Share = 0.02
    action_weights: tuple[NonNegative, ...] = (1.0, 1.0, 1.0, 1.0)
    pairwise_weight: NonNegative = 0.0
    bias_start: Literal["rates", "effects"] = "rates"
    any_order: bool = False

    def conflicts(self) -> Iterator[str]:
        if not any(self.action_weights):
            yield f"action_weights is {self.action_weights}: with no weight above 0 there is nothing to learn"


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """The test evaluation.

    Attributes:
        resamples: of the user-level bootstrap.
        exclude_seen: take items that the user has seen out of the full-catalogue ranking.
        max_users: users of the full-catalogue ranking; 0 takes all.
    """

    resamples: Count = 1000
    exclude_seen: bool = True
    max_users: Natural = 0


@dataclass(frozen=True)
class ServingConfig(Settings):
    """How the recommender answers.

    Attributes:
        candidates: items that retrieval hands to ranking.
        rules: of requests that bring none of their own.
    """

    candidates: Count = 200
    rules: Rules = field(default_factory=Rules)


@dataclass(frozen=True)
class RunConfig(Settings):
    """Everything that decides a run's result."""

    name: str
    seed: Natural
    data: DataConfig
    retrieval: RetrievalConfig
    index: IndexConfig
    ranking: RankingConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)

    def conflicts(self) -> Iterator[str]:
        if Path(self.name).name != self.name:
            yield f"name is {self.name!r}; it must be fit for a folder, runs/NAME"


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
    features = FeatureConfig(max_length=128, dropout=0.2)
    train = TrainConfig(epochs=10, patience=3)
    return RunConfig(
        name="default",
        seed=0,
        data=DataConfig(),
        retrieval=RetrievalConfig(TwoTowerConfig(features, encoder), train),
        index=IndexConfig(),
        ranking=RankingConfig(RankerConfig(features, encoder), train),
    )


def refuse_missing_sources(config: DataConfig) -> None:
    """Refuse a run whose log, or file of parts, is not there. Not judged when the config is made: it may go where they are.

    Raises:
        UserError: names the settings.
    """
    problems = []
    if not config.path and config.kind not in TWIN_KINDS:
        kinds = ", ".join(TWIN_KINDS)
        problems.append(
            f"Name the log: --config.data.path=PATH. A twin is made for {kinds} alone, not for {config.kind}."
        )
    if config.path:
        try:
            source_files([Path(config.path)], config.kind)
        except UserError as error:
            problems.append(f"config.data.path: {error}")
    if config.split_file and not Path(config.split_file).is_file():
        problems.append(f"config.data.split_file is {config.split_file!r}, which is no file: name another one.")
    if problems:
        raise UserError("\n".join(problems))


def to_config_dict(config: RunConfig) -> ConfigDict:
    """The same configuration as a locked, mutable `ConfigDict`."""
    return ConfigDict(dataclasses.asdict(config)).lock()


def from_mapping(values: Mapping[str, Any], kind: type = RunConfig, path: str = "config") -> Any:
    """`settings_reader.read_settings`, of a run's configuration if nothing else is said."""
    return read_settings(values, kind, path)


def _nearest(value: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    return (f" did you mean {near[0]!r}?" if near else "") + f" it must be one of {', '.join(known)}"
