"""Softmax attention (Vaswani et al., 2017, arXiv:1706.03762), as in `tenrec_jax.models.softmax_attention`.

Its memory is a cache of keys and values for a fixed number of tokens, its capacity; a context that outgrows it gives NaN from there on.
Plain products and a softmax: the fused `scaled_dot_product_attention` is not dependable on MLU.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_mlu_backend.config import EncoderConfig
from torch_mlu_backend.modules.blocks import Encoder, Places, split_heads

# Finite, so that a token that sees nothing (padding before the first event) gets a number.
_UNSEEN = -1e30


class Tokens(NamedTuple):
    """Tokens as they are attended to, [B, S, H, E] each."""

    key: Tensor
    value: Tensor


class SoftmaxAttention(nn.Module):
    """Per head, `out_i = W_o sum_j softmax_j(Q_i K_j / sqrt(E) + rate_h * position_j) V_j` over the tokens j that i sees.

    Args:
        config: shape and options.
        capacity: tokens that a memory can hold.
    """

    def __init__(self, config: EncoderConfig, capacity: int) -> None:
        super().__init__()
        width, heads = config.width, config.num_heads
        self.width, self.heads, self.capacity, self.recency_bias = width, heads, capacity, config.recency_bias
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        if config.recency_bias:
            self.recency_rate = nn.Parameter(torch.zeros(heads))

    def start(self, shape: tuple[int, ...], device: torch.device) -> Tokens:
        """See `blocks.Attention`, here and below."""
        empty = torch.zeros((*shape, self.capacity, self.heads, self.width // self.heads), device=device)
        return Tokens(empty, empty)

    def context(self, x_BTD: Tensor, places: Places) -> tuple[Tensor, Tokens]:
        """What tokens have seen is told by their places; `seen` holds all of them."""
        tokens = self._tokens(x_BTD)
        return self._attend(x_BTD, tokens, places.position, _earlier(places)), tokens

    def targets(self, x_BTD: Tensor, places: Places, seen: Tokens) -> Tensor:
        return self._attend_with_self(x_BTD, places.position + 1, seen, places.position, _earlier(places))

    def extend(self, x_BTD: Tensor, places: Places, memory: Tokens) -> tuple[Tensor, Tokens]:
        # Padding, and what does not fit, goes to a slot that is cut off again.
        slot_BT = torch.where(places.mask, places.position, self.capacity).clamp(max=self.capacity)
        memory = Tokens(*(_placed(*pair, slot_BT) for pair in zip(memory, self._tokens(x_BTD), strict=True)))
        slot_1S = torch.arange(self.capacity, device=x_BTD.device)[None]
        output_BTD = self._attend(x_BTD, memory, slot_1S, slot_1S <= places.position[..., None])
        return self._unless_full(output_BTD, places.position + 1), memory

    def isolated(self, x_BCD: Tensor, position_BC: Tensor, memory: Tokens) -> Tensor:
        slot_1S = torch.arange(self.capacity, device=x_BCD.device)[None]
        seen_BCS = slot_1S < position_BC[..., None]
        output_BCD = self._attend_with_self(x_BCD, position_BC, memory, slot_1S, seen_BCS)
        return self._unless_full(output_BCD, position_BC)

    def _tokens(self, x: Tensor) -> Tokens:
        return Tokens(split_heads(self.key(x), self.heads), split_heads(self.value(x), self.heads))

    def _attend(self, x_BTD: Tensor, tokens: Tokens, position_BS: Tensor, seen_BTS: Tensor) -> Tensor:
        """`position_BS` is of the tokens; it broadcasts over users."""
        query_BHTE = split_heads(self.query(x_BTD), self.heads).transpose(1, 2)
        key_BHSE, value_BHSE = (x.transpose(1, 2).to(query_BHTE.dtype) for x in tokens)
        logit_BHTS = (query_BHTE @ key_BHSE.transpose(-1, -2)).float() * query_BHTE.shape[-1] ** -0.5
        if self.recency_bias:
            logit_BHTS = logit_BHTS + (self.recency_rate * position_BS[..., None]).transpose(1, 2)[:, :, None]
        weight_BHTS = logit_BHTS.masked_fill(~seen_BTS[:, None], _UNSEEN).softmax(-1)
        attended_BTHE = (weight_BHTS.to(value_BHSE.dtype) @ value_BHSE).transpose(1, 2)
        return self.out_proj(attended_BTHE.reshape(x_BTD.shape))

    def _attend_with_self(
        self, x_BTD: Tensor, position_BT: Tensor, tokens: Tokens, position_BS: Tensor, seen_BTS: Tensor
    ) -> Tensor:
        """Each of `x_BTD` sees the tokens that it sees, and itself."""
        both = Tokens(*(torch.cat([a.to(b.dtype), b], dim=1) for a, b in zip(tokens, self._tokens(x_BTD), strict=True)))
        batch, length = x_BTD.shape[:2]
        slot_T = torch.arange(length, device=x_BTD.device)
        itself_BTT = (slot_T[:, None] == slot_T).expand(batch, length, length)
        position_BS = torch.cat([position_BS.expand(batch, -1), position_BT], dim=1)
        return self._attend(x_BTD, both, position_BS, torch.cat([seen_BTS, itself_BTT], dim=2))

    def _unless_full(self, output_BTD: Tensor, length_BT: Tensor) -> Tensor:
        return torch.where((length_BT <= self.capacity)[..., None], output_BTD, torch.nan)


def _placed(old_BSHE: Tensor, new_BTHE: Tensor, slot_BT: Tensor) -> Tensor:
    """`old` with the new tokens in their slots; slot S, one beyond the last, is dropped."""
    roomy = torch.cat([old_BSHE, torch.zeros_like(old_BSHE[:, :1])], dim=1)
    index_BTHE = slot_BT[..., None, None].expand(new_BTHE.shape)
    return roomy.scatter(1, index_BTHE, new_BTHE.to(roomy.dtype))[:, :-1]


def _earlier(places: Places) -> Tensor:
    """Which tokens each token sees: the real ones of its own context up to itself, [B, T, T]."""
    slot_T = torch.arange(places.mask.shape[1], device=places.mask.device)
    same_BTT = places.segment[..., None] == places.segment[:, None]
    return (slot_T[:, None] >= slot_T) & places.mask[:, None] & same_BTT


class SoftmaxEncoder(Encoder):
    """An encoder with softmax attention, whose states hold `capacity` tokens."""

    def __init__(self, config: EncoderConfig, capacity: int) -> None:
        super().__init__(config, lambda: SoftmaxAttention(config, capacity))
