"""The two stages as tasks for the trainer: what a batch holds and what its loss is."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tenrec_jax.data.batches import TimelineBatches
from tenrec_jax.data.row_blocks import process_rows
from tenrec_jax.data.sampling import ItemSampler, NegativeSampler, WholeCatalogue
from tenrec_jax.models.features import ItemFeatures, Vocabulary
from tenrec_jax.models.hashing import Collisions, HashedIds, HashRows
from tenrec_jax.models.heads import HeadsConfig, by_output, modelled_rates
from tenrec_jax.models.losses import action_losses, pairwise_losses, sampled_softmax
from tenrec_jax.models.ranker import Ranker, RankerConfig, TimelineRanker
from tenrec_jax.models.slots import slots_of
from tenrec_jax.models.two_tower import TwoTower, TwoTowerConfig
from tenrec_jax.parameters import assembled, named
from tenrec_jax.timeline import Timeline
from tenrec_jax.training.id_spaces import HASHED, ITEM, TABLES, located, table_spaces
from tenrec_jax.training.parallel import AXIS
from tenrec_jax.training.trainer import Batch, LossSum

RAREST = 1e-6
Evaluate = Callable[[Any], tuple[float, dict[str, float]]]


class ScoredTimelines(NamedTuple):
    """Timelines, and which of their events count [B, T]."""

    timeline: Timeline
    score: np.ndarray


class RetrievalShared(NamedTuple):
    """What all devices need in a step.

    Attributes:
        item, category: of the drawn negatives, [N].
        in_batch, drawn: probability of each unique item [P] to be a click of a batch, and to be drawn.
        rows: see `LocatedBatch`.
    """

    item: np.ndarray
    category: np.ndarray
    in_batch: np.ndarray
    drawn: np.ndarray
    rows: dict[str, np.ndarray]


class HashedTask:
    """What both stages do with the rows of hashed ids, which are part of a model and no parameters.

    Args:
        model: abstract, of the stage.
        hashed: where the ids of a space lie, for those whose table is hashed.
    """

    name: str
    rate_factors: Mapping[str, np.ndarray] = MappingProxyType({})
    _batches: TimelineBatches

    def __init__(self, model: nnx.Module, hashed: Mapping[str, HashedIds]) -> None:
        self.graphdef, self._rows = nnx.split(model)[0], nnx.state(model, HashRows)
        names = named(nnx.state(model, nnx.Param))
        self.tables = table_spaces({name: TABLES[name] for name in names if name in TABLES}, hashed)
        self._hashed = hashed

    def whole(self, parameters: nnx.State) -> nnx.State:
        """Parameters with the rows of all ids, as the model is evaluated and kept."""
        rows = {HASHED[space][1]: jnp.asarray(ids.rows_Nk) for space, ids in self._hashed.items()}
        return nnx.merge_state(parameters, assembled(self._rows, rows))

    def examples(self, step: int) -> dict[str, Any]:
        """The rows of the table that count in a step's batch."""
        batch = self._batches(step)
        return {"rows": batch.row[batch.score].tolist()}

    def collisions(self) -> list[str]:
        """A line for each hashed table: the shares of the log's ids that share rows, counted."""
        return [
            f"{space} ids: {Collisions.counted(ids.rows_Nk[1:]).describe(len(ids.rows_Nk) - 1, ids.config)}"
            for space, ids in self._hashed.items()
        ]

    def _model(self, parameters: nnx.State, rows: Mapping[str, jax.Array]) -> Any:
        """The model of a batch, with the rows of its unique ids."""
        return nnx.merge(self.graphdef, parameters, assembled(self._rows, rows))


