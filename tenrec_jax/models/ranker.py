"""Ranking: an encoder over the user's timeline and the candidates, with one logit an action."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tenrec_jax.models.blocks import EncoderConfig, EncoderState, layer_norm
from tenrec_jax.models.crosses import CrossConfig, Crosses, Past
from tenrec_jax.models.encoders import make_encoder
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
from tenrec_jax.models.heads import HeadsConfig, action_logits, make_head
from tenrec_jax.settings import Settings
from tenrec_jax.timeline import Events, Profile, Timeline


@dataclass(frozen=True)
class RankerConfig(Settings):
    """Inputs, encoder, crosses and heads of the ranking model."""

    features: FeatureConfig
    encoder: EncoderConfig
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    crosses: CrossConfig = field(default_factory=CrossConfig)

    def conflicts(self) -> Iterator[str]:
        return self.features.conflicts_with_width(self.encoder.width)


class UserState(NamedTuple):
    """All that scoring needs of users, in constant size: the encoder's state, the users' biases [B, A], and what the crosses keep."""

    encoder: EncoderState
    bias_BA: Array
    past: Past | None


class TimelineRanker(nnx.Module):
    """What rankers of logged timelines have in common: embeddings, and a wide part beside the deep one of each subclass.

    The wide part is a bias for each item and user and action: what they tend to do anyway, which the deep part need not learn.
    """

    def __init__(self, config: RankerConfig, vocabulary: Vocabulary, *, rngs: nnx.Rngs) -> None:
        width = config.encoder.width
        self.users = UserFeatures(vocabulary, config.features, width, rngs=rngs)
        self.items = ItemFeatures(vocabulary, config.features, width, rngs=rngs)
        self.events = EventFeatures(vocabulary, config.features, width, rngs=rngs)
        self.dropout = nnx.Dropout(config.features.dropout)
        self.heads, self.actions = config.heads, vocabulary.actions
        # Zeros, for which nothing is drawn.
        zeros, no_rngs = nnx.initializers.zeros, nnx.Rngs(0)
        self.item_bias = nnx.Embed(vocabulary.items, vocabulary.actions, embedding_init=zeros, rngs=no_rngs)
        self.user_bias = (
            nnx.Embed(vocabulary.users, vocabulary.actions, embedding_init=zeros, rngs=no_rngs)
            if config.features.user_id
            else None
        )

    def timeline_logits(self, timeline: Timeline, key: Array | None = None) -> Array:
        """Logits of every logged event given the events before it.

        Args:
            timeline: T slots a row; an event's own actions are read by later events alone.
            key: dropout key; None is deterministic.

        Returns:
            [B, T, A].
        """
        raise NotImplementedError

    def _target(self, item: Array, category: Array, place: Array) -> Array:
        return self.events.candidates(self.items(item, category), place)

    def _bias(self, profile: Profile) -> Array:
        if self.user_bias is None:
            return jnp.zeros((*profile.user.shape, self.actions))
        return self.user_bias(profile.user)

    def _wide_and(self, head_BCA: Array, item_BC: Array, bias_BCA: Array) -> Array:
        """The logits, from the head's outputs, the items and the users' biases."""
        return action_logits(self.heads, head_BCA + self.item_bias(item_BC) + bias_BCA)


class Ranker(TimelineRanker):
    """Predicts each action on a candidate from the user, the timeline and that candidate alone.

    `timeline_logits` trains every logged exposure of a user in one pass; `start`, `extend` and `score` give the same numbers one
    candidate set at a time, from a user state of constant size.
    """

    def __init__(self, config: RankerConfig, vocabulary: Vocabulary, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, vocabulary, rngs=rngs)
        width = config.encoder.width
        self.encoder = make_encoder(config.encoder, config.features.max_length, rngs=rngs)
        self.crosses = (
            Crosses(config.crosses, config.features, config.encoder, vocabulary, rngs=rngs)
            if config.crosses.layers
            else None
        )
        width = width if self.crosses is None else self.crosses.out_width
        self.output_norm = layer_norm(width, rngs)
        self.head = make_head(config.heads, width, vocabulary.actions, rngs=rngs)

    def timeline_logits(self, timeline: Timeline, key: Array | None = None) -> Array:
        x_BTD, places, slots = context_tokens(self.users, self.items, self.events, timeline)
        profile, events = timeline.profile, timeline.events
        target_BTD = self._target(events.item, events.category, slots.place)
        encoder_key = rngs = None
        if key is not None:
            context_key, target_key, encoder_key, cross_key = jax.random.split(key, 4)
            x_BTD = self.dropout(x_BTD, rngs=nnx.Rngs(context_key))
            target_BTD = self.dropout(target_BTD, rngs=nnx.Rngs(target_key))
            rngs = nnx.Rngs(cross_key)
        deep_BTD = self.encoder.timeline(x_BTD, target_BTD, places, encoder_key)
        if self.crosses is not None:
            event_BTD = event_tokens(self.items, self.events, events, slots.place)
            deep_BTD = self.crosses.timeline(self.users, self.items, event_BTD, timeline, slots, deep_BTD, rngs)
        return self._logits(deep_BTD, events.item, slots.own(self._bias(profile)))

    def start(self, profile: Profile) -> UserState:
        """The state of users [B] before their first event."""
        x_B1D = self.users(profile)[:, None]
        encoder = self.encoder.start(len(x_B1D))
        encoder = self.encoder.extend(encoder, x_B1D, jnp.ones(x_B1D.shape[:2], bool))[1]
        return UserState(encoder, self._bias(profile), self._start_past(profile))

    def extend(self, state: UserState, events: Events) -> UserState:
        """The state after further events, padding at their end; its size does not depend on their number."""
        place_BT = further_places(state.encoder.length_B, events.mask)
        x_BTD = event_tokens(self.items, self.events, events, place_BT)
        encoder = self.encoder.extend(state.encoder, x_BTD, events.mask)[1]
        return UserState(encoder, state.bias_BA, self._extend_past(state.past, x_BTD, events))

    def score(self, state: UserState, item_BC: Array, category_BC: Array) -> Array:
        """Logits [B, C, A] of candidates; each is a function of the state and that candidate."""
        target_BCD = self._target(item_BC, category_BC, state.encoder.length_B[:, None] - 1)
        encoded_BCD = self.encoder.isolated(state.encoder, target_BCD)
        deep_BCD = self._crossed(state.past, item_BC, category_BC, encoded_BCD)
        return self._logits(deep_BCD, item_BC, state.bias_BA[:, None])

    def score_after(self, profile: Profile, events: Events, item_BC: Array, category_BC: Array) -> Array:
        """`score` from the state of users [B] after events, for whoever keeps no states: one pass over the layers."""
        place_BT = jnp.broadcast_to(jnp.arange(events.item.shape[1]), events.item.shape)
        event_BTD = event_tokens(self.items, self.events, events, place_BT)
        x_BTD = jnp.concatenate([self.users(profile)[:, None], event_BTD], axis=1)
        mask_BT = jnp.pad(events.mask, ((0, 0), (1, 0)), constant_values=True)
        target_BCD = self._target(item_BC, category_BC, events.mask.sum(1, dtype=jnp.int32)[:, None])
        encoded_BCD = self.encoder.isolated_after(x_BTD, mask_BT, target_BCD)
        past = self._extend_past(self._start_past(profile), event_BTD, events)
        deep_BCD = self._crossed(past, item_BC, category_BC, encoded_BCD)
        return self._logits(deep_BCD, item_BC, self._bias(profile)[:, None])

    def _start_past(self, profile: Profile) -> Past | None:
        return None if self.crosses is None else self.crosses.start(self.users, profile)

    def _extend_past(self, past: Past | None, event_BTD: Array, events: Events) -> Past | None:
        if self.crosses is None or past is None:
            return None
        return self.crosses.extend(past, self.items, event_BTD, events)

    def _crossed(self, past: Past | None, item_BC: Array, category_BC: Array, encoded_BCD: Array) -> Array:
        if self.crosses is None or past is None:
            return encoded_BCD
        return self.crosses.isolated(past, self.items, item_BC, category_BC, encoded_BCD)

    def _logits(self, x_BCD: Array, item_BC: Array, bias_BCA: Array) -> Array:
        return self._wide_and(self.head(self.output_norm(x_BCD)), item_BC, bias_BCA)
