"""Running means: pools of several heads, each over the tokens that count for it, which all weigh the same."""

import torch
from torch import Tensor

from torch_mlu_backend.modules.pooling import MASKED, Pool, empty_pool, prefix_pools
from torch_mlu_backend.modules.slots import Slots


def extended(start: Pool, x_BTHE: Tensor, counts_BTH: Tensor) -> Pool:
    """The pools [B, H] after further tokens."""
    segment_BT = torch.zeros(x_BTHE.shape[:2], dtype=torch.int64, device=x_BTHE.device)
    return Pool(*(x[:, -1] for x in prefix_pools(_logit(counts_BTH), x_BTHE, start, segment_BT)))


def means(pools: Pool) -> Tensor:
    """The means of all heads side by side, [..., H * E]; zeros where no token counts."""
    exists = (pools.maximum > MASKED)[..., None]
    mean = torch.where(exists, pools.numerator / torch.where(exists, pools.denominator[..., None], 1.0), 0.0)
    return mean.reshape(*mean.shape[:-2], -1)


def means_before(x_BTHE: Tensor, counts_BTH: Tensor, slots: Slots) -> Tensor:
    """`means` over the tokens before each in its own timeline, [B, T, H * E]."""
    batch, _, heads, width = x_BTHE.shape
    start = empty_pool((batch,), heads, width, x_BTHE.device)
    pools = prefix_pools(_logit(counts_BTH), x_BTHE, start, slots.segment)
    # Entry t covers t itself: what is before a token is known at the one before it.
    return torch.where(slots.first[..., None], 0.0, means(pools).roll(1, dims=1))


def _logit(counts: Tensor) -> Tensor:
    return torch.where(counts, 0.0, MASKED)
