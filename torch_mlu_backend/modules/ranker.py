"""Ranking: an encoder over the user's timeline and the candidates, with one logit an action."""

from typing import NamedTuple

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
        self.crosses = (
            Crosses(config.crosses, config.features, config.encoder, vocabulary) if config.crosses.layers else None
        )
        width = width if self.crosses is None else self.crosses.out_width
        self.output_norm = layer_norm(width)
        self.heads, self.actions = config.heads, vocabulary.actions
        self.head = make_head(config.heads, width, vocabulary.actions)
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
        x_BTD, places, slots = context_tokens(self.users, self.items, self.events, timeline)
        events = timeline.events
        target_BTD = self._target(events.item, events.category, slots.place)
        deep_BTD = self.encoder.timeline(self.dropout(x_BTD), self.dropout(target_BTD), places)
        if self.crosses is not None:
            event_BTD = event_tokens(self.items, self.events, events, slots.place)
            deep_BTD = self.crosses.timeline(self.users, self.items, event_BTD, timeline, slots, deep_BTD)
        return self._logits(deep_BTD, events.item, of_each_slot(self._bias(timeline.profile), slots))

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
        deep_BCD = self.encoder.isolated(state.encoder, target_BCD)
        if self.crosses is not None and state.past is not None:
            deep_BCD = self.crosses.isolated(state.past, self.items, item_BC, category_BC, deep_BCD)
        return self._logits(deep_BCD, item_BC, state.bias_BA[:, None])

    def _target(self, item: Tensor, category: Tensor, place: Tensor) -> Tensor:
        return self.events.candidates(self.items(item, category), place)

    def _bias(self, profile: Profile) -> Tensor:
        if self.user_bias is None:
            return torch.zeros((*profile.user.shape, self.actions), device=profile.user.device)
        return self.user_bias(profile.user)

    def _logits(self, x_BCD: Tensor, item_BC: Tensor, bias_BCA: Tensor) -> Tensor:
        head_BCA = self.head(self.output_norm(x_BCD)).float()
        return action_logits(self.heads, head_BCA + self.item_bias(item_BC) + bias_BCA)
