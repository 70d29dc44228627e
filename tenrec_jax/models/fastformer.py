"""Fastformer: additive attention, linear in the number of tokens (Wu et al., 2021, arXiv:2108.09084).

Per head, tokens give pooling logits `a_i, b_i` and projections `Q_i, K_i, V_i`. With `pool_P` the softmax pool over a set P of tokens,

    q = pool_P(a, Q),   k = q * pool_P(b, K),   out_i = W_o(V_i * k + Q_i).

The modes differ only in the set P over which a token pools:

    joint      every token over every token; a score then depends on the other candidates (parity with other systems alone);
    context    an event over the events up to and including itself;
    isolated   a candidate over the whole context and itself, blind to the other candidates;
    timeline   a target at t over the context before t and itself: `isolated` at every t, in one linear pass.

In `context` and `timeline` a row may hold the timelines of several users, one after the other: nothing passes from one to the next.

What a context leaves behind is one pool of queries and keys per layer, an `EncoderState` of constant size: `extend` adds events to it, and
`isolated` scores candidates against it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tenrec_jax.models.dense import LayerNorm, Linear, together
from tenrec_jax.models.pooling import MASKED, Pool, empty_pool, merge, prefix_pools, token_pool

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # `jax.nn.gelu` goes through erfc, which costs twice as much and differs by rounding.
    "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5)),
    "relu": jax.nn.relu,
}
NO_REMATERIALISATION = "none"


@dataclass(frozen=True)
class FastformerConfig:
    """Shape and options of an encoder.

    Attributes:
        num_layers: number of blocks.
        width: model width D, a multiple of `num_heads`.
        num_heads: heads H; a head is `width // num_heads` wide.
        hidden: width of the feed-forward layer.
        activation: "gelu" (exact, erf form) or "relu".
        normalize: L2-normalise the pooled query and key per head.
        recency_bias: add `rate_h * position` to the pooling logits, with one learned rate per head. The common factor cancels inside a
            pool, so this is an exponential decay of older events that stays linear.
        dropout: rate on the outputs of attention and feed-forward and on its hidden layer.
        remat: "none" or a policy of `jax.checkpoint_policies` by name, for example "nothing_saveable" or "dots_saveable".
        unroll: unroll the loop over layers: faster steps for a few layers, but compile time grows with depth and rematerialisation
            frees little memory.
    """

    num_layers: int
    width: int
    num_heads: int
    hidden: int
    activation: Literal["gelu", "relu"] = "gelu"
    normalize: bool = True
    recency_bias: bool = False
    dropout: float = 0.0
    remat: str = NO_REMATERIALISATION
    unroll: bool = False


class EncoderState(NamedTuple):
    """A context in constant size: per layer and user one pool of queries and keys (2H heads, leaves lead with [L, B]), and a count.

    `length_B` counts the tokens.
    """

    pools: Pool
    length_B: Array


class Places(NamedTuple):
    """Where context tokens stand, [B, T] each.

    Attributes:
        mask: True on tokens that others pool over.
        segment: ascending numbers of the contexts packed into a row.
        position: number of real tokens up to and including this one in its context, minus one; what recency counts.
    """

    mask: Array
    segment: Array
    position: Array


def places_of(mask_BT: Array, first_BT: Array | None = None) -> Places:
    """The places of context tokens; `first_BT` is True where a context begins, None for one context a row."""
    count_BT = jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32)
    if first_BT is None:
        return Places(mask_BT, jnp.zeros_like(count_BT), count_BT - 1)
    before_BT = jax.lax.cummax(jnp.where(first_BT, count_BT - mask_BT, 0), axis=1)
    return Places(mask_BT, jnp.cumsum(first_BT, axis=1, dtype=jnp.int32) - 1, count_BT - before_BT - 1)


def layer_norm(width: int, rngs: nnx.Rngs, eps: float = 1e-6) -> LayerNorm:
    """LayerNorm with the two-pass variance: the fast one loses all digits where the mean is large."""
    return LayerNorm(width, epsilon=eps, rngs=rngs)


def l2_normalize(x: Array, eps: float = 1e-6) -> Array:
    """`x / max(||x||, eps)` over the last axis, with a finite gradient at zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), eps * eps))


