"""Residual blocks and their stack: an encoder of timelines, whatever its attention.

The modes differ only in the set of tokens that a token attends to:

    context    an event: the events up to and including itself;
    isolated   a candidate: the whole context and itself, blind to the other candidates;
    timeline   a target at t: the context before t and itself; `isolated` at every t, in one pass.

In `context` and `timeline` a row may hold the timelines of several users, one after the other: nothing passes from one to the next.
What a context leaves behind is an `EncoderState`: `extend` adds events to it, and `isolated` scores candidates against it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tenrec_jax.models.dense import LayerNorm, Linear
from tenrec_jax.settings import Count, Settings, Share

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # `jax.nn.gelu` goes through erfc, which costs twice as much and differs by rounding.
    "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5)),
    "relu": jax.nn.relu,
}
NO_REMATERIALISATION = "none"


@dataclass(frozen=True)
class EncoderConfig(Settings):
    """Shape and options of an encoder.

    Attributes:
        num_layers: number of blocks.
        width: model width D, a multiple of `num_heads`.
        num_heads: heads H; a head is `width // num_heads` wide.
        hidden: width of the feed-forward layer.
        activation: of the feed-forward layer: "gelu" (exact, erf form), "relu", or "swiglu", `down(silu(gate(x)) * up(x))` (Shazeer,
            2020, arXiv:2002.05202), which has three matrices: two thirds of the `hidden` give it the size of the others.
        normalize: L2-normalise the pooled query and key per head; of additive attention alone.
        pool_residual: add the pooled key to the output, beside its product with the value; of additive attention alone.
        recency_bias: add `rate_h * position` to the attention's logits, with one learned rate per head. The common factor cancels in a
            softmax, so this is an exponential decay of older events: linear for additive attention, the bias of ALiBi for softmax.
        dropout: rate on the outputs of attention and feed-forward and on its hidden layer.
        remat: "none" or a policy of `jax.checkpoint_policies` by name, for example "nothing_saveable" or "dots_saveable".
        unroll: unroll the loop over layers. Measured on two cores at width 128, 2 to 24 layers: steps take 19 to 26 % less time, but
            compiling takes as long at 4 layers, 2.6 times as long at 12 and 6 times at 24, for every function of the model, and
            rematerialisation then frees next to no memory. Hence off by default; worth it for up to about 4 layers.
        attention: "additive", the Fastformer's, linear in the number of tokens and with a state of constant size; or "softmax", quadratic
            and with a state that holds every token.
        pre_norm: normalise the inputs of attention and feed-forward; off normalises the sums after them (Vaswani et al., 2017).
        feed_forward: follow attention by a feed-forward layer.
        dtype: of the matrix products. Weights, sums of pools, softmaxes, norms and the residual stream stay in float32.
    """

    num_layers: Count
    width: Count
    num_heads: Count
    hidden: Count
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    normalize: bool = True
    pool_residual: bool = False
    recency_bias: bool = False
    dropout: Share = 0.0
    remat: str = NO_REMATERIALISATION
    unroll: bool = False
    attention: Literal["additive", "softmax"] = "additive"
    pre_norm: bool = True
    feed_forward: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"

    def conflicts(self) -> Iterator[str]:
        if self.width % self.num_heads:
            yield f"width {self.width} is no multiple of num_heads {self.num_heads}"
        if self.remat != NO_REMATERIALISATION and not hasattr(jax.checkpoint_policies, self.remat):
            yield f"remat {self.remat!r} is neither {NO_REMATERIALISATION!r} nor a jax.checkpoint_policies"


class EncoderState(NamedTuple):
    """A context: what its attention remembers of it (leaves lead with layers and users, [L, B]), and the number of its tokens [B]."""

    memory: Any
    length_B: Array


class Places(NamedTuple):
    """Where context tokens stand, [B, T] each.

    Attributes:
        mask: True on tokens that others attend to.
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


