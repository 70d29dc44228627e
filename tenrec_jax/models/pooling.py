"""Softmax pools that merge: the one primitive behind every mode of the Fastformer.

A pool over a set of tokens is `sum_i exp(logit_i) value_i / sum_i exp(logit_i)`. It is kept as three sums,

    maximum = max_i logit_i,   denominator = sum_i exp(logit_i - maximum),   numerator = sum_i exp(logit_i - maximum) value_i,

so that pools over disjoint sets merge exactly, as in the online softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867). A pool has a
fixed size, whatever number of tokens went into it. The maximum carries no gradient: a pool's mean does not depend on it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Logit of a token that must not count. Finite, so that the difference of two of them is not NaN.
MASKED = -1e30
# Tokens that one masked product covers: its cost a token grows with it, the steps between chunks shrink with it.
CHUNK = 32


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


def prefix_pools(
    logit_BTH: Array, value_BTHE: Array, start: Pool, segment_BT: Array | None = None, *, chunk: int = CHUNK
) -> Pool:
    """Pools over every prefix: entry t covers the tokens 0..t of t's own segment, and `start` in the first segment.

    Linear in T: inside a chunk a masked product over its tokens pools, all chunks at once; between chunks one pool is carried. Each
    prefix is taken relative to its own maximum, so no exponential overflows at any length.

    Args:
        logit_BTH: pooling logits, `MASKED` where a token must not count.
        value_BTHE: values.
        start: pool [B, H] of what came before.
        segment_BT: ascending numbers of stretches that must not see each other; None makes a row one segment.
        chunk: tokens that one product covers.

    Returns:
        Pools with leading dimensions [B, T].
    """
    batch, length = logit_BTH.shape[:2]
    if segment_BT is None:
        segment_BT = jnp.zeros((batch, length), jnp.int32)
    chunk = min(chunk, length)
    padding = -length % chunk

    def chunked(x: Array, **how: Any) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)), **how)
        return x.reshape(batch, -1, chunk, *x.shape[2:])

    segment_BNC = chunked(segment_BT, mode="edge")
    within = _within_chunks(chunked(logit_BTH, constant_values=MASKED), chunked(value_BTHE), segment_BNC)
    # What came before a chunk continues the segment of the token before it.
    before_BN = jnp.concatenate([segment_BT[:, :1], segment_BNC[:, :-1, -1]], axis=1)
    carried = _carried(start, jax.tree.map(lambda x: x[:, :, -1], within), before_BN == segment_BNC[:, :, -1])
    continues_BNC = segment_BNC == before_BN[..., None]
    pools = merge(_where(continues_BNC, jax.tree.map(lambda x: x[:, :, None], carried)), within)
    return jax.tree.map(lambda x: x.reshape(batch, -1, *x.shape[3:])[:, :length], pools)


def _within_chunks(logit_BNCH: Array, value_BNCHE: Array, segment_BNC: Array) -> Pool:
    """Each token's pool over the tokens of its chunk and segment up to itself, with [C, C] weights per head and chunk."""
    causal_CC = jnp.tri(logit_BNCH.shape[2], dtype=bool)
    seen_BNCC = causal_CC & (segment_BNC[..., :, None] == segment_BNC[..., None, :])
    logit_BNHC = jnp.swapaxes(logit_BNCH, 2, 3)
    # Masked before exp: a later logit may be so much larger that its exponential is infinite.
    logit_BNHCC = jnp.where(seen_BNCC[:, :, None], logit_BNHC[..., None, :], -jnp.inf)
    maximum_BNHC = jax.lax.stop_gradient(logit_BNHCC.max(-1))
    weight_BNHCC = jnp.exp(logit_BNHCC - maximum_BNHC[..., None])
    return Pool(
        jnp.swapaxes(maximum_BNHC, 2, 3),
        jnp.swapaxes(weight_BNHCC.sum(-1), 2, 3),
        jnp.einsum("bnhts,bnshe->bnthe", weight_BNHCC, value_BNCHE),
    )


def _carried(start: Pool, last: Pool, continues_BN: Array) -> Pool:
    """What is carried into each chunk [B, N], from the pools of the chunks' last tokens and whether those continue what is carried."""

    def step(carry: Pool, chunk: tuple[Pool, Array]) -> tuple[Pool, Pool]:
        last, continues_B = chunk
        return merge(_where(continues_B, carry), last), carry

    by_chunk = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (last, continues_BN))
    _, carried = jax.lax.scan(step, start, by_chunk)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), carried)


def _where(condition: Array, pool: Pool) -> Pool:
    """The pool where `condition` holds, the empty pool elsewhere; `condition` has the leading dimensions."""
    return Pool(
        jnp.where(condition[..., None], pool.maximum, MASKED),
        jnp.where(condition[..., None], pool.denominator, 0.0),
        jnp.where(condition[..., None, None], pool.numerator, 0.0),
    )
