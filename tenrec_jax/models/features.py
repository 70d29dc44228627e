"""Embeddings of users, items and events: how rows of a log become tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from tenrec_jax.models.blocks import Places, places_of
from tenrec_jax.models.hashing import Collisions, HashedEmbed, TableConfig
from tenrec_jax.models.initializers import normal_table
from tenrec_jax.models.slots import Slots, slots_of
from tenrec_jax.settings import Count, NonNegative, Settings, Share
from tenrec_jax.timeline import Events, Profile, Timeline


@dataclass(frozen=True)
class Vocabulary:
    """Table sizes. Each counts its entry 0, which means "unknown" (ids) or "missing" (features).

    Attributes:
        users, items: known ids, plus one.
        genders, ages, categories: feature values, plus one.
        actions: number A of labelled actions; it has no entry 0.
    """

    users: int
    items: int
    genders: int
    ages: int
    categories: int
    actions: int


@dataclass(frozen=True)
class FeatureConfig(Settings):
    """Which inputs the towers read.

    Attributes:
        user_id: embed the user's id; off where a user is nothing but their history.
        actions: embed what the user did at an event; off where all events are the same, as in a log of clicks alone.
        positions: what is added for an event's place in the timeline: "learned" embeddings, "sinusoidal" ones (see `SinusoidalPositions`),
            which no length bounds, or "none", which leaves order to the recency bias.
        max_length: events a timeline may hold; the size of the learned position table.
        dropout: rate on the tokens that go into the encoder, apart from the encoder's own.
        init_scale: standard deviation of the embeddings at initialisation.
        item_start: what training starts the items' embeddings from: "normal" draws like the rest; "spectral", vectors of length one of
            which users meet which items (`data.spectral`), for logs too small to learn that from their labels; or "neighbours", the same of
            which items stand near which in the timelines (`data.neighbours`), for logs whose order tells a session's subject.
        item_table, user_table: how the ids become rows of the embedding tables.
    """

    user_id: bool = True
    actions: bool = True
    positions: Literal["none", "learned", "sinusoidal"] = "none"
    max_length: Count = 512
    dropout: Share = 0.0
    init_scale: NonNegative = 0.02
    item_start: Literal["normal", "spectral", "neighbours"] = "normal"
    item_table: TableConfig = field(default_factory=TableConfig)
    user_table: TableConfig = field(default_factory=TableConfig)

    def conflicts(self) -> Iterator[str]:
        if self.item_start != "normal" and self.item_table.kind == "hashed":
            yield f"item_start {self.item_start!r} needs an exact item_table: hashed rows are shared by items"

    def conflicts_with_width(self, width: int) -> Iterator[str]:
        """Why embeddings of this width cannot be made as the tables say."""
        for table in self.hashed_tables.values():
            if table.combine == "concatenate" and width % table.hashes:
                yield f"a width of {width} cannot be concatenated from {table.hashes} rows of one width"

    def expected_collisions(self, vocabulary: Vocabulary) -> list[str]:
        """A line for each hashed table: the shares of so many ids that may be expected to share rows."""
        sizes = {"item": vocabulary.items - 1, "user": vocabulary.users - 1}
        return [
            f"{space} ids, expected: {Collisions.expected(sizes[space], table).describe(sizes[space], table)}"
            for space, table in self.hashed_tables.items()
        ]

    @property
    def hashed_tables(self) -> dict[str, TableConfig]:
        """The tables that are hashed, by what their ids are of."""
        tables = {"item": self.item_table} | ({"user": self.user_table} if self.user_id else {})
        return {space: table for space, table in tables.items() if table.kind == "hashed"}


class UserFeatures(nnx.Module):
    """User token: sum of the embeddings of id, gender and age, and a bias. The bias alone stands for a new user."""

    def __init__(self, vocabulary: Vocabulary, config: FeatureConfig, width: int, *, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(config.init_scale)
        table, scale = config.user_table, config.init_scale
        self.id = id_embedding(table, vocabulary.users, width, scale, rngs) if config.user_id else None
        self.gender = nnx.Embed(vocabulary.genders, width, embedding_init=init, rngs=rngs)
        self.age = nnx.Embed(vocabulary.ages, width, embedding_init=init, rngs=rngs)
        self.bias = nnx.Param(init(rngs.params(), (width,), jnp.float32))

    def __call__(self, profile: Profile) -> Array:
        """Arrays of one shape [...] to tokens [..., D]."""
        gender, age, *user_id = self.fields(profile)
        return sum(user_id, gender + age + self.bias[...])

    def fields(self, profile: Profile) -> tuple[Array, ...]:
        """The embeddings by themselves, [..., D] each."""
        known = self.gender(profile.gender), self.age(profile.age)
        return known if self.id is None else (*known, self.id(profile.user))


class ItemFeatures(nnx.Module):
    """Item vector: sum of the embeddings of id and, in a log with categories, category.

    One table serves the history, the candidates and the item tower.
    """

    def __init__(self, vocabulary: Vocabulary, config: FeatureConfig, width: int, *, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(config.init_scale)
        self.id = id_embedding(config.item_table, vocabulary.items, width, config.init_scale, rngs)
        # What all items share would only blur what tells them apart.
        has_categories = vocabulary.categories > 1
        self.category = (
            nnx.Embed(vocabulary.categories, width, embedding_init=init, rngs=rngs) if has_categories else None
        )

    def __call__(self, item: Array, category: Array) -> Array:
        """Integer arrays of one shape [...] to vectors [..., D]."""
        first, *rest = self.fields(item, category)
        return sum(rest, first)

    def fields(self, item: Array, category: Array) -> tuple[Array, ...]:
        """The embeddings by themselves, [..., D] each."""
        return (self.id(item),) if self.category is None else (self.id(item), self.category(category))


def id_embedding(
    table: TableConfig, num_ids: int, width: int, init_scale: float, rngs: nnx.Rngs
) -> nnx.Embed | HashedEmbed:
    """Of `num_ids` ids, entry 0 included."""
    if table.kind == "hashed":
        return HashedEmbed(num_ids, width, table, init_scale, rngs=rngs)
    return nnx.Embed(num_ids, width, embedding_init=normal_table(init_scale), rngs=rngs)


class SinusoidalPositions(nnx.Module):
    """Sines and cosines of a place (Vaswani et al., 2017), times one learned number (Li et al., 2019, arXiv:1809.08895).

    With D entries, half of them sines and half cosines (one sine more where D is odd),

        p(t) = scale * [sin(t w_0), ..., sin(t w_{D/2-1}), cos(t w_0), ..., cos(t w_{D/2-1})],   w_i = 10000^(-2i/D).

    The scale starts where positions are as large as the embeddings that they are added to.

    Args:
        width: D.
        init_scale: standard deviation of those embeddings.
    """

    def __init__(self, width: int, init_scale: float) -> None:
        self.width = width
        self.scale = nnx.Param(jnp.full((), init_scale * 2**0.5))

    def __call__(self, place: Array) -> Array:
        """Places [...], of any size, to [..., D]."""
        rate = 10_000.0 ** (-2 / self.width * jnp.arange((self.width + 1) // 2))
        angle = place[..., None] * rate
        return self.scale[...] * jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[..., : self.width]


class EventFeatures(nnx.Module):
    """What turns an item's vector into a token of the timeline: the user's actions on it, or "not acted on yet", and its position."""

    def __init__(self, vocabulary: Vocabulary, config: FeatureConfig, width: int, *, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(config.init_scale)
        self.action = nnx.Linear(vocabulary.actions, width, kernel_init=init, rngs=rngs) if config.actions else None
        self.target = nnx.Param(init(rngs.params(), (width,), jnp.float32))
        # Place 0 is the first event's; the user token has none.
        self.position = _positions(config, width, rngs)

    def context(self, item_BTD: Array, action_BTA: Array, place_BT: Array) -> Array:
        """Events whose actions are known; `place_BT` is each one's place in its timeline, from 0. Returns [B, T, D]."""
        token_BTD = item_BTD if self.action is None else item_BTD + self.action(action_BTA.astype(item_BTD.dtype))
        return self._placed(token_BTD, place_BT)

    def candidates(self, item: Array, place: Array) -> Array:
        """Items whose actions are to be predicted: item [..., D], `place` the place of the event to come, broadcast to [...]."""
        return self._placed(item + self.target[...], place)

    def _placed(self, token: Array, place: Array) -> Array:
        return token if self.position is None else token + self.position(place)


