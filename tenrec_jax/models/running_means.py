"""Running means: pools of several heads, each over the tokens that count for it, which all weigh the same."""

import jax
import jax.numpy as jnp
from jax import Array

from tenrec_jax.models.pooling import MASKED, Pool, empty_pool, prefix_pools
from tenrec_jax.models.slots import Slots


def extended(start: Pool, x_BTHE: Array, counts_BTH: Array) -> Pool:
    """The pools [B, H] after further tokens."""
    pools = prefix_pools(_logit(counts_BTH), x_BTHE, start)
    return jax.tree.map(lambda x: x[:, -1], pools)


def means(pools: Pool) -> Array:
    """The means of all heads side by side, [..., H * E]; zeros where no token counts."""
    exists = (pools.maximum > MASKED)[..., None]
    mean = jnp.where(exists, pools.numerator / jnp.where(exists, pools.denominator[..., None], 1.0), 0.0)
    return mean.reshape(*mean.shape[:-2], -1)


def means_before(x_BTHE: Array, counts_BTH: Array, slots: Slots) -> Array:
    """`means` over the tokens before each in its own timeline, [B, T, H * E]."""
    batch, _, heads, width = x_BTHE.shape
    pools = prefix_pools(_logit(counts_BTH), x_BTHE, empty_pool((batch,), heads, width), slots.segment)
    # Entry t covers t itself: what is before a token is known at the one before it.
    return jnp.where(slots.first[..., None], 0.0, jnp.roll(means(pools), 1, axis=1))


def _logit(counts: Array) -> Array:
    return jnp.where(counts, 0.0, MASKED)