class AdditiveAttention(nnx.Module):
    """Additive attention of the variant "tenrec": own value projection, optional L2 normalisation, `W_o(V * k + Q)`."""

    def __init__(self, config: FastformerConfig, *, rngs: nnx.Rngs) -> None:
        width, heads = config.width, config.num_heads
        self.heads, self.normalize, self.recency_bias = heads, config.normalize, config.recency_bias
        self.query = Linear(width, width, rngs=rngs)
        self.key = Linear(width, width, rngs=rngs)
        self.value = Linear(width, width, rngs=rngs)
        self.query_weight = Linear(width, heads, rngs=rngs)
        self.key_weight = Linear(width, heads, rngs=rngs)
        self.out_proj = Linear(width, width, rngs=rngs)
        if config.recency_bias:
            # One time scale a head to begin with: from the last few events to about a hundred.
            self.recency_rate = nnx.Param(jnp.geomspace(0.5, 0.01, heads) if heads > 1 else jnp.full((1,), 0.1))

    def joint(self, x_BTD: Array, mask_BT: Array) -> Array:
        """Every token pools over all tokens, with the numerical guards of the original system. Returns [B, T, D]."""
        batch, length, width = x_BTD.shape
        both = together(x_BTD, self.query, self.value, self.query_weight, self.key_weight)
        query_BTD, value_BTD, logit_BTG = jnp.split(both, [width, 2 * width], axis=-1)
        # Weights are at least 1e-9 and not renormalised. A projection of the pooled tokens is the pool of their projections.
        weight_BTG = jax.nn.softmax(jnp.where(mask_BT[..., None], logit_BTG, -1e4), axis=1)
        weight_BTG = jnp.maximum(weight_BTG, 1e-9)
        pooled_BGD, total_BG = jnp.einsum("btg,btd->bgd", weight_BTG, x_BTD), weight_BTG.sum(1)

        def project(layer: Linear, heads: slice) -> Array:
            kernel_DHE = layer.kernel[...].reshape(width, self.heads, -1)
            bias_HE = layer.bias[...].reshape(self.heads, -1)
            pooled_BHE = jnp.einsum("bhd,dhe->bhe", pooled_BGD[:, heads], kernel_DHE)
            return pooled_BHE + total_BG[:, heads, None] * bias_HE

        query_BHE = self._normalized(project(self.query, slice(None, self.heads)))
        key_BHE = self._normalized(query_BHE * project(self.key, slice(self.heads, None)))
        value_BTHE, query_BTHE = (x.reshape(batch, length, self.heads, -1) for x in (value_BTD, query_BTD))
        return jnp.clip(self._output(value_BTHE, key_BHE[:, None], query_BTHE), -100.0, 100.0)

    def context(self, x_BTD: Array, places: Places, start: Pool) -> tuple[Array, Pool]:
        """Events pool over `start` and their prefix. Returns the outputs [B, T, D] and the pools of every prefix, leading with [B, T]."""
        query_and_key_BTGE, value_BTHE = self._heads(x_BTD)
        logit_BTG = jnp.where(places.mask[..., None], self._logits(x_BTD, places.position), MASKED)
        pools = prefix_pools(logit_BTG, query_and_key_BTGE, start, places.segment)
        return self._output(value_BTHE, self._global_key(pools), query_and_key_BTGE[..., : self.heads, :]), pools

    def isolated(self, x_BCD: Array, position_BC: Array, context: Pool) -> Array:
        """Each candidate pools over its context and itself. `context` leads with dimensions that broadcast to [B, C]."""
        query_and_key_BCGE, value_BCHE = self._heads(x_BCD)
        own = token_pool(self._logits(x_BCD, position_BC), query_and_key_BCGE)
        return self._output(value_BCHE, self._global_key(merge(context, own)), query_and_key_BCGE[..., : self.heads, :])

    def _heads(self, x: Array) -> tuple[Array, Array]:
        """Queries and, after them, keys [..., 2H, E], and values [..., H, E]."""
        query_and_key, value = together(x, self.query, self.key), self.value(x)
        return query_and_key.reshape(*x.shape[:-1], 2 * self.heads, -1), value.reshape(*x.shape[:-1], self.heads, -1)

    def _logits(self, x: Array, position: Array) -> Array:
        """Pooling logits [..., 2H]: of the queries' pools, then of the keys'."""
        logit = together(x, self.query_weight, self.key_weight)
        return logit + position[..., None] * jnp.tile(self.recency_rate[...], 2) if self.recency_bias else logit

    def _normalized(self, x: Array) -> Array:
        return l2_normalize(x) if self.normalize else x

    def _global_key(self, pools: Pool) -> Array:
        query, key = jnp.split(pools.mean(), 2, axis=-2)
        return self._normalized(self._normalized(query) * key)

    def _output(self, value: Array, key: Array, query: Array) -> Array:
        mixed = value * key + query
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


