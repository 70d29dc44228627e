"""Residual blocks and their stack, as in `tenrec_jax.models.blocks`: an encoder of timelines, whatever its attention.

The modes differ only in the set of tokens that a token attends to:

    context    an event: the events up to and including itself;
    isolated   a candidate: the whole context and itself, blind to the other candidates;
    timeline   a target at t: the context before t and itself; `isolated` at every t, in one pass.

A block is one entry of `blocks`, so that a hook on it sees the layer's output in every mode.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_mlu_backend.config import EncoderConfig
from torch_mlu_backend.modules.slots import Slots

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": functional.gelu, "relu": functional.relu}
LAYER_NORM_EPS = 1e-6
GELU_FORM = "erf"


class EncoderState(NamedTuple):
    """A context: what its attention remembers of it (leaves [L, B, ...]), and the number of its tokens [B]."""

    memory: Any
    length_B: Tensor


class Places(NamedTuple):
    """Where context tokens stand, [B, T] each: whether others attend to them, in which context, and the position in it."""

    mask: Tensor
    segment: Tensor
    position: Tensor


def places_of(mask_BT: Tensor, slots: Slots | None = None) -> Places:
    """The places of context tokens; `slots` says which context each belongs to, None that a row is one context."""
    count_BT = mask_BT.long().cumsum(1)
    if slots is None:
        return Places(mask_BT, torch.zeros_like(count_BT), count_BT - 1)
    begin_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) - slots.place
    before_BT = (count_BT - mask_BT.long()).gather(1, begin_BT)
    return Places(mask_BT, slots.segment, count_BT - before_BT - 1)


class Attention(Protocol):
    """How tokens of a layer attend. `memory` and `seen` are the attention's own; outputs are as wide as inputs."""

    def start(self, shape: tuple[int, ...], device: torch.device) -> Any:
        """The memory of empty contexts; `shape` are its leading dimensions."""

    def context(self, x_BTD: Tensor, places: Places) -> tuple[Tensor, Any]:
        """Tokens attend to the tokens of their context up to themselves. Returns the outputs and what each token has seen."""

    def targets(self, x_BTD: Tensor, places: Places, seen: Any) -> Tensor:
        """Target t attends to what context token t has seen, and to itself."""

    def extend(self, x_BTD: Tensor, places: Places, memory: Any) -> tuple[Tensor, Any]:
        """Tokens attend to the memory and the tokens up to themselves. Returns the memory after them."""

    def isolated(self, x_BCD: Tensor, position_BC: Tensor, memory: Any) -> Tensor:
        """Each candidate attends to the memory and to itself."""


