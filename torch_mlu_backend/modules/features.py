"""Embeddings of users, items and events: how rows of a log become tokens."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_mlu_backend.config import FeatureConfig, Vocabulary
from torch_mlu_backend.modules.blocks import Places, places_of
from torch_mlu_backend.modules.records import Events, Profile, Timeline
from torch_mlu_backend.modules.slots import Slots, slots_of


class UserFeatures(nn.Module):
    """User token: sum of the embeddings of id, gender and age, and a bias. The bias alone stands for a new user."""

    def __init__(self, vocabulary: Vocabulary, config: FeatureConfig, width: int) -> None:
        super().__init__()
        self.id = nn.Embedding(vocabulary.users, width) if config.user_id else None
        self.gender = nn.Embedding(vocabulary.genders, width)
        self.age = nn.Embedding(vocabulary.ages, width)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, profile: Profile) -> Tensor:
        """Arrays of one shape [...] to tokens [..., D]."""
        gender, age, *user_id = self.fields(profile)
        return sum(user_id, gender + age + self.bias)

    def fields(self, profile: Profile) -> tuple[Tensor, ...]:
        """The embeddings by themselves, [..., D] each."""
        known = self.gender(profile.gender), self.age(profile.age)
        return known if self.id is None else (*known, self.id(profile.user))


class ItemFeatures(nn.Module):
    """Item vector: sum of the embeddings of id and, in a log with categories, category.

    One table serves the history, the candidates and the item tower.
    """

    def __init__(self, vocabulary: Vocabulary, width: int) -> None:
        super().__init__()
        self.id = nn.Embedding(vocabulary.items, width)
        self.category = nn.Embedding(vocabulary.categories, width) if vocabulary.categories > 1 else None

    def forward(self, item: Tensor, category: Tensor) -> Tensor:
        """Integer arrays of one shape [...] to vectors [..., D]."""
        return self.id(item) if self.category is None else self.id(item) + self.category(category)

    def fields(self, item: Tensor, category: Tensor) -> tuple[Tensor, ...]:
        """The embeddings by themselves, [..., D] each."""
        return (self.id(item),) if self.category is None else (self.id(item), self.category(category))


class SinusoidalPositions(nn.Module):
    """`scale * [sin(t w_0), sin(t w_1), ..., cos(t w_0), ...]` with `w_i = 10000^(-2i/D)` and one learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, place: Tensor) -> Tensor:
        """Places [...], of any size, to [..., D]."""
        step = torch.arange((self.width + 1) // 2, dtype=torch.float32, device=place.device)
        angle = place[..., None] * 10_000.0 ** (-2 / self.width * step)
        return self.scale * torch.cat([angle.sin(), angle.cos()], dim=-1)[..., : self.width]


class EventFeatures(nn.Module):
    """What turns an item's vector into a token of the timeline: the user's actions on it, or "not acted on yet", and its position."""

    def __init__(self, vocabulary: Vocabulary, config: FeatureConfig, width: int) -> None:
        super().__init__()
        self.action = nn.Linear(vocabulary.actions, width) if config.actions else None
        self.target = nn.Parameter(torch.zeros(width))
        self.position = _positions(config, width)

    def context(self, item_BTD: Tensor, action_BTA: Tensor, place_BT: Tensor) -> Tensor:
        """Events whose actions are known; `place_BT` is each one's place in its timeline, from 0. Returns [B, T, D]."""
        token_BTD = item_BTD if self.action is None else item_BTD + self.action(action_BTA.to(item_BTD.dtype))
        return self._placed(token_BTD, place_BT)

    def candidates(self, item: Tensor, place: Tensor) -> Tensor:
        """Items whose actions are to be predicted: item [..., D], `place` the place of the event to come, broadcast to [...]."""
        return self._placed(item + self.target, place)

    def _placed(self, token: Tensor, place: Tensor) -> Tensor:
        return token if self.position is None else token + self.position(place)


def _positions(config: FeatureConfig, width: int) -> nn.Module | None:
    if config.positions == "learned":
        return nn.Embedding(config.max_length + 1, width)
    return SinusoidalPositions(width) if config.positions == "sinusoidal" else None


class ContextTokens(NamedTuple):
    """What stands before each event of timelines: the tokens, where they stand, and whose they are."""

    x_BTD: Tensor
    places: Places
    slots: Slots


def context_tokens(
    users: UserFeatures, items: ItemFeatures, events: EventFeatures, timeline: Timeline
) -> ContextTokens:
    """The context tokens of timelines: entry t is the last thing that a prediction for event t may know."""
    slots = slots_of(timeline.start, timeline.events.item.shape[1])
    event_BTD = event_tokens(items, events, timeline.events, slots.place)
    user_BTD = of_each_slot(users(timeline.profile), slots)
    # Before the first event of a timeline stands its user, elsewhere the event before.
    x_BTD = torch.where(slots.first[..., None], user_BTD, functional.pad(event_BTD[:, :-1], (0, 0, 1, 0)))
    mask_BT = functional.pad(timeline.events.mask[:, :-1], (1, 0))
    return ContextTokens(x_BTD, places_of(slots.first | mask_BT, slots), slots)


def of_each_slot(x_BUF: Tensor, slots: Slots) -> Tensor:
    """What belongs to each slot's user, [B, T, F], from what belongs to the users of the rows."""
    return x_BUF.gather(1, slots.segment[..., None].expand(-1, -1, x_BUF.shape[-1]))


def event_tokens(items: ItemFeatures, events: EventFeatures, log: Events, place_BT: Tensor) -> Tensor:
    """One token an event, `place_BT` its place in its timeline: [B, T, D]."""
    return events.context(items(log.item, log.category), log.action, place_BT)
