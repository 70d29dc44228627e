"""Retrieval: a user tower that reads a timeline in one linear pass, and an item tower, compared by an inner product."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tenrec_jax.models.fastformer import FastformerConfig, FastformerEncoder, l2_normalize
from tenrec_jax.models.features import EventFeatures, FeatureConfig, ItemFeatures, UserFeatures, Vocabulary
from tenrec_jax.timeline import Timeline


@dataclass(frozen=True)
class TwoTowerConfig:
    """Options of the retrieval model.

    Attributes:
        features, encoder: inputs and the user tower's encoder.
        similarity: "dot", or "cosine" (both towers L2-normalised and the product divided by `temperature`).
        temperature: of the cosine.
        item_bias: add a learned bias an item to the score, as one more entry of its vector; training starts it at the log of the item's
            share of the clicks, so that the towers need only learn what popularity does not tell.
    """

    features: FeatureConfig
    encoder: FastformerConfig
    similarity: Literal["dot", "cosine"] = "dot"
    temperature: float = 0.07
    item_bias: bool = False


class TwoTower(nnx.Module):
    """Two towers over one item table.

    After each event the user tower gives a query for what comes next, so one pass over a timeline of T events trains T queries.
    """

    def __init__(self, config: TwoTowerConfig, vocabulary: Vocabulary, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.encoder.width
        self.users = UserFeatures(vocabulary, config.features, width, rngs=rngs)
        self.items = ItemFeatures(vocabulary, config.features, width, rngs=rngs)
        self.events = EventFeatures(vocabulary, config.features, width, rngs=rngs)
        self.dropout = nnx.Dropout(config.encoder.dropout)
        self.encoder = FastformerEncoder(config.encoder, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.item_bias = nnx.Embed(vocabulary.items, 1, embedding_init=zeros, rngs=rngs) if config.item_bias else None

    def queries(self, timeline: Timeline, key: Array | None = None) -> Array:
        """A query before the first event and after each one.

        Args:
            timeline: events [B, T].
            key: dropout key; None is deterministic.

        Returns:
            [B, T + 1, D]: entry t has seen the user and the first t events. An item bias makes D one larger.
        """
        x_BTD = context_tokens(self.users, self.items, self.events, timeline)
        encoder_key = None
        if key is not None:
            rngs = nnx.Rngs(key)
            encoder_key = rngs.encoder()
            x_BTD = self.dropout(x_BTD, rngs=rngs)
        else:
            x_BTD = self.dropout(x_BTD, deterministic=True)
        mask_BT = context_mask(timeline.mask)
        y_BTD, _ = self.encoder.extend(self.encoder.start(x_BTD.shape[0]), x_BTD, mask_BT, encoder_key)
        query_BTD = self._scaled(y_BTD, 1.0 / self.config.temperature)
        return query_BTD if self.item_bias is None else _appended(query_BTD, jnp.ones_like(query_BTD[..., :1]))

    def item_vectors(self, item: Array, category: Array) -> Array:
        """The item tower: integer arrays [...] to vectors [..., D] as long as a query, whose score of an item is their inner product."""
        vector = self._scaled(self.items(item, category), 1.0)
        return vector if self.item_bias is None else _appended(vector, self.item_bias(item))

    def _scaled(self, x: Array, scale: float) -> Array:
        return l2_normalize(x) * scale if self.config.similarity == "cosine" else x


def _appended(x: Array, last: Array) -> Array:
    return jnp.concatenate([x, last], axis=-1)


@jax.jit(static_argnums=0)
def last_queries(graphdef: nnx.GraphDef, parameters: nnx.State, timeline: Timeline) -> Array:
    """The queries [B, D] after all events of the timelines, of a two-tower taken apart by `nnx.split`."""
    query_BTD = nnx.merge(graphdef, parameters).queries(timeline)
    return jnp.take_along_axis(query_BTD, timeline.mask.sum(1)[:, None, None], axis=1)[:, 0]


def context_tokens(users: UserFeatures, items: ItemFeatures, events: EventFeatures, timeline: Timeline) -> Array:
    """The user's token and one token an event: [B, T + 1, D]."""
    user_B1D = users(timeline.user, timeline.gender, timeline.age)[:, None]
    event_BTD = events.context(items(timeline.item, timeline.category), timeline.action)
    return jnp.concatenate([user_B1D, event_BTD], axis=1)


def context_mask(mask_BT: Array) -> Array:
    """The mask of `context_tokens`: the user's token is always real. Returns [B, T + 1]."""
    return jnp.concatenate([jnp.ones_like(mask_BT[:, :1]), mask_BT], axis=1)
