"""Crosses: what is known of user, candidate and past, each by itself, multiplied with one another below the ranker's head.

DCN-v2 (Wang et al., 2021, arXiv:2008.13535) in its parallel structure: a cross network and a deep network over the same fields, side by
side. Here the encoder's vector of the candidate is one of the fields, so that what the sequence tells meets the rest.

The fields, each [D] behind a layer norm: the user's id (unless left out), gender and age; the item's id and, in a log with categories,
category; the means of the events before, with their actions, and of the items clicked before; the encoded candidate. Means are pools and
tallies are sums: both of constant size, whatever the number of events.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tenrec_jax.models.blocks import layer_norm
from tenrec_jax.models.dense import Linear
from tenrec_jax.models.features import Vocabulary
from tenrec_jax.models.pooling import MASKED, Pool, empty_pool, prefix_pools
from tenrec_jax.models.slots import Slots
from tenrec_jax.models.tallies import MatchedRates, no_tallies, tallies_before, with_events
from tenrec_jax.settings import Natural, Settings
from tenrec_jax.timeline import Events


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


class Past(NamedTuple):
    """What is kept of users.

    Attributes:
        user_BF: the users' own fields, side by side.
        means: of all events and of the clicked items, pools of two heads [B, 2].
        tally_BKF: `tallies.no_tallies` and what was added; None where there are no matched rates.
    """

    user_BF: Array
    means: Pool
    tally_BKF: Array | None


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
            x = dropped(self.dropout, jax.nn.relu(layer(x)), rngs)
        return x


class Crosses(nnx.Module):
    """From fields to what the head reads, [..., `out_width`].

    Args:
        config: sizes. width: D.
        vocabulary: table sizes. user_fields, item_fields: how many there are.
        dropout, hidden_dropout: on the fields and in the deep network.
    """

    def __init__(
        self,
        config: CrossConfig,
        width: int,
        vocabulary: Vocabulary,
        *,
        user_fields: int,
        item_fields: int,
        dropout: float,
        hidden_dropout: float,
        rngs: nnx.Rngs,
    ) -> None:
        self.categories, self.actions, fields = vocabulary.categories, vocabulary.actions, user_fields + item_fields + 2
        self.norms = nnx.List(layer_norm(width, rngs) for _ in range(fields))
        self.user_fields = user_fields
        self.rates = MatchedRates(self.actions) if config.matched_rates and self.categories > 1 else None
        inputs = (fields + 1) * width + (0 if self.rates is None else self.rates.width)
        self.cross = CrossNetwork(inputs, config.layers, rngs=rngs)
        self.deep = DeepNetwork(inputs, config.hidden, hidden_dropout, rngs=rngs) if config.hidden else None
        self.dropout = nnx.Dropout(dropout)
        self.out_width = inputs + config.hidden

    def start(self, user: tuple[Array, ...]) -> Past:
        """The past of users without events, from their fields [B, D] each."""
        users, width = user[0].shape
        tally_BKF = None if self.rates is None else no_tallies(users, self.categories, self.actions)
        return Past(self._user(user, None), empty_pool((users,), 2, width), tally_BKF)

    def extend(self, past: Past, item_BTD: Array, event_BTD: Array, events: Events) -> Past:
        """The past after further events.

        Args:
            past: so far.
            item_BTD, event_BTD: of each event, the item's vector and the token with the user's actions.
            events: the same, as they were logged; padding counts for nothing.
        """
        pools = self._pools(past.means, item_BTD, event_BTD, events, None, None)
        tally_BKF = past.tally_BKF if past.tally_BKF is None else with_events(past.tally_BKF, events)
        return Past(past.user_BF, jax.tree.map(lambda x: x[:, -1], pools), tally_BKF)

    def isolated(self, past: Past, encoded_BCD: Array, item: tuple[Array, ...], category_BC: Array) -> Array:
        """Candidates against a past.

        Args:
            encoded_BCD: the candidates as the encoder has them. item: their fields, [B, C, D] each.
            category_BC: their categories.
        """
        known = [past.user_BF, _means(past.means)]
        known = [jnp.broadcast_to(x[:, None], (*category_BC.shape, x.shape[-1])) for x in known]
        if self.rates is not None:
            matched_BCF = jnp.take_along_axis(past.tally_BKF, category_BC[..., None], axis=1)
            known.append(self.rates(matched_BCF, past.tally_BKF.sum(1, keepdims=True)))
        return self._crossed([*known, encoded_BCD, self._item(item, None)], None)

    def timeline(
        self,
        user: tuple[Array, ...],
        item_BTD: Array,
        event_BTD: Array,
        events: Events,
        slots: Slots,
        encoded_BTD: Array,
        item: tuple[Array, ...],
        rngs: nnx.Rngs | None,
    ) -> Array:
        """`isolated` for every event of timelines, after the events before it.

        Args:
            user: fields of the users of the rows, [B, U, D] each.
            item_BTD, event_BTD, events: as `extend` has them. slots: whose they are.
            encoded_BTD, item: as `isolated` has them.
            rngs: draws dropout; None is deterministic.
        """
        start = empty_pool(item_BTD.shape[:1], 2, item_BTD.shape[-1])
        pools = self._pools(start, item_BTD, event_BTD, events, slots.segment, rngs)
        before_BT2D = jnp.roll(_means(pools), 1, axis=1)
        known = [slots.own(self._user(user, rngs)), jnp.where(slots.first[..., None], 0.0, before_BT2D)]
        if self.rates is not None:
            known.append(self.rates(*tallies_before(events, slots, self.categories)))
        return self._crossed([*known, encoded_BTD, self._item(item, rngs)], rngs)

    def _user(self, fields: tuple[Array, ...], rngs: nnx.Rngs | None) -> Array:
        norms = self.norms[: self.user_fields]
        return jnp.concatenate(
            [norm(dropped(self.dropout, x, rngs)) for norm, x in zip(norms, fields, strict=True)], -1
        )

    def _item(self, fields: tuple[Array, ...], rngs: nnx.Rngs | None) -> Array:
        norms = self.norms[self.user_fields : -2]
        return jnp.concatenate(
            [norm(dropped(self.dropout, x, rngs)) for norm, x in zip(norms, fields, strict=True)], -1
        )

    def _pools(
        self,
        start: Pool,
        item_BTD: Array,
        event_BTD: Array,
        events: Events,
        segment_BT: Array | None,
        rngs: nnx.Rngs | None,
    ) -> Pool:
        clicked_BT = events.mask & (events.action[..., 0] > 0)
        counts_BT2 = jnp.stack([events.mask, clicked_BT], axis=-1)
        x_BT2D = jnp.stack(
            [norm(dropped(self.dropout, x, rngs)) for norm, x in zip(self.norms[-2:], (event_BTD, item_BTD), strict=True)],
            axis=2,
        )
        return prefix_pools(jnp.where(counts_BT2, 0.0, MASKED), x_BT2D, start, segment_BT)

    def _crossed(self, fields: list[Array], rngs: nnx.Rngs | None) -> Array:
        x = jnp.concatenate(fields, axis=-1)
        crossed = self.cross(x)
        return crossed if self.deep is None else jnp.concatenate([crossed, self.deep(x, rngs)], axis=-1)


def _means(pools: Pool) -> Array:
    """The means of the heads, side by side; zeros where no token counts."""
    exists = (pools.maximum > MASKED)[..., None]
    mean = jnp.where(exists, pools.numerator / jnp.where(exists, pools.denominator[..., None], 1.0), 0.0)
    return mean.reshape(*mean.shape[:-2], -1)


def dropped(dropout: nnx.Dropout, x: Array, rngs: nnx.Rngs | None) -> Array:
    """`x` after dropout, whose next key `rngs` draws; without it, as it is."""
    return x if rngs is None else dropout(x, rngs=rngs)
