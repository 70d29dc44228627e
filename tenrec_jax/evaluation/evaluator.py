"""Evaluators: constructed once for a set of rows, run on any parameters."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tenrec_jax.data.batches import TimelineBatches, TimelineReader, TrainVocabulary
from tenrec_jax.data.interactions import Interactions
from tenrec_jax.data.row_blocks import stretches
from tenrec_jax.evaluation.places import Places, places_of
from tenrec_jax.models import compiled
from tenrec_jax.timeline import Timeline


class TargetRanks(NamedTuple):
    """Where every target stands in the full catalogue: its row in the table, user and item, its places, and the number of items that
    compete for them, itself counted, [P] each.

    `lists_UK` holds the first K items of each evaluated user, best first, 0 where there are fewer; K is 0 unless asked for.
    """

    row: np.ndarray
    user: np.ndarray
    item: np.ndarray
    places: Places
    candidates: np.ndarray
    lists_UK: np.ndarray


ScoreBlock = Callable[[np.ndarray], np.ndarray]


class RetrievalEvaluator:
    """Ranks what users clicked next among the full catalogue.

    A user's query has seen that user's visible rows; the targets are the clicks of the scored rows. Items in the visible rows are taken
    out of the ranking when `exclude_seen`; a target that is among them has no place, and counts as a miss.

    Args:
        table: the log. vocabulary: ids known from training rows.
        visible: rows that the query may have seen, ascending. targets: rows to be predicted.
        max_length: events that the user tower reads. events_per_batch: slots of a batch of its timelines.
        exclude_seen: see above.
        block: users scored at a time; a block's scores take `block * N * 4` bytes.
        max_users: evaluate an evenly spaced sample of this many users; 0 takes all.
    """

    def __init__(
        self,
        table: Interactions,
        vocabulary: TrainVocabulary,
        visible: np.ndarray,
        targets: np.ndarray,
        *,
        max_length: int,
        events_per_batch: int,
        exclude_seen: bool = True,
        block: int = 256,
        max_users: int = 0,
    ) -> None:
        self._table, self._vocabulary, self._visible = table, vocabulary, visible
        self._exclude_seen, self._block, self._max_length = exclude_seen, block, max_length
        clicked = targets[table.labels_RA[targets, 0] > 0]
        users = np.unique(table.user_R[clicked])
        if max_users and len(users) > max_users:
            users = users[np.linspace(0, len(users) - 1, max_users).astype(int)]
            clicked = clicked[np.isin(table.user_R[clicked], users)]
        self.users, self._clicked = users, clicked
        self._reader = TimelineReader(table, vocabulary, visible)
        windows = self._reader.histories(users, max_length)
        self._batches = TimelineBatches(self._reader, windows, events_per_batch=events_per_batch, next_event=True)

    def run(self, model: nnx.GraphDef, parameters: Any) -> TargetRanks:
        """Ranks under a two-tower model."""
        vectors_ND = item_vectors(model, parameters, self._vocabulary, self._table)
        return self.rank_by(self.queries(model, parameters), vectors_ND)

    def rank_by(self, query_UD: np.ndarray, vectors_ND: np.ndarray | jax.Array, *, list_length: int = 0) -> TargetRanks:
        """Ranks by the inner products of the queries of `users` and the vectors of items 1..N."""

        def scores(users: np.ndarray) -> np.ndarray:
            return np.asarray(_inner_products(query_UD[np.searchsorted(self.users, users)], vectors_ND))

        return self.rank(scores, list_length=list_length)

    def queries(self, model: nnx.GraphDef, parameters: Any) -> np.ndarray:
        """The queries [U, D] of `users` after their visible rows."""
        windows = self._batches.windows
        queries, numbers = list[np.ndarray](), list[np.ndarray]()
        for step in range(self._batches.steps_per_epoch):
            batch = self._batches(step)
            exists_BU = batch.window >= 0
            last_BU = batch.timeline.start + np.where(exists_BU, windows.events[batch.window], 0)
            queries.append(np.asarray(_queries_at(model, parameters, batch.timeline, last_BU))[exists_BU])
            numbers.append(batch.window[exists_BU])
        return np.concatenate(queries)[np.argsort(np.concatenate(numbers))]

    def rank(self, scores: ScoreBlock, *, list_length: int = 0) -> TargetRanks:
        """Ranks under any scorer of users against items 1..N: dense users [B] to scores [B, N].

        Args:
            scores: of a block of users.
            list_length: K of the lists of recommended items, which are cut from the block on the device.
        """
        user_P, item_P = self._table.user_R[self._clicked], self._table.item_R[self._clicked]
        order = np.argsort(user_P, kind="stable")
        first_P, last_P = np.zeros((2, len(user_P)))
        candidates_P = np.zeros(len(user_P), np.int64)
        list_length = min(list_length, self._table.num_items)
        lists = [np.zeros((0, list_length), np.int32)]
        for users in self._blocks():
            block_BN = np.array(scores(users), np.float32)
            if self._exclude_seen:
                row, item = self._seen(users)
                block_BN[row, item - 1] = -np.inf
            lists.append(_best_items(block_BN, list_length))
            low, high = np.searchsorted(user_P[order], users), np.searchsorted(user_P[order], users, side="right")
            row, place = stretches(low, high)
            pair = order[place]
            places = places_of(block_BN[row], item_P[pair] - 1)
            has_place = block_BN[row, item_P[pair] - 1] > -np.inf
            candidates_P[pair] = np.count_nonzero(block_BN > -np.inf, axis=1)[row]
            first_P[pair], last_P[pair] = (np.where(has_place, place, np.inf) for place in places)
        places = Places(first_P, last_P)
        return TargetRanks(self._clicked, user_P, item_P, places, candidates_P, np.concatenate(lists))

    def excluded_items(self, user: int) -> np.ndarray:
        """Items that are taken out of the ranking of a dense user, distinct."""
        return np.unique(self._seen(np.array([user]))[1]) if self._exclude_seen else np.zeros(0, np.int32)

    def target_items(self, user: int) -> np.ndarray:
        """Items that one of `users` clicked in the target rows."""
        return self._table.item_R[self._clicked[self._table.user_R[self._clicked] == user]]

    def history(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        """What a dense user has been shown last, oldest first: dense items [S], and whether they were clicked, bool [S]."""
        rows = self._visible[self._reader.offsets[user] : self._reader.offsets[user + 1]][-self._max_length :]
        return self._table.item_R[rows], self._table.labels_RA[rows, 0] > 0

    def _blocks(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self.users), self._block):
            yield self.users[start : start + self._block]

    def _seen(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        row, place = stretches(self._reader.offsets[users], self._reader.offsets[users + 1])
        return row, self._table.item_R[self._visible[place]]


class RankingEvaluator:
    """Predicts the actions on logged exposures.

    Args:
        batches: windows whose scored events are to be predicted, in the table's order.
        num_rows, num_actions: shape of the predictions.
    """

    def __init__(self, batches: TimelineBatches, num_rows: int, num_actions: int) -> None:
        self._batches, self._shape = batches, (num_rows, num_actions)

    def run(self, model: nnx.GraphDef, parameters: Any) -> np.ndarray:
        """Probabilities float32 [R, A]; NaN in the rows that are not scored."""
        probability_RA = np.full(self._shape, np.nan, np.float32)
        for step in range(self._batches.steps_per_epoch):
            batch = self._batches(step)
            predicted_BTA = np.asarray(_timeline_probabilities(model, parameters, batch.timeline))
            probability_RA[batch.row[batch.score]] = predicted_BTA[batch.score]
        return probability_RA


def item_vectors(model: nnx.GraphDef, parameters: Any, vocabulary: TrainVocabulary, table: Interactions) -> jax.Array:
    """The item tower's vectors of items 1..N, [N, D]; items that no training row mentions share the unknown id."""
    return compiled.item_vectors(model, parameters, vocabulary.item[1:], table.items.category[1:])


@jax.jit(static_argnums=0)
def _queries_at(model: nnx.GraphDef, parameters: Any, timeline: Timeline, slot_BU: jax.Array) -> jax.Array:
    query_BTD = nnx.merge(model, parameters).queries(timeline)
    return jnp.take_along_axis(query_BTD, slot_BU[..., None], axis=1, mode="clip")


def _best_items(scores_BN: np.ndarray, k: int) -> np.ndarray:
    """The items of the k best scores, int32 [B, k]; 0 where the score is -inf."""
    if not k:
        return np.zeros((len(scores_BN), 0), np.int32)
    best_BK, place_BK = jax.lax.top_k(scores_BN, k)
    return np.where(np.asarray(best_BK) > -np.inf, np.asarray(place_BK) + 1, 0).astype(np.int32)


@jax.jit
def _inner_products(query_BD: jax.Array, vectors_ND: jax.Array) -> jax.Array:
    return query_BD @ vectors_ND.T


@jax.jit(static_argnums=0)
def _timeline_probabilities(model: nnx.GraphDef, parameters: Any, timeline: Timeline) -> jax.Array:
    return jax.nn.sigmoid(nnx.merge(model, parameters).timeline_logits(timeline))
