"""Fastformer: additive attention, linear in the number of tokens (Wu et al., 2021, arXiv:2108.09084).

Per head, tokens give pooling logits `a_i, b_i` and projections `Q_i, K_i, V_i`. With `pool_P` the softmax pool over a set P of tokens,

    q = pool_P(a, Q),   p = pool_P(b, K),   k = q * p,   out_i = W_o(V_i * k + Q_i),

and with `pool_residual` W_o(V_i * k + Q_i + p): what the tokens share then reaches the output as it is, not as a factor of V_i alone.
The encoder's modes (`blocks`) differ only in the set P. What a context leaves behind is one pool of queries and keys per layer, of
constant size. Beside those modes there is `joint`, in which every token pools over every token: a score then depends on the other
candidates (parity with other systems alone).
"""

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tenrec_jax.models.blocks import Block, Encoder, EncoderConfig, Places, initial_recency_rates, split_heads
from tenrec_jax.models.dense import Linear, together
from tenrec_jax.models.pooling import MASKED, Pool, empty_pool, merge, prefix_pools, token_pool


def l2_normalize(x: Array, eps: float = 1e-6) -> Array:
    """`x / max(||x||, eps)` over the last axis, with a finite gradient at zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), eps * eps))


class AdditiveAttention(nnx.Module):
    """Additive attention of the variant "tenrec": own value projection, optional L2 normalisation, `W_o(V * k + Q)`.

    Its memory is a pool of 2H heads, of the queries and of the keys.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        width, heads, dtype = config.width, config.num_heads, jnp.dtype(config.dtype)
        self.width, self.heads, self.normalize, self.recency_bias = width, heads, config.normalize, config.recency_bias
        self.pool_residual = config.pool_residual
        self.query = Linear(width, width, dtype=dtype, rngs=rngs)
        self.key = Linear(width, width, dtype=dtype, rngs=rngs)
        self.value = Linear(width, width, dtype=dtype, rngs=rngs)
        # Pooling logits are exponentiated and cost next to nothing: float32 always.
        self.query_weight = Linear(width, heads, rngs=rngs)
        self.key_weight = Linear(width, heads, rngs=rngs)
        self.out_proj = Linear(width, width, dtype=dtype, rngs=rngs)
        if config.recency_bias:
            self.recency_rate = nnx.Param(initial_recency_rates(heads))

    def joint(self, x_BTD: Array, mask_BT: Array) -> Array:
        """Every token pools over all tokens, with the numerical guards of the original system. Returns [B, T, D]."""
        both = together(x_BTD, self.query, self.value, self.query_weight, self.key_weight)
        query_BTD, value_BTD, logit_BTG = jnp.split(both, [self.width, 2 * self.width], axis=-1)
        # Weights are at least 1e-9 and not renormalised. A projection of the pooled tokens is the pool of their projections.
        weight_BTG = jax.nn.softmax(jnp.where(mask_BT[..., None], logit_BTG, -1e4), axis=1)
        weight_BTG = jnp.maximum(weight_BTG, 1e-9)
        pooled_BGD, total_BG = jnp.einsum("btg,btd->bgd", weight_BTG, x_BTD), weight_BTG.sum(1)

        def project(layer: Linear, heads: slice) -> Array:
            kernel_DHE = split_heads(layer.kernel[...], self.heads)
            pooled_BHE = jnp.einsum("bhd,dhe->bhe", pooled_BGD[:, heads], kernel_DHE)
            return pooled_BHE + total_BG[:, heads, None] * split_heads(layer.bias[...], self.heads)

        query_BHE, key_BHE = project(self.query, slice(None, self.heads)), project(self.key, slice(self.heads, None))
        value_BTHE, query_BTHE = split_heads(value_BTD, self.heads), split_heads(query_BTD, self.heads)
        return jnp.clip(self._output(value_BTHE, query_BTHE, query_BHE[:, None], key_BHE[:, None]), -100.0, 100.0)

    def start(self, shape: tuple[int, ...]) -> Pool:
        """See `blocks.Attention`, here and below."""
        return empty_pool(shape, 2 * self.heads, self.width // self.heads)

    def context(self, x_BTD: Array, places: Places) -> tuple[Array, Pool]:
        """What a token has seen is the pool of its prefix; the pools lead with [B, T]."""
        return self._over_prefixes(x_BTD, places, self.start(x_BTD.shape[:1]))

    def targets(self, x_BTD: Array, places: Places, seen: Pool) -> Array:
        return self._over_pool_and_self(x_BTD, places.position + 1, seen)

    def extend(self, x_BTD: Array, places: Places, memory: Pool) -> tuple[Array, Pool]:
        output_BTD, prefixes = self._over_prefixes(x_BTD, places, memory)
        return output_BTD, jax.tree.map(lambda leaf: leaf[:, -1], prefixes)

    def isolated(self, x_BCD: Array, position_BC: Array, memory: Pool) -> Array:
        return self._over_pool_and_self(x_BCD, position_BC, jax.tree.map(lambda leaf: leaf[:, None], memory))

    def _over_prefixes(self, x_BTD: Array, places: Places, start: Pool) -> tuple[Array, Pool]:
        query_and_key_BTGE, value_BTHE = self._heads(x_BTD)
        logit_BTG = jnp.where(places.mask[..., None], self._logits(x_BTD, places.position), MASKED)
        pools = prefix_pools(logit_BTG, query_and_key_BTGE.astype(jnp.float32), start, places.segment)
        return self._over(pools, value_BTHE, query_and_key_BTGE[..., : self.heads, :]), pools

    def _over_pool_and_self(self, x: Array, position: Array, pool: Pool) -> Array:
        query_and_key, value = self._heads(x)
        own = token_pool(self._logits(x, position), query_and_key.astype(jnp.float32))
        return self._over(merge(pool, own), value, query_and_key[..., : self.heads, :])

    def _heads(self, x: Array) -> tuple[Array, Array]:
        """Queries and, after them, keys [..., 2H, E], and values [..., H, E]. Pools sum the former in float32."""
        query_and_key, value = together(x, self.query, self.key), self.value(x)
        return split_heads(query_and_key, 2 * self.heads), split_heads(value, self.heads)

    def _logits(self, x: Array, position: Array) -> Array:
        """Pooling logits [..., 2H]: of the queries' pools, then of the keys'."""
        logit = together(x, self.query_weight, self.key_weight)
        return logit + position[..., None] * jnp.tile(self.recency_rate[...], 2) if self.recency_bias else logit

    def _normalized(self, x: Array) -> Array:
        return l2_normalize(x) if self.normalize else x

    def _over(self, pools: Pool, value: Array, query: Array) -> Array:
        return self._output(value, query, *jnp.split(pools.mean(), 2, axis=-2))

    def _output(self, value: Array, query: Array, pooled_query: Array, pooled_key: Array) -> Array:
        mixed = value * self._normalized(self._normalized(pooled_query) * pooled_key) + query
        if self.pool_residual:
            mixed = mixed + pooled_key
        return self.out_proj(mixed.reshape(*mixed.shape[:-2], -1))


class PaperAttention(nnx.Module):
    """Additive attention as published, the variant "paper": value = query, key logits from `q * K`, residual after the projection.

    Its key logits depend on the pooled query, so its pools do not merge and it has the joint mode alone.
    """

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs) -> None:
        self.heads = num_heads
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.query_att = nnx.Linear(width, num_heads, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.key_att = nnx.Linear(width, num_heads, rngs=rngs)
        self.transform = nnx.Linear(width, width, rngs=rngs)

    def joint(self, x_BTD: Array, mask_BT: Array) -> Array:
        """Wu et al. (2021), equations 1-6. Masked logits get -10000 added. Returns [B, T, D]."""
        scale = (x_BTD.shape[-1] // self.heads) ** -0.5
        bias_BT1 = jnp.where(mask_BT, 0.0, -10000.0)[..., None]

        def split(y: Array) -> Array:
            return y.reshape(*y.shape[:-1], self.heads, -1)

        def pool(logit_BTH: Array, value_BTHE: Array) -> Array:
            weight_BTH = jax.nn.softmax(logit_BTH * scale + bias_BT1, axis=1)
            return jnp.einsum("bth,bthe->bhe", weight_BTH, value_BTHE)

        query_BTD, key_BTD = self.query(x_BTD), self.key(x_BTD)
        query_BHE = pool(self.query_att(query_BTD), split(query_BTD))
        mixed_BTHE = split(key_BTD) * query_BHE[:, None]
        key_BHE = pool(self.key_att(mixed_BTHE.reshape(x_BTD.shape)), mixed_BTHE)
        weighted_BTHE = key_BHE[:, None] * split(query_BTD)
        return self.transform(weighted_BTHE.reshape(x_BTD.shape)) + query_BTD


class FastformerEncoder(Encoder):
    """An encoder with additive attention."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, lambda rngs: AdditiveAttention(config, rngs=rngs), rngs=rngs)

    def joint(self, x_BTD: Array, mask_BT: Array, key: Array | None = None) -> Array:
        """All tokens see all tokens. `mask_BT` is True on real tokens. Returns [B, T, D]."""

        def layer(block: Block, x_BTD: Array, _: None, rngs: nnx.Rngs | None) -> tuple[Array, None]:
            attention = cast(AdditiveAttention, block.attention)
            return block(x_BTD, lambda y: (attention.joint(y, mask_BT), None), rngs)

        return self._final(self._scan(layer, x_BTD, None, key)[0])