class RetrievalTask(HashedTask):
    """Predict the next clicked item after every event.

    The negatives of a query are the clicked items of the whole batch, over all devices, and draws that all queries share; or, in a full
    softmax, all items.

    Args:
        config: of the model. vocabulary: table sizes.
        batches: training timelines. negatives: the draws, or all items.
        in_batch: how the clicked items of a batch are distributed.
        category: of each item, int32 [N + 1].
        hashed: see `HashedTask`.
        log_q: correct the scores of negatives for how often they are drawn.
        label_smoothing: share of the target that is spread over all items.
        item_start: embeddings [N + 1, D] from which the items' start; None draws them.
        evaluate: see `Task`.
    """

    name = "retrieval"
    labels_per_example = 1

    def __init__(
        self,
        config: TwoTowerConfig,
        vocabulary: Vocabulary,
        *,
        batches: TimelineBatches,
        negatives: NegativeSampler | WholeCatalogue,
        in_batch: ItemSampler,
        category: np.ndarray,
        hashed: Mapping[str, HashedIds],
        log_q: bool,
        label_smoothing: float,
        item_start: np.ndarray | None,
        evaluate: Evaluate,
    ) -> None:
        self._item_start, self._label_smoothing = item_start, label_smoothing
        self._in_batch_probability = in_batch.probability.astype(np.float32)
        self._drawn_probability = negatives.items.probability.astype(np.float32)
        self._make = lambda key: TwoTower(config, vocabulary, rngs=nnx.Rngs(key))
        super().__init__(nnx.eval_shape(lambda: self._make(0)), hashed)
        self._vocabulary = vocabulary
        self._batches, self._negatives, self._category, self._log_q = batches, negatives, category, log_q
        self.steps_per_epoch = batches.steps_per_epoch
        self.evaluate = evaluate

    def init(self, key: jax.Array) -> nnx.State:
        model = self._make(key)
        _start_items(model.items, self._item_start)
        if model.item_bias is not None:
            # One click more for every item: those never clicked start below all others, but not at minus infinity.
            click_N1 = jnp.asarray(self._in_batch_probability)
            share_N1 = click_N1 + jnp.where(click_N1 > 0, click_N1, 1.0).min()
            model.item_bias.embedding[...] = jnp.log(share_N1 / share_N1.sum())[:, None]
        return nnx.state(model, nnx.Param)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        item_N = self._negatives.draw(step)
        batch = self._batches(step)
        ids, timeline, item, category, rows = located(
            batch.timeline, item_N, self._category[item_N], self._vocabulary, self._hashed
        )
        # Padding stands for no item; what is read for it is never used.
        item_P = np.where(ids[ITEM] < self._vocabulary.items, ids[ITEM], 0)
        probabilities = self._in_batch_probability[item_P], self._drawn_probability[item_P]
        shared = RetrievalShared(item, category, *probabilities, rows)
        split = _stretch(ScoredTimelines(timeline, batch.score), process_index, process_count)
        return Batch(split, shared, ids)

    def loss(self, parameters: nnx.State, batch: Batch, key: jax.Array) -> LossSum:
        timeline, shared = batch.split.timeline, batch.shared
        model: TwoTower = self._model(parameters, shared.rows)
        query_BTD, events = model.queries(timeline, key), timeline.events
        query_PD = query_BTD.reshape(-1, query_BTD.shape[-1])
        item_P = events.item.reshape(-1)
        # An item made unknown is no target: nothing tells it from other unknown items.
        counts_P = (batch.split.score & (events.action[..., 0] > 0) & (events.item > 0)).reshape(-1)
        positive_PD = model.item_vectors(item_P, events.category.reshape(-1))
        negative_ND, negative_id_N = model.item_vectors(shared.item, shared.category), shared.item
        log_expected_N = jnp.zeros(shared.item.shape)
        if not isinstance(self._negatives, WholeCatalogue):
            # In-batch negatives: every device's positives.
            gathered_ND, item_N, counts_N = jax.lax.all_gather((positive_PD, item_P, counts_P), AXIS, tiled=True)
            negative_ND = jnp.concatenate([gathered_ND, negative_ND])
            negative_id_N = jnp.concatenate([item_N, negative_id_N])
            real_N = jnp.concatenate([counts_N, jnp.ones(shared.item.shape, bool)])
            log_expected_N = jnp.where(real_N, self._log_expected(shared, negative_id_N, counts_N.sum()), jnp.inf)
        total = sampled_softmax(
            query_PD,
            positive_PD,
            item_P,
            negative_ND,
            negative_id_N,
            log_expected_N,
            counts_P,
            label_smoothing=self._label_smoothing,
        )
        return LossSum(total, counts_P.sum())

    def _log_expected(self, shared: RetrievalShared, item_N: jax.Array, in_batch: jax.Array) -> jax.Array:
        if not self._log_q:
            return jnp.zeros(item_N.shape)
        return jnp.log(in_batch * shared.in_batch[item_N] + len(shared.item) * shared.drawn[item_N])


