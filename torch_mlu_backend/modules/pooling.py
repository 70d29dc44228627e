"""Softmax pools that merge, as in `tenrec_jax.models.pooling`.

A pool over a set of tokens is `sum_i exp(logit_i) value_i / sum_i exp(logit_i)`, kept as three sums,

    maximum = max_i logit_i,   denominator = sum_i exp(logit_i - maximum),   numerator = sum_i exp(logit_i - maximum) value_i,

so that pools over disjoint sets merge exactly (Milakov and Gimelshein, 2018, arXiv:1805.02867). The maximum carries no gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Logit of a token that must not count. Finite, so that the difference of two of them is not NaN.
MASKED = -1e30
# Tokens that one masked product covers; shorter rows are padded to it, so that no shape decides what is computed.
CHUNK = 16


class Pool(NamedTuple):
    """Sums of one softmax pool, or a batch of them, per head: maximum [..., H], denominator [..., H], numerator [..., H, E]."""

    maximum: Tensor
    denominator: Tensor
    numerator: Tensor

    def mean(self) -> Tensor:
        """The pooled value [..., H, E]. NaN for a pool into which no unmasked token went."""
        return self.numerator / self.denominator[..., None]


def empty_pool(shape: tuple[int, ...], heads: int, width: int, device: torch.device) -> Pool:
    """Pools over no token, the neutral element of `merge`; `shape` are the leading dimensions."""
    return Pool(
        torch.full((*shape, heads), MASKED, device=device),
        torch.zeros((*shape, heads), device=device),
        torch.zeros((*shape, heads, width), device=device),
    )


def token_pool(logit: Tensor, value: Tensor) -> Pool:
    """The pool over a single token. Args: logit [..., H], value [..., H, E]."""
    maximum = logit.detach()
    weight = (logit - maximum).exp()  # 1, but it carries the logit's gradient
    return Pool(maximum, weight, weight[..., None] * value)


def merge(left: Pool, right: Pool) -> Pool:
    """The pool over the union of two disjoint sets of tokens; leading dimensions broadcast."""
    maximum = torch.maximum(left.maximum, right.maximum)
    scale_left, scale_right = (left.maximum - maximum).exp(), (right.maximum - maximum).exp()
    return Pool(
        maximum,
        left.denominator * scale_left + right.denominator * scale_right,
        left.numerator * scale_left[..., None] + right.numerator * scale_right[..., None],
    )


def prefix_pools(logit_BTH: Tensor, value_BTHE: Tensor, start: Pool, segment_BT: Tensor) -> Pool:
    """Pools over every prefix: entry t covers the tokens 0..t of t's own segment, and `start` in the first segment.

    Inside chunks one masked product pools the tokens, all chunks at once; another one pools the chunks that came before. No loop over
    time: the operators are the same whatever the length, and their cost is linear in it but for (T / 16)^2 weights.

    Args:
        logit_BTH: pooling logits, `MASKED` where a token must not count.
        value_BTHE: values.
        start: pool [B, H] of what came before.
        segment_BT: ascending numbers of stretches that must not see each other.

    Returns:
        Pools with leading dimensions [B, T].
    """
    batch, length = logit_BTH.shape[:2]
    padding = -length % CHUNK
    logit_BTH = functional.pad(logit_BTH, (0, 0, 0, padding), value=MASKED)
    value_BTHE = functional.pad(value_BTHE, (0, 0, 0, 0, 0, padding))
    segment_BNC = torch.cat([segment_BT, segment_BT[:, -1:].expand(-1, padding)], dim=1).reshape(batch, -1, CHUNK)

    def chunked(x: Tensor) -> Tensor:
        return x.reshape(batch, -1, CHUNK, *x.shape[2:])

    within = _prefixes(token_pool(chunked(logit_BTH), chunked(value_BTHE)), segment_BNC)
    # What comes before a chunk ends with the token before it: the last one of the chunk before, of `start` for the first chunk.
    before_BN = torch.cat([segment_BT[:, :1], segment_BNC[:, :-1, -1]], dim=1)
    earlier = Pool(*(torch.cat([first[:, None], x[:, :-1, -1]], dim=1) for first, x in zip(start, within, strict=True)))
    carried = Pool(*(x[:, :, None] for x in _prefixes(earlier, before_BN)))
    pools = merge(_where(segment_BNC == before_BN[..., None], carried), within)
    return Pool(*(x.reshape(batch, -1, *x.shape[3:])[:, :length] for x in pools))


def _prefixes(pools: Pool, segment_bS: Tensor) -> Pool:
    """Unions of the pools 0..s of s's own segment, for every s; the pools' leading dimensions are those of `segment_bS`."""
    size = segment_bS.shape[-1]
    slot_S = torch.arange(size, device=segment_bS.device)
    seen_bSS = (slot_S[:, None] >= slot_S) & (segment_bS[..., :, None] == segment_bS[..., None, :])
    maximum_bHSS = pools.maximum.transpose(-1, -2)[..., None, :]
    # Masked before exp: a later maximum may be so much larger that its exponential is infinite.
    maximum_bHSS = torch.where(seen_bSS[..., None, :, :], maximum_bHSS, -torch.inf)
    maximum_bHS = maximum_bHSS.amax(-1)
    scale_bHSS = (maximum_bHSS - maximum_bHS[..., None]).exp()
    denominator_bHS = (scale_bHSS @ pools.denominator.transpose(-1, -2)[..., None])[..., 0]
    numerator_bHSE = scale_bHSS @ pools.numerator.transpose(-2, -3)
    return Pool(maximum_bHS.transpose(-1, -2), denominator_bHS.transpose(-1, -2), numerator_bHSE.transpose(-2, -3))


def _where(condition: Tensor, pool: Pool) -> Pool:
    """The pool where `condition` holds, the empty pool elsewhere; `condition` has the leading dimensions."""
    return Pool(
        torch.where(condition[..., None], pool.maximum, MASKED),
        torch.where(condition[..., None], pool.denominator, 0.0),
        torch.where(condition[..., None, None], pool.numerator, 0.0),
    )
