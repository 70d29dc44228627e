"""The data of a run, as its stages ask for it: the table, its split, training batches, evaluators."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from tenrec_jax.config import RankingConfig, RetrievalConfig, RunConfig
from tenrec_jax.data.batches import (
    TimelineBatches,
    TimelineReader,
    TrainVocabulary,
)
from tenrec_jax.data.interactions import Interactions, open_table
from tenrec_jax.data.neighbours import neighbour_item_vectors
from tenrec_jax.data.protocols import Part, Split, make_split
from tenrec_jax.data.sampling import NegativeSampler, PopularItems, UniformItems, WholeCatalogue
from tenrec_jax.data.spectral import spectral_item_vectors
from tenrec_jax.data.unknown import UnknownRates
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.baselines import TrainCounts, item_rate, train_counts, user_rate
from tenrec_jax.evaluation.evaluator import RankingEvaluator, RetrievalEvaluator
from tenrec_jax.evaluation.id_model import id_effects
from tenrec_jax.models.features import FeatureConfig, Vocabulary
from tenrec_jax.models.hashing import HashedIds
from tenrec_jax.models.ranker import Ranker, TimelineRanker
from tenrec_jax.training.id_spaces import ITEM, USER
from tenrec_jax.training.tasks import Evaluate, RankingTask, RetrievalTask


class RunData:
    """An ingested log under a run's configuration.

    Args:
        config: of the run.
        folder: the table.
        devices: batch sizes are multiples of it.
    """

    def __init__(self, config: RunConfig, folder: Path, devices: int) -> None:
        self._config, self._folder, self._devices = config, folder, devices

    @cached_property
    def table(self) -> Interactions:
        """The log."""
        return open_table(self._folder)

    @cached_property
    def split(self) -> Split:
        """Which rows train, validate and test."""
        config = self._config.data
        file = Path(config.split_file) if config.split_file else None
        return make_split(config.protocol, self.table, seed=config.split_seed, file=file)

    @cached_property
    def trained(self) -> TrainVocabulary:
        """Ids that training rows mention."""
        return TrainVocabulary.of(self.table, self.split)

    @cached_property
    def counts(self) -> TrainCounts:
        """What the baselines count in the training rows."""
        return train_counts(self.table, self.split.rows(Part.TRAIN))

    @property
    def known_items(self) -> np.ndarray:
        """Items that training rows mention: those that can be retrieved."""
        return self.trained.item[self.trained.item > 0]

    def model_ids(self, features: FeatureConfig) -> TrainVocabulary:
        """The ids by which models know users and items: those that training rows mention, and any where the table is hashed."""
        user, item = self.trained.user, self.trained.item
        return TrainVocabulary(
            user=np.arange(len(user), dtype=np.int32) if USER in features.hashed_tables else user,
            item=np.arange(len(item), dtype=np.int32) if ITEM in features.hashed_tables else item,
        )

    def hashed(self, features: FeatureConfig) -> dict[str, HashedIds]:
        """Where users and items lie in the tables that are hashed, by id space."""
        raw_id = {ITEM: self.table.items.raw_id, USER: self.table.users.raw_id}
        return {space: HashedIds.of(raw_id[space], table) for space, table in features.hashed_tables.items()}

    @property
    def vocabulary(self) -> Vocabulary:
        """Table sizes of the models."""
        table = self.table
        return Vocabulary(
            users=table.num_users + 1,
            items=table.num_items + 1,
            genders=int(table.users.gender.max(initial=0)) + 1,
            ages=int(table.users.age.max(initial=0)) + 1,
            categories=int(table.items.category.max(initial=0)) + 1,
            actions=len(table.actions),
        )

    def retrieval_task(self, evaluate: Evaluate) -> RetrievalTask:
        """The retrieval stage's training task.

        Raises:
            UserError: no training row is a click, or the batch cannot be divided into micro-batches.
        """
        config, table = self._config.retrieval, self.table
        clicks_N1 = self.counts.item_actions_N1A[:, 0]
        if not clicks_N1.sum():
            raise UserError(
                "The training rows hold no click, so there is nothing to retrieve. Check the log and the protocol."
            )
        return RetrievalTask(
            config.model,
            self.vocabulary,
            batches=self._training_batches("retrieval", config),
            negatives=self._negatives(clicks_N1),
            in_batch=PopularItems(clicks_N1, 1.0),
            category=table.items.category,
            hashed=self.hashed(config.model.features),
            log_q=config.log_q,
            label_smoothing=config.label_smoothing,
            item_start=self._item_start(config),
            evaluate=evaluate,
        )

    def _negatives(self, clicks_N1: np.ndarray) -> NegativeSampler | WholeCatalogue:
        config = self._config.retrieval
        if config.loss == "softmax":
            return WholeCatalogue(UniformItems.of_trained(self.trained))
        alpha = config.negative_popularity
        items = PopularItems(clicks_N1, alpha) if alpha else UniformItems.of_catalogue(self.trained)
        return NegativeSampler(items, config.negatives, self._config.seed)

    def ranking_task(self, evaluate: Evaluate, ranker: Callable[..., TimelineRanker] = Ranker) -> RankingTask:
        """The ranking stage's training task; `ranker` makes the model, with the arguments of `Ranker`.

        Raises:
            UserError: the log holds clicks alone, or the batch cannot be divided into micro-batches.
        """
        config, actions = self._config.ranking, self.table.actions
        if not self.table.has_exposures:
            raise UserError(
                "This log holds clicks alone, so there is nothing to rank by: set config.ranking.enabled to False."
            )
        user_rate_U1A, item_rate_N1A = self._start_rates(config.bias_start == "effects")
        return RankingTask(
            config.model,
            self.vocabulary,
            batches=self._training_batches("ranking", config, any_order=config.any_order),
            hashed=self.hashed(config.model.features),
            action_weights=config.action_weights[: len(actions)],
            pairwise_weight=config.pairwise_weight,
            item_rate=item_rate_N1A,
            user_rate=user_rate_U1A,
            item_start=self._item_start(config),
            evaluate=evaluate,
            ranker=ranker,
        )

    def retrieval_evaluator(self, part: Part, max_users: int) -> RetrievalEvaluator:
        """Ranks the clicks of `part` for users who have seen the parts before it; in an unordered split, all their training rows.

        Raises:
            UserError: the part holds no click.
        """
        rows = self.split.rows(part)
        if not self.table.labels_RA[rows, 0].any():
            raise UserError(
                f"The protocol {self.split.protocol} leaves no {part.name.lower()} clicks in this log: it is too small."
            )
        features = self._config.retrieval.model.features
        return RetrievalEvaluator(
            self.table,
            self.model_ids(features),
            np.flatnonzero(self.split.context_of(Part(part - 1))),
            rows,
            max_length=features.max_length,
            events_per_batch=self._config.retrieval.events_per_batch,
            exclude_seen=self._config.evaluation.exclude_seen,
            max_users=max_users,
        )

    def ranking_evaluator(self, part: Part) -> RankingEvaluator:
        """Predicts the exposures of `part`, each from the events before it that it may see (`Split.context_of`)."""
        config = self._config.ranking
        max_length = config.model.features.max_length
        # Half a window at a time: every scored event has at least the other half as its context, where there is one.
        batches = self._batches(config, part, stride=max(1, max_length // 2), seed=None)
        return RankingEvaluator(batches, *self.table.labels_RA.shape)

    def _start_rates(self, effects: bool) -> tuple[np.ndarray, np.ndarray]:
        """The rates [U + 1, A] and [N + 1, A] that biases start from; see `RankingConfig.bias_start`."""
        table = self.table
        if effects:
            rows = self.split.rows(Part.TRAIN)
            ids, label_TA = (table.user_R[rows], table.item_R[rows]), table.labels_RA[rows]
            return id_effects(*ids, label_TA, users=table.num_users + 1, items=table.num_items + 1).rates()
        pairs = [(user_rate(self.counts, action), item_rate(self.counts, action)) for action in table.actions]
        by_user, by_item = zip(*pairs, strict=True)
        return np.stack(by_user, axis=1), np.stack(by_item, axis=1)

    def _item_start(self, config: RetrievalConfig | RankingConfig) -> np.ndarray | None:
        start = config.model.features.item_start
        if start == "normal":
            return None
        rows, width = self.split.rows(Part.TRAIN), config.model.encoder.width
        vectors = spectral_item_vectors if start == "spectral" else neighbour_item_vectors
        return vectors(self.table, rows, width, seed=self._config.seed)

    def _training_batches(
        self, stage: str, config: RetrievalConfig | RankingConfig, *, any_order: bool = False
    ) -> TimelineBatches:
        stride, share = config.model.features.max_length, config.unknown_rate
        batches = self._batches(
            config,
            Part.TRAIN,
            stride=stride,
            seed=self._config.seed,
            unknown=UnknownRates.of(share, self.counts.item_exposures_N1) if share else None,
            any_order=any_order,
        )
        refuse_uneven_micro_batches(stage, config, batches.rows // self._devices)
        return batches

    def _batches(
        self,
        config: RetrievalConfig | RankingConfig,
        part: Part,
        *,
        stride: int,
        seed: int | None,
        unknown: UnknownRates | None = None,
        any_order: bool = False,
    ) -> TimelineBatches:
        max_length = config.model.features.max_length
        scored, context = self.split.part_R == part, self.split.context_of(part)
        reader = TimelineReader(
            self.table,
            self.model_ids(config.model.features),
            np.flatnonzero(scored | context).astype(self._row_type),
            scored,
            scored_seen=self.split.ordered or part == Part.TRAIN,
        )
        windows = reader.windows(max_length, stride)
        if not len(windows.start):
            raise UserError(f"The protocol {self.split.protocol} leaves no {part.name.lower()} rows in this log.")
        return TimelineBatches(
            reader,
            windows,
            events_per_batch=config.events_per_batch,
            multiple=self._devices,
            seed=seed,
            unknown=unknown,
            any_order=any_order,
        )

    @property
    def _row_type(self) -> type[np.integer]:
        return np.int32 if self.table.num_rows < 2**31 else np.int64


def refuse_uneven_micro_batches(stage: str, config: RetrievalConfig | RankingConfig, rows: int) -> None:
    """A UserError if a device's `rows` of a batch cannot be divided into the micro-batches of a stage's configuration."""
    accumulate = config.train.accumulate
    if rows % accumulate:
        divisors = ", ".join(str(number) for number in range(1, rows + 1) if rows % number == 0)
        raise UserError(
            f"config.{stage}.train.accumulate is {accumulate}, but a device has {rows} rows of a batch of "
            f"config.{stage}.events_per_batch={config.events_per_batch}: accumulate over {divisors}, or change events_per_batch."
        )
