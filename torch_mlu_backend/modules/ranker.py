"""Ranking: an encoder over the user's timeline and the candidates, with one logit an action."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_mlu_backend.config import RankerConfig, Vocabulary
from torch_mlu_backend.modules.blocks import EncoderState, layer_norm
from torch_mlu_backend.modules.crosses import Crosses, Past
from torch_mlu_backend.modules.encoders import make_encoder
from torch_mlu_backend.modules.features import (
    EventFeatures,
    ItemFeatures,
    UserFeatures,
    context_tokens,
    event_tokens,
    of_each_slot,
)
from torch_mlu_backend.modules.heads import action_logits, make_head
from torch_mlu_backend.modules.records import Events, Profile, Timeline


class UserState(NamedTuple):
    """All that scoring needs of users, in constant size: the encoder's state, the users' biases [B, A], and what the crosses keep."""

    encoder: EncoderState
    bias_BA: Tensor
    past: Past | None


class Ranker(nn.Module):
    """Predicts each action on a candidate from the user, the timeline and that candidate alone.

    `timeline_logits` trains every logged exposure of a user in one pass; `start`, `extend` and `score` give the same numbers one
    candidate set at a time, from a user state of constant size.
    """

    def __init__(self, config: RankerConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        width = config.encoder.width
        self.users = UserFeatures(vocabulary, config.features, width)
        self.items = ItemFeatures(vocabulary, width)
        self.events = EventFeatures(vocabulary, config.features, width)
        self.dropout = nn.Dropout(config.features.dropout)
        self.encoder = make_encoder(config.encoder, config.features.max_length)
        self.heads, self.actions = config.heads, vocabulary.actions
        self.crosses = (
            Crosses(config.crosses, config.features, config.encoder, config.heads, vocabulary)
            if config.crosses.layers
            else None
        )
        # Members have norms and heads of their own.
        alone = self.crosses is None
        self.output_norm: Any = layer_norm(width) if alone else None
        self.head: Any = make_head(config.heads, width, vocabulary.actions) if alone else None
        self.item_bias = nn.Embedding(vocabulary.items, vocabulary.actions)
        self.user_bias = nn.Embedding(vocabulary.users, vocabulary.actions) if config.features.user_id else None

    def forward(
        self,
        user: Tensor,
        gender: Tensor,
        age: Tensor,
        item_BT: Tensor,
        category_BT: Tensor,
        action_BTA: Tensor,
        mask_BT: Tensor,
        item_BC: Tensor,
        category_BC: Tensor,
    ) -> Tensor:
        """Logits [B, C, A] of candidates after the events of users [B], tensors alone: what is traced and exported."""
        events = Events(item_BT, category_BT, action_BTA, mask_BT)
        return self.score(self.extend(self.start(Profile(user, gender, age)), events), item_BC, category_BC)

    def timeline_logits(self, timeline: Timeline) -> Tensor:
        """Logits [B, T, A] of every logged event given the events before it; its own actions are read by later events alone."""
        return self.member_logits(timeline).mean(0)

    def member_logits(self, timeline: Timeline) -> Tensor:
        """What is trained: `timeline_logits` of each of M models whose mean they are, [M, B, T, A]; M is 1 without crosses."""
        x_BTD, places, slots = context_tokens(self.users, self.items, self.events, timeline)
        events = timeline.events
        target_BTD = self._target(events.item, events.category, slots.place)
        encoded_BTD = self.encoder.timeline(self.dropout(x_BTD), self.dropout(target_BTD), places)
        bias_BTA = of_each_slot(self._bias(timeline.profile), slots)
        if self.crosses is None:
            return self._wide_and(self._outputs(encoded_BTD), events.item, bias_BTA)
        event_BTD = event_tokens(self.items, self.events, events, slots.place)
        head_MBTA = self.crosses.timeline(self.users, self.items, event_BTD, timeline, slots, encoded_BTD)
        return self._wide_and(head_MBTA, events.item, bias_BTA)

    def start(self, profile: Profile) -> UserState:
        """The state of users [B] before their first event."""
        x_B1D = self.users(profile)[:, None]
        mask_B1 = torch.ones(x_B1D.shape[:2], dtype=torch.bool, device=x_B1D.device)
        encoder = self.encoder.extend(self.encoder.start(x_B1D.shape[0]), x_B1D, mask_B1)[1]
        past = None if self.crosses is None else self.crosses.start(self.users, profile)
        return UserState(encoder, self._bias(profile), past)

    def extend(self, state: UserState, events: Events) -> UserState:
        """The state after further events, padding at their end; its size does not depend on their number."""
        # The state counts the user's token, so its length minus one is the place of the event to come.
        length_T = torch.arange(events.item.shape[1], device=events.item.device)
        place_BT = state.encoder.length_B[:, None] - 1 + length_T
        x_BTD = event_tokens(self.items, self.events, events, place_BT)
        encoder, past = self.encoder.extend(state.encoder, x_BTD, events.mask)[1], state.past
        if self.crosses is not None and past is not None:
            past = self.crosses.extend(past, self.items, x_BTD, events)
        return UserState(encoder, state.bias_BA, past)

    def score(self, state: UserState, item_BC: Tensor, category_BC: Tensor) -> Tensor:
        """Logits [B, C, A] of candidates; each is a function of the state and that candidate."""
        target_BCD = self._target(item_BC, category_BC, state.encoder.length_B[:, None] - 1)
        encoded_BCD = self.encoder.isolated(state.encoder, target_BCD)
        if self.crosses is None or state.past is None:
            head_MBCA = self._outputs(encoded_BCD)
        else:
            head_MBCA = self.crosses.isolated(state.past, self.items, item_BC, category_BC, encoded_BCD)
        return self._wide_and(head_MBCA, item_BC, state.bias_BA[:, None]).mean(0)

    def _target(self, item: Tensor, category: Tensor, place: Tensor) -> Tensor:
        return self.events.candidates(self.items(item, category), place)

    def _bias(self, profile: Profile) -> Tensor:
        if self.user_bias is None:
            return torch.zeros((*profile.user.shape, self.actions), device=profile.user.device)
        return self.user_bias(profile.user)

    def _outputs(self, encoded_BCD: Tensor) -> Tensor:
        """The outputs [1, B, C, A] of the one head that there is without crosses."""
        return self.head(self.output_norm(encoded_BCD)).float()[None]

    def _wide_and(self, head_MBCA: Tensor, item_BC: Tensor, bias_BCA: Tensor) -> Tensor:
        return action_logits(self.heads, head_MBCA + self.item_bias(item_BC) + bias_BCA)
