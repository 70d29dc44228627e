"""Crosses, as in `tenrec_jax.models.crosses`: DCN-v2 (Wang et al., 2021, arXiv:2008.13535) over what is known of user, candidate and past,
each by itself, and the encoded candidate, below the ranker's head.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_mlu_backend.config import CrossConfig, EncoderConfig, FeatureConfig, Vocabulary
from torch_mlu_backend.modules.blocks import layer_norm
from torch_mlu_backend.modules.features import ItemFeatures, UserFeatures, of_each_slot
from torch_mlu_backend.modules.pooling import Pool, empty_pool
from torch_mlu_backend.modules.records import Events, Profile, Timeline
from torch_mlu_backend.modules.running_means import extended, means, means_before
from torch_mlu_backend.modules.slots import Slots
from torch_mlu_backend.modules.tallies import MatchedRates, no_tallies, of_category, tallies_before, with_events


class Past(NamedTuple):
    """What is kept of users: their own fields side by side, the pools [B, 2] of all events and of the clicked items, and the tallies of
    each category; None without matched rates."""

    user_BF: Tensor
    means: Pool
    tally_BKF: Tensor | None


class CrossNetwork(nn.Module):
    """`x_{l+1} = x_0 * (W_l x_l + b_l) + x_l` with full matrices."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x0: Tensor) -> Tensor:
        """[..., F] to [..., F]."""
        x = x0
        for layer in self.layers:
            x = x0 * layer(x).float() + x
        return x


class DeepNetwork(nn.Module):
    """Two layers with ReLU, dropout after each."""

    def __init__(self, inputs: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, hidden) for width in (inputs, hidden))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., hidden]."""
        for layer in self.layers:
            x = self.dropout(layer(x).relu())
        return x.float()


class Crosses(nn.Module):
    """From the fields to what the head reads, [..., `out_width`]."""

    def __init__(
        self, config: CrossConfig, features: FeatureConfig, encoder: EncoderConfig, vocabulary: Vocabulary
    ) -> None:
        super().__init__()
        self.categories, self.actions = vocabulary.categories, vocabulary.actions
        has_categories = vocabulary.categories > 1
        user, item, past = 2 + features.user_id, 1 + has_categories, 2
        self.user_norms, self.item_norms, self.past_norms = (
            nn.ModuleList(layer_norm(encoder.width) for _ in range(fields)) for fields in (user, item, past)
        )
        self.rates = MatchedRates(vocabulary.actions) if config.matched_rates and has_categories else None
        inputs = (user + item + past + 1) * encoder.width + (0 if self.rates is None else self.rates.width)
        self.cross = CrossNetwork(inputs, config.layers)
        self.deep = DeepNetwork(inputs, config.hidden, encoder.dropout) if config.hidden else None
        self.dropout = nn.Dropout(features.dropout)
        self.out_width = inputs + config.hidden

    def start(self, users: UserFeatures, profile: Profile) -> Past:
        """The past of users [B] before their first event."""
        user_BF = self._side_by_side(self.user_norms, users.fields(profile))
        (batch, width), device = user_BF.shape, user_BF.device
        tally_BKF = None if self.rates is None else no_tallies(batch, self.categories, self.actions, device)
        return Past(user_BF, empty_pool((batch,), 2, width // len(self.user_norms), device), tally_BKF)

    def extend(self, past: Past, items: ItemFeatures, event_BTD: Tensor, events: Events) -> Past:
        """The past after further events, `event_BTD` their tokens with the actions."""
        pools = extended(past.means, *self._events(items, event_BTD, events))
        tally_BKF = None if past.tally_BKF is None else with_events(past.tally_BKF, events)
        return Past(past.user_BF, pools, tally_BKF)

    def isolated(
        self, past: Past, items: ItemFeatures, item_BC: Tensor, category_BC: Tensor, encoded_BCD: Tensor
    ) -> Tensor:
        """Candidates, `encoded_BCD` as the encoder has them, each crossed with a past."""
        known_BF = torch.cat([past.user_BF, means(past.means)], dim=-1)
        fields = [known_BF[:, None].expand(-1, item_BC.shape[1], -1)]
        if self.rates is not None and past.tally_BKF is not None:
            own_B1F = past.tally_BKF.sum(1, keepdim=True)
            fields.append(self.rates(of_category(past.tally_BKF, category_BC), own_B1F))
        item_BCF = self._side_by_side(self.item_norms, items.fields(item_BC, category_BC))
        return self._crossed([*fields, item_BCF, encoded_BCD])

    def timeline(
        self,
        users: UserFeatures,
        items: ItemFeatures,
        event_BTD: Tensor,
        timeline: Timeline,
        slots: Slots,
        encoded_BTD: Tensor,
    ) -> Tensor:
        """`isolated` for every event of timelines, crossed with what was before it."""
        events = timeline.events
        user_BUF = self._side_by_side(self.user_norms, users.fields(timeline.profile))
        before_BTF = means_before(*self._events(items, event_BTD, events), slots)
        fields = [of_each_slot(user_BUF, slots), before_BTF]
        if self.rates is not None:
            fields.append(self.rates(*tallies_before(events, slots, self.categories)))
        item_BTF = self._side_by_side(self.item_norms, items.fields(events.item, events.category))
        return self._crossed([*fields, item_BTF, encoded_BTD])

    def _events(self, items: ItemFeatures, event_BTD: Tensor, events: Events) -> tuple[Tensor, Tensor]:
        """What the two means are taken of, [B, T, 2, D], and which events count for them, [B, T, 2]."""
        both = self._side_by_side(self.past_norms, (event_BTD, items(events.item, events.category)))
        clicked_BT = events.mask & (events.action[..., 0] > 0)
        return both.reshape(*both.shape[:-1], 2, -1), torch.stack([events.mask, clicked_BT], dim=-1)

    def _side_by_side(self, norms: Iterable[nn.Module], fields: Iterable[Tensor]) -> Tensor:
        return torch.cat([norm(self.dropout(x)) for norm, x in zip(norms, fields, strict=True)], dim=-1)

    def _crossed(self, fields: list[Tensor]) -> Tensor:
        x = torch.cat(fields, dim=-1)
        return self.cross(x) if self.deep is None else torch.cat([self.cross(x), self.deep(x)], dim=-1)
