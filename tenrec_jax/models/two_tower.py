"""Retrieval: a user tower that reads a timeline in one linear pass, and an item tower, compared by an inner product."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from tenrec_jax.models.blocks import EncoderConfig, EncoderState
from tenrec_jax.models.encoders import make_encoder
from tenrec_jax.models.fastformer import l2_normalize
from tenrec_jax.models.features import (
    EventFeatures,
    FeatureConfig,
    ItemFeatures,
    UserFeatures,
    Vocabulary,
    context_tokens,
    event_tokens,
    further_places,
)
from tenrec_jax.settings import Positive, Settings
from tenrec_jax.timeline import Events, Profile, Timeline


@dataclass(frozen=True)
class TwoTowerConfig(Settings):
    """Options of the retrieval model.

    Attributes:
        features, encoder: inputs and the user tower's encoder.
        similarity: "dot", or "cosine" (both towers L2-normalised and the product divided by `temperature`).
        temperature: of the cosine.
        item_bias: add a learned bias an item to the score, as one more entry of its vector; training starts it at the log of the item's
            share of the clicks, so that the towers need only learn what popularity does not tell.
    """

    features: FeatureConfig
    encoder: EncoderConfig
    similarity: Literal["dot", "cosine"] = "dot"
    temperature: Positive = 0.07
    item_bias: bool = False

    def conflicts(self) -> Iterator[str]:
        return self.features.conflicts_with_width(self.encoder.width)


class QueryState(NamedTuple):
    """Users in constant size: the encoder's state, and the query [B, D] for what comes next."""

    encoder: EncoderState
    query_BD: Array


class TwoTower(nnx.Module):
    """Two towers over one item table.

    After each event the user tower gives a query for what comes next, so one pass over a timeline of T events trains T queries.
    `start` and `extend` give the same queries one stretch of events at a time, from a user state of constant size.
    """

    def __init__(self, config: TwoTowerConfig, vocabulary: Vocabulary, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.encoder.width
        self.users = UserFeatures(vocabulary, config.features, width, rngs=rngs)
        self.items = ItemFeatures(vocabulary, config.features, width, rngs=rngs)
        self.events = EventFeatures(vocabulary, config.features, width, rngs=rngs)
        self.dropout = nnx.Dropout(config.features.dropout)
        self.encoder = make_encoder(config.encoder, config.features.max_length, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.item_bias = nnx.Embed(vocabulary.items, 1, embedding_init=zeros, rngs=rngs) if config.item_bias else None

    def queries(self, timeline: Timeline, key: Array | None = None) -> Array:
        """A query for every event.

        Args:
            timeline: T slots a row.
            key: dropout key; None is deterministic.

        Returns:
            [B, T, D]: entry t has seen the user and the events before t. An item bias makes D one larger.
        """
        x_BTD, places, _ = context_tokens(self.users, self.items, self.events, timeline)
        encoder_key = None
        if key is not None:
            rngs = nnx.Rngs(key)
            encoder_key = rngs.encoder()
            x_BTD = self.dropout(x_BTD, rngs=rngs)
        return self._query(self.encoder.context(x_BTD, places, encoder_key))

    def start(self, profile: Profile) -> QueryState:
        """The state of users [B] before their first event."""
        x_B1D = self.users(profile)[:, None]
        state = self.encoder.start(len(x_B1D))
        y_B1D, encoder = self.encoder.extend(state, x_B1D, jnp.ones(x_B1D.shape[:2], bool))
        return QueryState(encoder, self._query(y_B1D)[:, 0])

    def extend(self, state: QueryState, events: Events) -> QueryState:
        """The state after further events, padding at their end."""
        place_BT = further_places(state.encoder.length_B, events.mask)
        x_BTD = event_tokens(self.items, self.events, events, place_BT)
        y_BTD, encoder = self.encoder.extend(state.encoder, x_BTD, events.mask)
        query_BTD = jnp.concatenate([state.query_BD[:, None], self._query(y_BTD)], axis=1)
        last_B11 = events.mask.sum(1)[:, None, None]
        return QueryState(encoder, jnp.take_along_axis(query_BTD, last_B11, axis=1)[:, 0])

    def item_vectors(self, item: Array, category: Array) -> Array:
        """The item tower: integer arrays [...] to vectors [..., D] as long as a query, whose score of an item is their inner product."""
        vector = self._scaled(self.items(item, category), 1.0)
        return vector if self.item_bias is None else _appended(vector, self.item_bias(item))

    def _query(self, y: Array) -> Array:
        query = self._scaled(y, 1.0 / self.config.temperature)
        return query if self.item_bias is None else _appended(query, jnp.ones_like(query[..., :1]))

    def _scaled(self, x: Array, scale: float) -> Array:
        return l2_normalize(x) * scale if self.config.similarity == "cosine" else x


def _appended(x: Array, last: Array) -> Array:
    return jnp.concatenate([x, last], axis=-1)
