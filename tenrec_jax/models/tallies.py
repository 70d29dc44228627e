"""What users did with the items of each category: sums of constant size, and the shares that they give.

A tally counts events and, of those, the ones with each action: [..., 1 + A], the number of events first. Tallies are whole numbers, exact
in float32 up to 2^24 events.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tenrec_jax.models.slots import Slots
from tenrec_jax.timeline import Events

# How many events a user's own share weighs against those in a category, to begin with.
STRENGTH = 10.0


def no_tallies(users: int, categories: int, actions: int) -> Array:
    """The tallies of users without events, one a category: [B, K, 1 + A]."""
    return jnp.zeros((users, categories, 1 + actions))


def with_events(tally_BKF: Array, events: Events) -> Array:
    """The tallies after further events."""
    return tally_BKF.at[jnp.arange(len(tally_BKF))[:, None], events.category].add(_of_each(events))


def tallies_before(events: Events, slots: Slots, categories: int) -> tuple[Array, Array]:
    """Of the events before each one in its own timeline: the tally of those of its category, and that of all; [B, T, 1 + A] each."""
    tally_BTF = _of_each(events)
    of_category_BT = slots.segment * categories + events.category
    return _sums_before(tally_BTF, of_category_BT), _sums_before(tally_BTF, slots.segment)


def _of_each(events: Events) -> Array:
    """What each event adds to a tally, [B, T, 1 + A]; nothing where it does not count."""
    one_BT1 = jnp.ones((*events.item.shape, 1), jnp.float32)
    return jnp.where(events.mask[..., None], jnp.concatenate([one_BT1, events.action], axis=-1), 0.0)


def _sums_before(x_BTF: Array, group_BT: Array) -> Array:
    """The sums over the entries before each that are of its group.

    Sorted by group, each group is a stretch of one running sum. `x` is not negative, so the largest sum at which a stretch began is that of
    the latest one.
    """
    order_BT = jnp.argsort(group_BT, axis=1, stable=True)
    sorted_BTF = jnp.take_along_axis(x_BTF, order_BT[..., None], axis=1)
    before_BTF = jnp.cumsum(sorted_BTF, axis=1) - sorted_BTF
    group_BT = jnp.take_along_axis(group_BT, order_BT, axis=1)
    begins_BT = jnp.diff(group_BT, axis=1, prepend=-1) > 0
    begin_BTF = jax.lax.cummax(jnp.where(begins_BT[..., None], before_BTF, 0.0), axis=1)
    row_B1 = jnp.arange(len(order_BT))[:, None]
    return jnp.zeros_like(x_BTF).at[row_B1, order_BT].set(before_BTF - begin_BTF, unique_indices=True)


class MatchedRates(nnx.Module):
    """How a user has met the category of a candidate, against how the user meets anything.

    With n and k_a the user's events and those with action a, and m and l_a those of them in the candidate's category,

        r_a = (k_a + 1/2) / (n + 1),   q_a = (l_a + s_a r_a) / (m + s_a):

    a share under Jeffreys' prior, towards which the category's is smoothed as if by s_a events, s_a learned. The features are
    logit(q_a) - logit(r_a), logit(r_a), log(1 + m) and log(1 + n), the latter ones brought to a size of about one.
    """

    def __init__(self, actions: int) -> None:
        self.width = 2 * actions + 2
        self.log_strength = nnx.Param(jnp.full((actions,), jnp.log(STRENGTH)))

    def __call__(self, matched: Array, own: Array) -> Array:
        """Tallies [..., 1 + A], of the category and, broadcast to them, of all events, to features [..., 2 A + 2]."""
        own = jnp.broadcast_to(own, matched.shape)
        (m, of_category), (n, of_all) = ((tally[..., :1], tally[..., 1:]) for tally in (matched, own))
        strength = jnp.exp(self.log_strength[...])
        rate = (of_all + 0.5) / (n + 1.0)
        with_action, without = of_category + strength * rate, m - of_category + strength * (1.0 - rate)
        logit = jnp.log(rate) - jnp.log1p(-rate)
        difference = jnp.log(with_action) - jnp.log(without) - logit
        return jnp.concatenate([difference, 0.25 * logit, 0.25 * jnp.log1p(m), 0.25 * jnp.log1p(n)], axis=-1)