def layer_norm(width: int, eps: float = LAYER_NORM_EPS) -> nn.LayerNorm:
    """LayerNorm with Flax's eps, not PyTorch's 1e-5."""
    return nn.LayerNorm(width, eps=eps)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., D] to [..., H, E]."""
    return x.reshape(*x.shape[:-1], heads, -1)


class FeedForward(nn.Module):
    """Two dense layers with an activation between them; SwiGLU has a gate beside the first."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.width, config.hidden)
        self.gate = nn.Linear(config.width, config.hidden) if config.activation == "swiglu" else None
        self.down = nn.Linear(config.hidden, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden = ACTIVATIONS[self.activation](hidden) if self.gate is None else functional.silu(self.gate(x)) * hidden
        return self.down(self.dropout(hidden))


class Block(nn.Module):
    """Residual block: attention, then feed-forward, each with a LayerNorm before it or after the sum."""

    def __init__(self, config: EncoderConfig, attention: nn.Module) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.norm1 = layer_norm(config.width)
        self.attention = attention
        self.norm2 = layer_norm(config.width) if config.feed_forward else None
        self.ffn = FeedForward(config) if config.feed_forward else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Callable[[Tensor], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        """`attend` is a mode of this block's attention: inputs [..., D] to outputs [..., D] and anything else, which is passed on."""
        attended, rest = attend(self.norm1(x) if self.pre_norm else x)
        x = self._sum(x, attended, self.norm1)
        if self.ffn is not None and self.norm2 is not None:
            x = self._sum(x, self.ffn(self.norm2(x) if self.pre_norm else x), self.norm2)
        return x, rest

    def _sum(self, x: Tensor, change: Tensor, norm: nn.LayerNorm) -> Tensor:
        x = x + self.dropout(change)
        return x if self.pre_norm else norm(x)


class Encoder(nn.Module):
    """A stack of blocks and, where they are pre-norm, a final LayerNorm.

    Args:
        config: shape and options.
        attention: makes one layer's attention.
    """

    def __init__(self, config: EncoderConfig, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, attention()) for _ in range(config.num_layers))
        self.final_norm = layer_norm(config.width) if config.pre_norm else None

    def start(self, batch_size: int) -> EncoderState:
        """The state of an empty context for `batch_size` users."""
        device = next(self.parameters()).device
        memory = _attention(self.blocks[0]).start((self.config.num_layers, batch_size), device)
        return EncoderState(memory, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def extend(self, state: EncoderState, x_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, EncoderState]:
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
        memories = []
        for block, memory in zip(self.blocks, _layers(state.memory), strict=True):
            x_BTD, memory = block(x_BTD, _extending(block, places, memory))
            memories.append(memory)
        return self._final(x_BTD), EncoderState(_stacked(memories), state.length_B + mask_BT.long().sum(1))

    def context(self, x_BTD: Tensor, places: Places) -> Tensor:
        """The outputs [B, T, D] of context tokens, each a function of the tokens of its own context up to it."""
        for block in self.blocks:
            x_BTD, _ = block(x_BTD, _reading(block, places))
        return self._final(x_BTD)

    def isolated(self, state: EncoderState, x_BCD: Tensor) -> Tensor:
        """Score-side encoding: each candidate sees the context of `state` and itself. Returns [B, C, D]."""
        position_BC = state.length_B[:, None].expand(x_BCD.shape[:2])
        for block, memory in zip(self.blocks, _layers(state.memory), strict=True):
            x_BCD, _ = block(x_BCD, _isolated(block, position_BC, memory))
        return self._final(x_BCD)

    def timeline(self, x_BTD: Tensor, target_BTD: Tensor, places: Places) -> Tensor:
        """Encode a target at every position of timelines in one pass.

        Args:
            x_BTD: context tokens; the first of a context is the user's, the others are events with their actions.
            target_BTD: target tokens; target t stands for the event after context token t, its actions unknown.
            places: of the context tokens. The first token of a context is real.

        Returns:
            [B, T, D]: entry t equals `isolated` for target t with the tokens of its context up to t.
        """
        for block in self.blocks:
            x_BTD, seen = block(x_BTD, _reading(block, places))
            target_BTD, _ = block(target_BTD, _targeting(block, places, seen))
        return self._final(target_BTD)

    def _final(self, x: Tensor) -> Tensor:
        return x if self.final_norm is None else self.final_norm(x)


Attend = Callable[[Tensor], tuple[Tensor, Any]]


def _attention(block: nn.Module) -> Attention:
    return cast(Attention, block.attention)


def _reading(block: nn.Module, places: Places) -> Attend:
    return lambda y: _attention(block).context(y, places)


def _targeting(block: nn.Module, places: Places, seen: Any) -> Attend:
    return lambda y: (_attention(block).targets(y, places, seen), None)


def _extending(block: nn.Module, places: Places, memory: Any) -> Attend:
    return lambda y: _attention(block).extend(y, places, memory)


def _isolated(block: nn.Module, position_BC: Tensor, memory: Any) -> Attend:
    return lambda y: (_attention(block).isolated(y, position_BC, memory), None)


def _layers(memory: Any) -> list[Any]:
    """The memories of the layers, from leaves that lead with L."""
    return [type(memory)(*leaves) for leaves in zip(*(leaf.unbind() for leaf in memory), strict=True)]


def _stacked(memories: list[Any]) -> Any:
    return type(memories[0])(*(torch.stack(leaves) for leaves in zip(*memories, strict=True)))
