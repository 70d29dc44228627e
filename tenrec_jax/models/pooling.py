"""Softmax pools that merge: the one primitive behind every mode of the Fastformer.

A pool over a set of tokens is `sum_i exp(logit_i) value_i / sum_i exp(logit_i)`. It is kept as three sums,

    maximum = max_i logit_i,   denominator = sum_i exp(logit_i - maximum),   numerator = sum_i exp(logit_i - maximum) value_i,

so that pools over disjoint sets merge exactly, as in the online softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867). A pool has a
fixed size, whatever number of tokens went into it. The maximum carries no gradient: a pool's mean does not depend on it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Logit of a token that must not count. Finite, so that the difference of two of them is not NaN.
MASKED = -1e30


class Pool(NamedTuple):
    """Sums of one softmax pool, or a batch of them, per head.

    Shapes: maximum [..., H], denominator [..., H], numerator [..., H, E].
    """

    maximum: Array
    denominator: Array
    numerator: Array

    def mean(self) -> Array:
        """The pooled value [..., H, E]. Undefined (NaN) for a pool into which no unmasked token went."""
        return self.numerator / self.denominator[..., None]


def empty_pool(shape: tuple[int, ...], heads: int, width: int) -> Pool:
    """Pools over no token, the neutral element of `merge`; `shape` are the leading dimensions."""
    return Pool(jnp.full((*shape, heads), MASKED), jnp.zeros((*shape, heads)), jnp.zeros((*shape, heads, width)))


def token_pool(logit: Array, value: Array) -> Pool:
    """The pool over a single token. Args: logit [..., H], value [..., H, E]."""
    maximum = jax.lax.stop_gradient(logit)
    weight = jnp.exp(logit - maximum)  # 1, but it carries the logit's gradient
    return Pool(maximum, weight, weight[..., None] * value)


def merge(left: Pool, right: Pool) -> Pool:
    """The pool over the union of two disjoint sets of tokens; leading dimensions broadcast."""
    maximum = jnp.maximum(left.maximum, right.maximum)
    scale_left, scale_right = jnp.exp(left.maximum - maximum), jnp.exp(right.maximum - maximum)
    return Pool(
        maximum,
        left.denominator * scale_left + right.denominator * scale_right,
        left.numerator * scale_left[..., None] + right.numerator * scale_right[..., None],
    )


def prefix_pools(logit_BTH: Array, value_BTHE: Array, start: Pool, *, chunk: int = 128) -> Pool:
    """Pools over every prefix: entry t covers `start` and the tokens 0..t.

    Linear in T: inside a chunk a lower-triangular product pools, between chunks one pool is carried. Each prefix is taken relative to
    its own running maximum, so no exponential overflows at any length.

    Args:
        logit_BTH: pooling logits, `MASKED` where a token must not count.
        value_BTHE: values.
        start: pool [B, H] of what came before.
        chunk: tokens that one triangular product covers.

    Returns:
        Pools with leading dimensions [B, T].
    """
    length = logit_BTH.shape[1]
    if length <= chunk:
        return _chunk_prefixes(start, logit_BTH, value_BTHE)
    padding = -length % chunk
    logit_BTH = jnp.pad(logit_BTH, ((0, 0), (0, padding), (0, 0)), constant_values=MASKED)
    value_BTHE = jnp.pad(value_BTHE, ((0, 0), (0, padding), (0, 0), (0, 0)))

    def chunks_first(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def step(carry: Pool, chunk_of: tuple[Array, Array]) -> tuple[Pool, Pool]:
        pools = _chunk_prefixes(carry, *chunk_of)
        return jax.tree.map(lambda x: x[:, -1], pools), pools

    _, pools = jax.lax.scan(step, start, (chunks_first(logit_BTH), chunks_first(value_BTHE)))

    def tokens_first(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(tokens_first, pools)


def _chunk_prefixes(start: Pool, logit_BTH: Array, value_BTHE: Array) -> Pool:
    """`prefix_pools` for one chunk, with [T, T] weights per head that live only inside it."""
    frozen_BTH = jax.lax.stop_gradient(logit_BTH)
    maximum_BTH = jnp.maximum(jax.lax.cummax(frozen_BTH, axis=1), start.maximum[:, None])
    logit_BHT, maximum_BHT = jnp.swapaxes(logit_BTH, 1, 2), jnp.swapaxes(maximum_BTH, 1, 2)
    causal_TT = jnp.tri(logit_BTH.shape[1], dtype=bool)
    # Masked before exp: above the diagonal the difference may be large and its exponential infinite.
    weight_BHTT = jnp.exp(jnp.where(causal_TT, logit_BHT[:, :, None, :] - maximum_BHT[..., None], -jnp.inf))
    carried_BTH = jnp.exp(start.maximum[:, None] - maximum_BTH)
    return Pool(
        maximum_BTH,
        jnp.swapaxes(weight_BHTT.sum(-1), 1, 2) + carried_BTH * start.denominator[:, None],
        jnp.einsum("bhts,bshe->bthe", weight_BHTT, value_BTHE) + carried_BTH[..., None] * start.numerator[:, None],
    )
