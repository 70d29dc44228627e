"""Crosses: what is known of user, candidate and past, each by itself, multiplied with one another below the ranker's head.

DCN-v2 (Wang et al., 2021, arXiv:2008.13535) in its parallel structure: a cross network and a deep network over the same fields, side by
side. Here the encoder's vector of the candidate is one of the fields, so that what the sequence tells meets the rest.

The fields, each [D] behind a layer norm: the user's id (unless left out), gender and age; the item's id and, in a log with categories,
category; the means of the events before, with their actions, and of the items clicked before; the encoded candidate. Means are pools and
tallies are sums: both of constant size, whatever the number of events.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tenrec_jax.models.blocks import EncoderConfig, layer_norm
from tenrec_jax.models.dense import Linear
from tenrec_jax.models.features import FeatureConfig, ItemFeatures, UserFeatures, Vocabulary
from tenrec_jax.models.pooling import Pool, empty_pool
from tenrec_jax.models.running_means import extended, means, means_before
from tenrec_jax.models.slots import Slots
from tenrec_jax.models.tallies import MatchedRates, no_tallies, tallies_before, with_events
from tenrec_jax.settings import Natural, Settings
from tenrec_jax.timeline import Events, Profile, Timeline


@dataclass(frozen=True)
class CrossConfig(Settings):
    """Sizes of the crosses; dropout is the features' on the fields and the encoder's on hidden layers.

    Attributes:
        layers: of the cross network; 0 leaves all of it out, and the encoded candidate goes to the head alone.
        hidden: width of the two layers of the deep network; 0 is none.
        matched_rates: one more field, of how the user has met the candidate's category (`tallies.MatchedRates`), in a log with categories.
    """

    layers: Natural = 0
    hidden: Natural = 128
    matched_rates: bool = True


class CrossNetwork(nnx.Module):
    """`x_{l+1} = x_0 * (W_l x_l + b_l) + x_l` with full matrices (Wang et al., 2021, section 3.2)."""

    def __init__(self, width: int, layers: int, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(Linear(width, width, rngs=rngs) for _ in range(layers))

    def __call__(self, x0: Array) -> Array:
        """[..., F] to [..., F]."""
        x = x0
        for layer in self.layers:
            x = x0 * layer(x) + x
        return x


class DeepNetwork(nnx.Module):
    """Two layers with ReLU, dropout after each."""

    def __init__(self, inputs: int, hidden: int, dropout: float, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(Linear(width, hidden, rngs=rngs) for width in (inputs, hidden))
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: Array, rngs: nnx.Rngs | None) -> Array:
        """[..., inputs] to [..., hidden]; `rngs` draws dropout, None is deterministic."""
        for layer in self.layers:
            x = self.dropout(jax.nn.relu(layer(x)), deterministic=rngs is None, rngs=rngs)
        return x


class Past(NamedTuple):
    """What is kept of users.

    Attributes:
        user_BF: the users' own fields, side by side.
        means: of all events and of the clicked items, pools of two heads [B, 2].
        tally_BKF: of each category, as `tallies` has it; None without matched rates.
    """

    user_BF: Array
    means: Pool
    tally_BKF: Array | None


class Crosses(nnx.Module):
    """From the fields to what the head reads, [..., `out_width`].

    Args:
        config: sizes.
        features, encoder: of the ranker, whose dropout falls on the fields and on the hidden layers.
        vocabulary: table sizes.
    """

    def __init__(
        self,
        config: CrossConfig,
        features: FeatureConfig,
        encoder: EncoderConfig,
        vocabulary: Vocabulary,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.categories, self.actions = vocabulary.categories, vocabulary.actions
        has_categories = vocabulary.categories > 1
        user, item, past = (2 + features.user_id, 1 + has_categories, 2)
        self.user_norms, self.item_norms, self.past_norms = (
            nnx.List(layer_norm(encoder.width, rngs) for _ in range(fields)) for fields in (user, item, past)
        )
        self.rates = MatchedRates(vocabulary.actions) if config.matched_rates and has_categories else None
        inputs = (user + item + past + 1) * encoder.width + (0 if self.rates is None else self.rates.width)
        self.cross = CrossNetwork(inputs, config.layers, rngs=rngs)
        self.deep = DeepNetwork(inputs, config.hidden, encoder.dropout, rngs=rngs) if config.hidden else None
        self.dropout = nnx.Dropout(features.dropout)
        self.out_width = inputs + config.hidden

    def start(self, users: UserFeatures, profile: Profile) -> Past:
        """The past of users [B] before their first event."""
        user_BF = self._side_by_side(self.user_norms, users.fields(profile))
        batch, width = user_BF.shape
        tally_BKF = None if self.rates is None else no_tallies(batch, self.categories, self.actions)
        return Past(user_BF, empty_pool((batch,), 2, width // len(self.user_norms)), tally_BKF)

    def extend(self, past: Past, items: ItemFeatures, event_BTD: Array, events: Events) -> Past:
        """The past after further events, `event_BTD` their tokens with the actions."""
        pools = extended(past.means, *self._events(items, event_BTD, events))
        tally_BKF = None if past.tally_BKF is None else with_events(past.tally_BKF, events)
        return Past(past.user_BF, pools, tally_BKF)

    def isolated(
        self, past: Past, items: ItemFeatures, item_BC: Array, category_BC: Array, encoded_BCD: Array
    ) -> Array:
        """Candidates, `encoded_BCD` as the encoder has them, each crossed with a past."""
        known_B1F = jnp.concatenate([past.user_BF, means(past.means)], axis=-1)[:, None]
        fields = [jnp.broadcast_to(known_B1F, (*item_BC.shape, known_B1F.shape[-1]))]
        if self.rates is not None and past.tally_BKF is not None:
            matched_BCF = jnp.take_along_axis(past.tally_BKF, category_BC[..., None], axis=1)
            fields.append(self.rates(matched_BCF, past.tally_BKF.sum(1, keepdims=True)))
        item_BCF = self._side_by_side(self.item_norms, items.fields(item_BC, category_BC))
        return self._crossed([*fields, item_BCF, encoded_BCD])

    def timeline(
        self,
        users: UserFeatures,
        items: ItemFeatures,
        event_BTD: Array,
        timeline: Timeline,
        slots: Slots,
        encoded_BTD: Array,
        rngs: nnx.Rngs | None,
    ) -> Array:
        """`isolated` for every event of timelines, crossed with what was before it.

        Args:
            users, items: the embeddings.
            event_BTD: the events' tokens with the actions. slots: whose they are.
            encoded_BTD: the events as candidates, as the encoder has them.
            rngs: draws dropout; None is deterministic.
        """
        events = timeline.events
        user = [slots.own(x_BUD) for x_BUD in users.fields(timeline.profile)]
        user_BTF = self._side_by_side(self.user_norms, user, rngs)
        fields = [user_BTF, means_before(*self._events(items, event_BTD, events, rngs), slots)]
        if self.rates is not None:
            fields.append(self.rates(*tallies_before(events, slots, self.categories)))
        item_BTF = self._side_by_side(self.item_norms, items.fields(events.item, events.category), rngs)
        return self._crossed([*fields, item_BTF, encoded_BTD], rngs)

    def _events(
        self, items: ItemFeatures, event_BTD: Array, events: Events, rngs: nnx.Rngs | None = None
    ) -> tuple[Array, Array]:
        """What the two means are taken of, [B, T, 2, D], and which events count for them, [B, T, 2]."""
        both = self._side_by_side(self.past_norms, (event_BTD, items(events.item, events.category)), rngs)
        clicked_BT = events.mask & (events.action[..., 0] > 0)
        return both.reshape(*both.shape[:-1], 2, -1), jnp.stack([events.mask, clicked_BT], axis=-1)

    def _side_by_side(
        self, norms: Iterable[nnx.Module], fields: Iterable[Array], rngs: nnx.Rngs | None = None
    ) -> Array:
        kept = (self.dropout(x, deterministic=rngs is None, rngs=rngs) for x in fields)
        return jnp.concatenate([norm(x) for norm, x in zip(norms, kept, strict=True)], axis=-1)

    def _crossed(self, fields: list[Array], rngs: nnx.Rngs | None = None) -> Array:
        x = jnp.concatenate(fields, axis=-1)
        crossed = self.cross(x)
        return crossed if self.deep is None else jnp.concatenate([crossed, self.deep(x, rngs)], axis=-1)