class Attention(Protocol):
    """How tokens of a layer attend. `memory` and `seen` are the attention's own; outputs are as wide as inputs."""

    def start(self, shape: tuple[int, ...]) -> Any:
        """The memory of empty contexts; `shape` are its leading dimensions."""

    def context(self, x_BTD: Array, places: Places) -> tuple[Array, Any]:
        """Tokens attend to the tokens of their context up to themselves. Returns the outputs and what each token has seen."""

    def targets(self, x_BTD: Array, places: Places, seen: Any) -> Array:
        """Target t attends to what context token t has seen, and to itself."""

    def extend(self, x_BTD: Array, places: Places, memory: Any) -> tuple[Array, Any]:
        """Tokens attend to the memory and the tokens up to themselves; positions go on from the memory's. Returns the memory after them."""

    def isolated(self, x_BCD: Array, position_BC: Array, memory: Any) -> Array:
        """Each candidate attends to the memory and to itself."""


MakeAttention = Callable[[nnx.Rngs], Attention]


def layer_norm(width: int, rngs: nnx.Rngs, eps: float = 1e-6) -> LayerNorm:
    """LayerNorm with the two-pass variance: the fast one loses all digits where the mean is large."""
    return LayerNorm(width, epsilon=eps, rngs=rngs)


def split_heads(x: Array, heads: int) -> Array:
    """[..., D] to [..., H, E]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def initial_recency_rates(heads: int) -> Array:
    """One time scale a head to begin with, from the last few events to about a hundred."""
    return jnp.geomspace(0.5, 0.01, heads) if heads > 1 else jnp.full((1,), 0.1)


class FeedForward(nnx.Module):
    """Two dense layers with an activation between them; SwiGLU has a gate beside the first."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        width, hidden, dtype = config.width, config.hidden, jnp.dtype(config.dtype)
        self.activation = config.activation
        self.up = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.gate = Linear(width, hidden, dtype=dtype, rngs=rngs) if config.activation == "swiglu" else None
        self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x: Array, rngs: nnx.Rngs | None) -> Array:
        hidden = self.up(x)
        hidden = ACTIVATIONS[self.activation](hidden) if self.gate is None else jax.nn.silu(self.gate(x)) * hidden
        return self.down(self.dropout(hidden, deterministic=rngs is None, rngs=rngs))


class Block(nnx.Module):
    """Residual block: attention, then feed-forward, each with a LayerNorm before it or after the sum."""

    def __init__(self, config: EncoderConfig, attention: MakeAttention, *, rngs: nnx.Rngs) -> None:
        self.pre_norm = config.pre_norm
        self.norm1 = layer_norm(config.width, rngs)
        self.attention = attention(rngs)
        self.norm2 = layer_norm(config.width, rngs) if config.feed_forward else None
        self.ffn = FeedForward(config, rngs=rngs) if config.feed_forward else None
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self, x: Array, attend: Callable[[Array], tuple[Array, Any]], rngs: nnx.Rngs | None
    ) -> tuple[Array, Any]:
        """`attend` is a mode of this block's attention: inputs [..., D] to outputs [..., D] and anything else, which is passed on."""
        attended, rest = attend(self.norm1(x) if self.pre_norm else x)
        x = self._sum(x, attended, self.norm1, rngs)
        if self.ffn is not None and self.norm2 is not None:
            x = self._sum(x, self.ffn(self.norm2(x) if self.pre_norm else x, rngs), self.norm2, rngs)
        return x, rest

    def _sum(self, x: Array, change: Array, norm: LayerNorm, rngs: nnx.Rngs | None) -> Array:
        x = x + self.dropout(change, deterministic=rngs is None, rngs=rngs)
        return x if self.pre_norm else norm(x)


