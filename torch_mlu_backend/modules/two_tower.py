"""Retrieval: a user tower that reads a timeline in one linear pass, and an item tower, compared by an inner product."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_mlu_backend.config import TwoTowerConfig, Vocabulary
from torch_mlu_backend.modules.blocks import EncoderState
from torch_mlu_backend.modules.encoders import make_encoder
from torch_mlu_backend.modules.fastformer import l2_normalize
from torch_mlu_backend.modules.features import EventFeatures, ItemFeatures, UserFeatures, context_tokens, event_tokens
from torch_mlu_backend.modules.records import Events, Profile, Timeline


class QueryState(NamedTuple):
    """Users in constant size: the encoder's state, and the query [B, D] for what comes next."""

    encoder: EncoderState
    query_BD: Tensor


class TwoTower(nn.Module):
    """Two towers over one item table.

    After each event the user tower gives a query for what comes next, so one pass over a timeline of T events trains T queries.
    `start` and `extend` give the same queries one stretch of events at a time, from a user state of constant size.
    """

    def __init__(self, config: TwoTowerConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config = config
        width = config.encoder.width
        self.users = UserFeatures(vocabulary, config.features, width)
        self.items = ItemFeatures(vocabulary, width)
        self.events = EventFeatures(vocabulary, config.features, width)
        self.dropout = nn.Dropout(config.features.dropout)
        self.encoder = make_encoder(config.encoder, config.features.max_length)
        self.item_bias = nn.Embedding(vocabulary.items, 1) if config.item_bias else None

    def forward(
        self,
        user: Tensor,
        gender: Tensor,
        age: Tensor,
        item_BT: Tensor,
        category_BT: Tensor,
        action_BTA: Tensor,
        mask_BT: Tensor,
    ) -> Tensor:
        """Queries [B, D] of users [B] after their events, tensors alone: what is traced and exported."""
        events = Events(item_BT, category_BT, action_BTA, mask_BT)
        return self.extend(self.start(Profile(user, gender, age)), events).query_BD

    def queries(self, timeline: Timeline) -> Tensor:
        """A query for every event: entry t of [B, T, D] has seen the user and the events before t. An item bias makes D one larger."""
        x_BTD, places, _ = context_tokens(self.users, self.items, self.events, timeline)
        return self._query(self.encoder.context(self.dropout(x_BTD), places))

    def start(self, profile: Profile) -> QueryState:
        """The state of users [B] before their first event."""
        x_B1D = self.users(profile)[:, None]
        mask_B1 = torch.ones(x_B1D.shape[:2], dtype=torch.bool, device=x_B1D.device)
        y_B1D, encoder = self.encoder.extend(self.encoder.start(x_B1D.shape[0]), x_B1D, mask_B1)
        return QueryState(encoder, self._query(y_B1D)[:, 0])

    def extend(self, state: QueryState, events: Events) -> QueryState:
        """The state after further events, padding at their end."""
        # The state counts the user's token, so its length minus one is the place of the event to come.
        length_T = torch.arange(events.item.shape[1], device=events.item.device)
        place_BT = state.encoder.length_B[:, None] - 1 + length_T
        x_BTD = event_tokens(self.items, self.events, events, place_BT)
        y_BTD, encoder = self.encoder.extend(state.encoder, x_BTD, events.mask)
        query_BTD = torch.cat([state.query_BD[:, None], self._query(y_BTD)], dim=1)
        last_B1D = events.mask.long().sum(1)[:, None, None].expand(-1, 1, query_BTD.shape[-1])
        return QueryState(encoder, query_BTD.gather(1, last_B1D)[:, 0])

    def item_vectors(self, item: Tensor, category: Tensor) -> Tensor:
        """The item tower: integer arrays [...] to vectors [..., D] as long as a query, whose score of an item is their inner product."""
        vector = self._scaled(self.items(item, category), 1.0)
        return vector if self.item_bias is None else torch.cat([vector, self.item_bias(item)], dim=-1)

    def _query(self, y: Tensor) -> Tensor:
        query = self._scaled(y, 1.0 / self.config.temperature)
        return query if self.item_bias is None else torch.cat([query, torch.ones_like(query[..., :1])], dim=-1)

    def _scaled(self, x: Tensor, scale: float) -> Tensor:
        return l2_normalize(x) * scale if self.config.similarity == "cosine" else x