class RankingTask(HashedTask):
    """Predict every action on every logged exposure from the events before it.

    What makes an action's output moves at a rate that goes with the standard deviation of its label, `sqrt(p (1 - p))`, the largest one at
    the whole rate. Adam moves all weights alike, by the signs of their gradients where these are mostly chance: at one rate, the logits of
    rare actions would be mostly that.

    Args:
        config: of the model. vocabulary: table sizes.
        batches: training timelines.
        hashed: see `HashedTask`.
        action_weights: weight [A] of each action's loss.
        pairwise_weight: weight of the pairwise loss beside the cross-entropy; 0 is off.
        item_rate, user_rate: smoothed rates of each action in the training rows, [N + 1, A] and [U + 1, A]; entry 0 is the overall
            rate. The model starts from them.
        item_start: embeddings [N + 1, D] from which the items' start; None draws them.
        evaluate: see `Task`.
        ranker: makes the model, with the arguments of `Ranker`.
    """

    name = "ranking"

    def __init__(
        self,
        config: RankerConfig,
        vocabulary: Vocabulary,
        *,
        batches: TimelineBatches,
        hashed: Mapping[str, HashedIds],
        action_weights: Sequence[float],
        pairwise_weight: float,
        item_rate: np.ndarray,
        user_rate: np.ndarray,
        item_start: np.ndarray | None,
        evaluate: Evaluate,
        ranker: Callable[..., TimelineRanker] = Ranker,
    ) -> None:
        self._item_start = item_start
        self._make = lambda key: ranker(config, vocabulary, rngs=nnx.Rngs(key))
        super().__init__(nnx.eval_shape(lambda: self._make(0)), hashed)
        self._vocabulary, self._batches, self._weight_A = vocabulary, batches, jnp.asarray(action_weights)
        self._pairwise_weight = pairwise_weight
        self.labels_per_example = int(np.count_nonzero(action_weights))
        self._item_logit, user_logit = (_start_logit(config.heads, rate) for rate in (item_rate, user_rate))
        self._user_logit = user_logit - user_logit[0]
        rate_A = _moderate(user_rate[0])
        deviation_A = np.sqrt(rate_A * (1 - rate_A))
        factors = by_output(config.heads, (deviation_A / deviation_A.max()).astype(np.float32))
        self.rate_factors = {f"head.{name}": factor for name, factor in factors.items()}
        self.steps_per_epoch = batches.steps_per_epoch
        self.evaluate = evaluate

    def init(self, key: jax.Array) -> nnx.State:
        model = self._make(key)
        _start_items(model.items, self._item_start)
        model.item_bias.embedding[...] = jnp.asarray(self._item_logit, jnp.float32)
        if model.user_bias is not None:
            model.user_bias.embedding[...] = jnp.asarray(self._user_logit, jnp.float32)
        return nnx.state(model, nnx.Param)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        batch, nothing = self._batches(step), np.zeros(0, np.int32)
        ids, timeline, _, _, rows = located(batch.timeline, nothing, nothing, self._vocabulary, self._hashed)
        split = _stretch(ScoredTimelines(timeline, batch.score), process_index, process_count)
        return Batch(split, rows, ids)

    def loss(self, parameters: nnx.State, batch: Batch, key: jax.Array) -> LossSum:
        model: TimelineRanker = self._model(parameters, batch.shared)
        timeline, score_BT = batch.split
        logit_BTA = model.timeline_logits(timeline, key)
        action_BTA = timeline.events.action
        losses_A = action_losses(logit_BTA, action_BTA, score_BT)
        if self._pairwise_weight:
            slots = slots_of(timeline.start, score_BT.shape[1])
            pairwise_A = pairwise_losses(logit_BTA, action_BTA, score_BT, slots, jax.random.fold_in(key, 1))
            losses_A = losses_A + self._pairwise_weight * pairwise_A
        return LossSum((losses_A * self._weight_A).sum(), score_BT.sum())


def _stretch(batch: ScoredTimelines, process_index: int, process_count: int) -> ScoredTimelines:
    """A process's rows. All processes assemble the whole batch, since all update the rows of its ids."""
    rows = process_rows(len(batch.score), process_index, process_count)
    return jax.tree.map(lambda x: x[rows], batch)


def _start_logit(heads: HeadsConfig, rate: np.ndarray) -> np.ndarray:
    """The biases at which a model starts from rates. What the training rows never or always show starts as rare or usual."""
    rate = _moderate(modelled_rates(heads, _moderate(rate)))
    return np.log(rate) - np.log1p(-rate)


def _moderate(rate: np.ndarray) -> np.ndarray:
    return np.clip(rate, RAREST, 1 - RAREST)


def _start_items(items: ItemFeatures, start_ND: np.ndarray | None) -> None:
    if start_ND is not None:
        items.id.embedding[...] = jnp.asarray(start_ND)