class Encoder(nnx.Module):
    """A stack of blocks and, where they are pre-norm, a final LayerNorm.

    The blocks' parameters are stacked on a leading axis L and applied by `jax.lax.scan`, so that compile time does not grow with depth
    and rematerialisation really frees memory. All methods but `isolated` take an optional dropout key; without one they are deterministic.

    Args:
        config: shape and options.
        attention: makes one layer's attention.
    """

    def __init__(self, config: EncoderConfig, attention: MakeAttention, *, rngs: nnx.Rngs) -> None:
        self.config = config

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(config, attention, rngs=rngs)

        self.blocks = stacked(rngs)
        self.final_norm = layer_norm(config.width, rngs) if config.pre_norm else None

    def start(self, batch_size: int) -> EncoderState:
        """The state of an empty context for `batch_size` users."""
        memory = self.blocks.attention.start((self.config.num_layers, batch_size))
        return EncoderState(memory, jnp.zeros((batch_size,), jnp.int32))

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

        def layer(block: Block, x_BTD: Array, memory: Any, rngs: nnx.Rngs | None) -> tuple[Array, Any]:
            return block(x_BTD, lambda y: block.attention.extend(y, places, memory), rngs)

        x_BTD, memory = self._scan(layer, x_BTD, state.memory, key)
        return self._final(x_BTD), EncoderState(memory, state.length_B + mask_BT.sum(1, dtype=jnp.int32))

    def context(self, x_BTD: Array, places: Places, key: Array | None = None) -> Array:
        """The outputs [B, T, D] of context tokens, each a function of the tokens of its own context up to it."""

        def layer(block: Block, x_BTD: Array, _: None, rngs: nnx.Rngs | None) -> tuple[Array, None]:
            return block(x_BTD, lambda y: block.attention.context(y, places), rngs)[0], None

        return self._final(self._scan(layer, x_BTD, None, key)[0])

    def isolated(self, state: EncoderState, x_BCD: Array) -> Array:
        """Score-side encoding: each candidate sees the context of `state` and itself. Returns [B, C, D]."""
        position_BC = jnp.broadcast_to(state.length_B[:, None], x_BCD.shape[:2])

        def layer(block: Block, x_BCD: Array, memory: Any, rngs: nnx.Rngs | None) -> tuple[Array, None]:
            return block(x_BCD, lambda y: (block.attention.isolated(y, position_BC, memory), None), rngs)

        return self._final(self._scan(layer, x_BCD, state.memory, None)[0])

    def isolated_after(self, x_BTD: Array, mask_BT: Array, x_BCD: Array) -> Array:
        """`isolated` with the state of these context tokens, in one pass over the layers: what it costs to read weights is paid once.

        Args:
            x_BTD: context tokens; the first is the user's. mask_BT: True on real ones; padding stands at the end.
            x_BCD: candidates.
        """
        places = places_of(mask_BT)
        position_BC = jnp.broadcast_to(mask_BT.sum(1, dtype=jnp.int32)[:, None], x_BCD.shape[:2])

        def layer(
            block: Block, tokens: tuple[Array, Array], start: Any, rngs: nnx.Rngs | None
        ) -> tuple[tuple[Array, Array], None]:
            context_BTD, memory = block(tokens[0], lambda y: block.attention.extend(y, places, start), rngs)
            target_BCD, _ = block(tokens[1], lambda y: (block.attention.isolated(y, position_BC, memory), None), rngs)
            return (context_BTD, target_BCD), None

        (_, target_BCD), _ = self._scan(layer, (x_BTD, x_BCD), self.start(len(x_BTD)).memory, None)
        return self._final(target_BCD)

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
            block: Block, tokens: tuple[Array, Array], _: None, rngs: nnx.Rngs | None
        ) -> tuple[tuple[Array, Array], None]:
            context_BTD, seen = block(tokens[0], lambda y: block.attention.context(y, places), rngs)
            target_BTD, _ = block(tokens[1], lambda y: (block.attention.targets(y, places, seen), None), rngs)
            return (context_BTD, target_BTD), None

        (_, target_BTD), _ = self._scan(layer, (x_BTD, target_BTD), None, key)
        return self._final(target_BTD)

    def _final(self, x: Array) -> Array:
        return x if self.final_norm is None else self.final_norm(x)

    def _scan(self, layer: Callable, carry: Array | tuple, per_layer: Any, key: Array | None) -> tuple:
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