class FeedForward(nnx.Module):
    """Two dense layers with an activation between them."""

    def __init__(self, config: FastformerConfig, *, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        self.up = Linear(config.width, config.hidden, rngs=rngs)
        self.down = Linear(config.hidden, config.width, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x: Array, rngs: nnx.Rngs | None) -> Array:
        hidden = self.dropout(ACTIVATIONS[self.activation](self.up(x)), deterministic=rngs is None, rngs=rngs)
        return self.down(hidden)


class Block(nnx.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: FastformerConfig, *, rngs: nnx.Rngs) -> None:
        self.norm1 = layer_norm(config.width, rngs)
        self.attention = AdditiveAttention(config, rngs=rngs)
        self.norm2 = layer_norm(config.width, rngs)
        self.ffn = FeedForward(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def joint(self, x_BTD: Array, mask_BT: Array, rngs: nnx.Rngs | None) -> Array:
        return self._residual(x_BTD, self.attention.joint(self.norm1(x_BTD), mask_BT), rngs)

    def context(self, x_BTD: Array, places: Places, start: Pool, rngs: nnx.Rngs | None) -> tuple[Array, Pool]:
        attended_BTD, pools = self.attention.context(self.norm1(x_BTD), places, start)
        return self._residual(x_BTD, attended_BTD, rngs), pools

    def isolated(self, x_BCD: Array, position_BC: Array, context: Pool, rngs: nnx.Rngs | None) -> Array:
        return self._residual(x_BCD, self.attention.isolated(self.norm1(x_BCD), position_BC, context), rngs)

    def _residual(self, x: Array, attended: Array, rngs: nnx.Rngs | None) -> Array:
        x = x + self.dropout(attended, deterministic=rngs is None, rngs=rngs)
        return x + self.dropout(self.ffn(self.norm2(x), rngs), deterministic=rngs is None, rngs=rngs)


class FastformerEncoder(nnx.Module):
    """A stack of blocks and a final LayerNorm.

    The blocks' parameters are stacked on a leading axis L and applied by `jax.lax.scan`, so that compile time does not grow with depth
    and rematerialisation really frees memory. All methods take an optional dropout key; without one they are deterministic.
    """

    def __init__(self, config: FastformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = stacked(rngs)
        self.final_norm = layer_norm(config.width, rngs)

    def start(self, batch_size: int) -> EncoderState:
        """The state of an empty context for `batch_size` users."""
        heads = self.config.num_heads
        pools = empty_pool((self.config.num_layers, batch_size), 2 * heads, self.config.width // heads)
        return EncoderState(pools, jnp.zeros((batch_size,), jnp.int32))

    def joint(self, x_BTD: Array, mask_BT: Array, key: Array | None = None) -> Array:
        """All tokens see all tokens. `mask_BT` is True on real tokens. Returns [B, T, D]."""

        def layer(block: Block, x_BTD: Array, _: None, rngs: nnx.Rngs | None) -> tuple[Array, None]:
            return block.joint(x_BTD, mask_BT, rngs), None

        return self.final_norm(self._scan(layer, x_BTD, None, key)[0])

    def extend(
        self, state: EncoderState, x_BTD: Array, mask_BT: Array, key: Array | None = None
    ) -> tuple[Array, EncoderState]:
        """Append events to a context.

        Args:
            state: the context so far.
            x_BTD: embedded events in time order.
            mask_BT: True on real events; padding stands at the end.

        Returns:
            The events' outputs [B, T, D], each a function of the events up to it, and the extended state.
        """
        places = places_of(mask_BT)
        places = places._replace(position=places.position + state.length_B[:, None])

        def layer(block: Block, x_BTD: Array, start: Pool, rngs: nnx.Rngs | None) -> tuple[Array, Pool]:
            x_BTD, prefixes = block.context(x_BTD, places, start, rngs)
            return x_BTD, jax.tree.map(lambda leaf: leaf[:, -1], prefixes)

        x_BTD, pools = self._scan(layer, x_BTD, state.pools, key)
        return self.final_norm(x_BTD), EncoderState(pools, state.length_B + mask_BT.sum(1, dtype=jnp.int32))

    def context(self, x_BTD: Array, places: Places, key: Array | None = None) -> Array:
        """The outputs [B, T, D] of context tokens, each a function of the tokens of its own context up to it."""

        def layer(block: Block, x_BTD: Array, start: Pool, rngs: nnx.Rngs | None) -> tuple[Array, None]:
            return block.context(x_BTD, places, start, rngs)[0], None

        return self.final_norm(self._scan(layer, x_BTD, self.start(x_BTD.shape[0]).pools, key)[0])

    def isolated(self, state: EncoderState, x_BCD: Array) -> Array:
        """Score-side encoding: each candidate sees the context of `state` and itself. Returns [B, C, D]."""
        position_BC = jnp.broadcast_to(state.length_B[:, None], x_BCD.shape[:2])

        def layer(block: Block, x_BCD: Array, context: Pool, rngs: nnx.Rngs | None) -> tuple[Array, None]:
            return block.isolated(x_BCD, position_BC, jax.tree.map(lambda leaf: leaf[:, None], context), rngs), None

        return self.final_norm(self._scan(layer, x_BCD, state.pools, None)[0])

    def timeline(self, x_BTD: Array, target_BTD: Array, places: Places, key: Array | None = None) -> Array:
        """Encode a target at every position of timelines in one pass.

        Args:
            x_BTD: context tokens; the first of a context is the user's, the others are events with their actions.
            target_BTD: target tokens; target t stands for the event after context token t, its actions unknown.
            places: of the context tokens. The first token of a context is real.

        Returns:
            [B, T, D]: entry t equals `isolated` for target t with the tokens of its context up to t.
        """

        def layer(
            block: Block, tokens: tuple[Array, Array], start: Pool, rngs: nnx.Rngs | None
        ) -> tuple[tuple[Array, Array], None]:
            context_BTD, prefixes = block.context(tokens[0], places, start, rngs)
            return (context_BTD, block.isolated(tokens[1], places.position + 1, prefixes, rngs)), None

        start = self.start(x_BTD.shape[0])
        (_, target_BTD), _ = self._scan(layer, (x_BTD, target_BTD), start.pools, key)
        return self.final_norm(target_BTD)

    def _scan(self, layer: Callable, carry: Array | tuple, per_layer: Pool | None, key: Array | None) -> tuple:
        """Run `layer(block, carry, per_layer[l], rngs) -> (carry, output)` over the blocks; outputs are stacked."""
        graphdef, parameters = nnx.split(self.blocks)
        keys = None if key is None else jax.random.split(key, self.config.num_layers)

        def body(carry: Array | tuple, inputs: tuple) -> tuple:
            parameters, per_layer, key = inputs
            rngs = None if key is None else nnx.Rngs(dropout=key)
            return layer(nnx.merge(graphdef, parameters), carry, per_layer, rngs)

        if self.config.remat != NO_REMATERIALISATION:
            body = jax.checkpoint(body, policy=getattr(jax.checkpoint_policies, self.config.remat), prevent_cse=False)
        return jax.lax.scan(body, carry, (parameters, per_layer, keys), unroll=self.config.unroll)
