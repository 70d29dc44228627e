"""Ranking: a Fastformer over the user's timeline and the candidates, with one logit an action."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tenrec_jax.models.fastformer import EncoderState, FastformerConfig, FastformerEncoder, layer_norm
from tenrec_jax.models.features import EventFeatures, FeatureConfig, ItemFeatures, UserFeatures, Vocabulary
from tenrec_jax.models.two_tower import context_mask, context_tokens
from tenrec_jax.timeline import Timeline


@dataclass(frozen=True)
class RankerConfig:
    """Inputs and encoder of the ranking model."""

    features: FeatureConfig
    encoder: FastformerConfig


class UserState(NamedTuple):
    """All that scoring needs of users, in constant size: the encoder's pools and the users' biases [B, A]."""

    encoder: EncoderState
    bias_BA: Array


class Ranker(nnx.Module):
    """Predicts each action on a candidate from the user, the timeline and that candidate alone.

    `timeline_logits` trains every logged exposure of a user in one pass; `state` and `score` give the same numbers one candidate set at
    a time, from a user state of constant size.
    """

    def __init__(self, config: RankerConfig, vocabulary: Vocabulary, *, rngs: nnx.Rngs) -> None:
        width = config.encoder.width
        self.users = UserFeatures(vocabulary, config.features, width, rngs=rngs)
        self.items = ItemFeatures(vocabulary, config.features, width, rngs=rngs)
        self.events = EventFeatures(vocabulary, config.features, width, rngs=rngs)
        self.dropout = nnx.Dropout(config.encoder.dropout)
        self.encoder = FastformerEncoder(config.encoder, rngs=rngs)
        self.output_norm = layer_norm(width, rngs)
        # Zero at first: training starts from the item biases alone.
        self.head = nnx.Linear(width, vocabulary.actions, kernel_init=nnx.initializers.zeros, rngs=rngs)
        # The wide part: what items and users tend to do anyway, which the encoder need not spend its width on.
        zeros = nnx.initializers.zeros
        self.item_bias = nnx.Embed(vocabulary.items, vocabulary.actions, embedding_init=zeros, rngs=rngs)
        self.user_bias = (
            nnx.Embed(vocabulary.users, vocabulary.actions, embedding_init=zeros, rngs=rngs)
            if config.features.user_id
            else None
        )

    def timeline_logits(self, timeline: Timeline, key: Array | None = None) -> Array:
        """Logits of every logged event given the events before it.

        Args:
            timeline: events [B, T]; an event's own actions are read by later events alone.
            key: dropout key; None is deterministic.

        Returns:
            [B, T, A].
        """
        x_BTD = context_tokens(self.users, self.items, self.events, timeline)[:, :-1]
        target_BTD = self._target(timeline.item, timeline.category, jnp.arange(timeline.item.shape[1]))
        encoder_key = None
        if key is not None:
            context_key, target_key, encoder_key = jax.random.split(key, 3)
            x_BTD = self.dropout(x_BTD, rngs=nnx.Rngs(context_key))
            target_BTD = self.dropout(target_BTD, rngs=nnx.Rngs(target_key))
        mask_BT = context_mask(timeline.mask)[:, :-1]
        encoded_BTD = self.encoder.timeline(x_BTD, target_BTD, mask_BT, encoder_key)
        return self._logits(encoded_BTD, self._bias(timeline.user), timeline.item)

    def state(self, timeline: Timeline) -> UserState:
        """The users' state after all events of the timeline; its size does not depend on their number."""
        x_BTD = context_tokens(self.users, self.items, self.events, timeline)
        _, encoded = self.encoder.extend(self.encoder.start(x_BTD.shape[0]), x_BTD, context_mask(timeline.mask))
        return UserState(encoded, self._bias(timeline.user))

    def score(self, state: UserState, item_BC: Array, category_BC: Array) -> Array:
        """Logits [B, C, A] of candidates; each is a function of the state and that candidate."""
        # The state counts the user token, so its length minus one is the index of the event to come.
        position_B1 = state.encoder.length_B[:, None] - 1
        target_BCD = self._target(item_BC, category_BC, position_B1)
        return self._logits(self.encoder.isolated(state.encoder, target_BCD), state.bias_BA, item_BC)

    def _target(self, item_BC: Array, category_BC: Array, position: Array) -> Array:
        return self.events.candidates(self.items(item_BC, category_BC), position)

    def _bias(self, user_B: Array) -> Array:
        if self.user_bias is None:
            return jnp.zeros((len(user_B), self.head.out_features))
        return self.user_bias(user_B)

    def _logits(self, x_BCD: Array, bias_BA: Array, item_BC: Array) -> Array:
        return self.head(self.output_norm(x_BCD)) + self.item_bias(item_BC) + bias_BA[:, None]
