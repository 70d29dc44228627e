"""Softmax attention (Vaswani et al., 2017, arXiv:1706.03762): quadratic in the number of tokens, what additive attention is measured by.

Its memory is a cache of keys and values for a fixed number of tokens, its capacity. A context that outgrows it gives NaN from there on:
events are never left out in silence. Start again from the latest events then.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tenrec_jax.models.blocks import Encoder, EncoderConfig, Places, initial_recency_rates, split_heads


class Tokens(NamedTuple):
    """Tokens as they are attended to, [B, S, H, E] each."""

    key: Array
    value: Array


class SoftmaxAttention(nnx.Module):
    """Per head, `out_i = W_o sum_j softmax_j(Q_i K_j / sqrt(E) + rate_h * position_j) V_j` over the tokens j that i sees.

    With `recency_bias`, the bias is that of ALiBi (Press et al., 2022) with learned slopes: `rate_h * position_i` cancels.

    Args:
        config: shape and options.
        capacity: tokens that a memory can hold.
    """

    def __init__(self, config: EncoderConfig, capacity: int, *, rngs: nnx.Rngs) -> None:
        width, heads, dtype = config.width, config.num_heads, jnp.dtype(config.dtype)
        self.width, self.heads, self.capacity, self.dtype = width, heads, capacity, dtype
        self.recency_bias = config.recency_bias
        self.query = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        if config.recency_bias:
            self.recency_rate = nnx.Param(initial_recency_rates(heads))

    def start(self, shape: tuple[int, ...]) -> Tokens:
        """See `blocks.Attention`, here and below."""
        empty = jnp.zeros((*shape, self.capacity, self.heads, self.width // self.heads), self.dtype)
        return Tokens(empty, empty)

    def context(self, x_BTD: Array, places: Places) -> tuple[Array, Tokens]:
        """What tokens have seen is told by their places; `seen` holds all of them."""
        tokens = self._tokens(x_BTD)
        return self._attend(x_BTD, tokens, places.position, _earlier(places)), tokens

    def targets(self, x_BTD: Array, places: Places, seen: Tokens) -> Array:
        return self._attend_with_self(x_BTD, places.position + 1, seen, places.position, _earlier(places))

    def extend(self, x_BTD: Array, places: Places, memory: Tokens) -> tuple[Array, Tokens]:
        """Raises: ValueError: more tokens than the capacity."""
        if x_BTD.shape[1] > self.capacity:
            raise ValueError(f"{x_BTD.shape[1]} tokens do not fit in a memory of {self.capacity}")
        row_B1, slot_S = jnp.arange(len(x_BTD))[:, None], jnp.arange(self.capacity)
        slot_BT = jnp.where(places.mask, places.position, self.capacity)
        memory = Tokens(
            *(
                old.at[row_B1, slot_BT].set(new, mode="drop")
                for old, new in zip(memory, self._tokens(x_BTD), strict=True)
            )
        )
        output_BTD = self._attend(x_BTD, memory, slot_S[None], slot_S <= places.position[..., None])
        return self._unless_full(output_BTD, places.position + 1), memory

    def isolated(self, x_BCD: Array, position_BC: Array, memory: Tokens) -> Array:
        slot_S = jnp.arange(self.capacity)
        seen_BCS = slot_S < position_BC[..., None]
        output_BCD = self._attend_with_self(x_BCD, position_BC, memory, slot_S[None], seen_BCS)
        return self._unless_full(output_BCD, position_BC)

    def _tokens(self, x: Array) -> Tokens:
        return Tokens(split_heads(self.key(x), self.heads), split_heads(self.value(x), self.heads))

    def _attend(self, x_BTD: Array, tokens: Tokens, position_BS: Array, seen_BTS: Array) -> Array:
        """`position_BS` is of the tokens; it broadcasts over users."""
        query_BTHE = split_heads(self.query(x_BTD), self.heads)
        bias_BHTS = None
        if self.recency_bias:
            bias_BHTS = (self.recency_rate[...] * position_BS[..., None]).swapaxes(1, 2)[:, :, None]
        attended = jax.nn.dot_product_attention(query_BTHE, *tokens, bias_BHTS, mask=seen_BTS[:, None])
        return self.out_proj(attended.reshape(x_BTD.shape))

    def _attend_with_self(
        self, x_BTD: Array, position_BT: Array, tokens: Tokens, position_BS: Array, seen_BTS: Array
    ) -> Array:
        """Each of `x_BTD` sees the tokens that it sees, and itself."""
        # Merging its own term by the tokens' log-sum-exp would save work, but `dot_product_attention` gives that without a gradient.
        both = Tokens(*(jnp.concatenate(pair, axis=1) for pair in zip(tokens, self._tokens(x_BTD), strict=True)))
        position_BS = jnp.broadcast_to(position_BS, (len(x_BTD), position_BS.shape[1]))
        itself_BTT = jnp.broadcast_to(jnp.eye(x_BTD.shape[1], dtype=bool), (*x_BTD.shape[:2], x_BTD.shape[1]))
        return self._attend(
            x_BTD,
            both,
            jnp.concatenate([position_BS, position_BT], axis=1),
            jnp.concatenate([seen_BTS, itself_BTT], axis=2),
        )

    def _unless_full(self, output_BTD: Array, length_BT: Array) -> Array:
        return jnp.where((length_BT <= self.capacity)[..., None], output_BTD, jnp.nan)


def _earlier(places: Places) -> Array:
    """Which tokens each token sees: the real ones of its own context up to itself, [B, T, T]."""
    causal_TT = jnp.tri(places.mask.shape[1], dtype=bool)
    return causal_TT & places.mask[:, None] & (places.segment[..., None] == places.segment[:, None])


class SoftmaxEncoder(Encoder):
    """An encoder with softmax attention, whose states hold `capacity` tokens."""

    def __init__(self, config: EncoderConfig, capacity: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, lambda rngs: SoftmaxAttention(config, capacity, rngs=rngs), rngs=rngs)