def _positions(config: FeatureConfig, width: int, rngs: nnx.Rngs) -> nnx.Embed | SinusoidalPositions | None:
    if config.positions == "learned":
        init = nnx.initializers.normal(config.init_scale)
        return nnx.Embed(config.max_length + 1, width, embedding_init=init, rngs=rngs)
    return SinusoidalPositions(width, config.init_scale) if config.positions == "sinusoidal" else None


class ContextTokens(NamedTuple):
    """What stands before each event of timelines: the user's token before the first, the event before it elsewhere.

    Attributes:
        x_BTD: the tokens. places: where they stand. slots: whose they are.
    """

    x_BTD: Array
    places: Places
    slots: Slots


def context_tokens(
    users: UserFeatures, items: ItemFeatures, events: EventFeatures, timeline: Timeline
) -> ContextTokens:
    """The context tokens of timelines: entry t is the last thing that a prediction for event t may know."""
    batch, length = timeline.events.item.shape
    slots = slots_of(timeline.start, length)
    event_BTD = event_tokens(items, events, timeline.events, slots.place)
    row_B1 = jnp.arange(batch)[:, None]
    x_BTD = _shifted(event_BTD).at[row_B1, timeline.start].set(users(timeline.profile), mode="drop")
    return ContextTokens(x_BTD, places_of(slots.first | _shifted(timeline.events.mask), slots.first), slots)


def event_tokens(items: ItemFeatures, events: EventFeatures, log: Events, place_BT: Array) -> Array:
    """One token an event, `place_BT` its place in its timeline: [B, T, D]."""
    return events.context(items(log.item, log.category), log.action, place_BT)


def further_places(length_B: Array, mask_BT: Array) -> Array:
    """The places [B, T] of events that follow a state of so many tokens, the user's among them. Padding, which may lie beyond the learned
    places, has place 0."""
    return jnp.where(mask_BT, length_B[:, None] - 1 + jnp.arange(mask_BT.shape[1]), 0)


def _shifted(x_BT: Array) -> Array:
    """Entry t is that of t - 1; the first is zero."""
    return jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0), *((0, 0),) * (x_BT.ndim - 2)))
