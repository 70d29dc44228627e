"""Fastformer: additive attention, linear in the number of tokens (Wu et al., 2021, arXiv:2108.09084).

Per head, tokens give pooling logits `a_i, b_i` and projections `Q_i, K_i, V_i`. With `pool_P` the softmax pool over a set P of tokens,

    q = pool_P(a, Q),   p = pool_P(b, K),   k = q * p,   out_i = W_o(V_i * k + Q_i),

and with `pool_residual` W_o(V_i * k + Q_i + p).

The encoder's modes differ only in the set P. Beside those of `blocks` there is `joint`, in which every token pools over every token.
"""

from typing import cast

import torch
from torch import Tensor, nn

from torch_mlu_backend.config import EncoderConfig
from torch_mlu_backend.modules.blocks import Attend, Encoder, Places, split_heads
from torch_mlu_backend.modules.pooling import MASKED, Pool, empty_pool, merge, prefix_pools, token_pool


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / max(||x||, eps)` over the last axis, with a finite gradient at zero."""
    return x * x.square().sum(-1, keepdim=True).clamp(min=eps * eps).rsqrt()


class AdditiveAttention(nn.Module):
    """Additive attention of the variant "tenrec": own value projection, optional L2 normalisation, `W_o(V * k + Q)`.

    Its memory is a pool of 2H heads, of the queries and of the keys.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, heads = config.width, config.num_heads
        self.width, self.heads, self.normalize, self.recency_bias = width, heads, config.normalize, config.recency_bias
        self.pool_residual = config.pool_residual
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.query_weight = nn.Linear(width, heads)
        self.key_weight = nn.Linear(width, heads)
        self.out_proj = nn.Linear(width, width)
        if config.recency_bias:
            self.recency_rate = nn.Parameter(torch.zeros(heads))

    def joint(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Every token pools over all tokens, with the numerical guards of the original system. Returns [B, T, D]."""
        query_BTHE, key_BTHE, value_BTHE = self._heads(x_BTD)

        def pool(logit_BTH: Tensor, values_BTHE: Tensor) -> Tensor:
            # Weights are at least 1e-9 and not renormalised.
            weight_BTH = logit_BTH.float().masked_fill(~mask_BT[..., None], -1e4).softmax(1).clamp(min=1e-9)
            return (weight_BTH.transpose(1, 2)[:, :, None] @ values_BTHE.transpose(1, 2)).transpose(1, 2)

        query_B1HE, key_B1HE = pool(self.query_weight(x_BTD), query_BTHE), pool(self.key_weight(x_BTD), key_BTHE)
        return self._output(value_BTHE, query_BTHE, query_B1HE, key_B1HE).clamp(-100.0, 100.0)

    def start(self, shape: tuple[int, ...], device: torch.device) -> Pool:
        """See `blocks.Attention`, here and below."""
        return empty_pool(shape, 2 * self.heads, self.width // self.heads, device)

    def context(self, x_BTD: Tensor, places: Places) -> tuple[Tensor, Pool]:
        """What a token has seen is the pool of its prefix; the pools lead with [B, T]."""
        return self._over_prefixes(x_BTD, places, self.start((x_BTD.shape[0],), x_BTD.device))

    def targets(self, x_BTD: Tensor, places: Places, seen: Pool) -> Tensor:
        return self._over_pool_and_self(x_BTD, places.position + 1, seen)

    def extend(self, x_BTD: Tensor, places: Places, memory: Pool) -> tuple[Tensor, Pool]:
        output_BTD, prefixes = self._over_prefixes(x_BTD, places, memory)
        return output_BTD, Pool(*(leaf[:, -1] for leaf in prefixes))

    def isolated(self, x_BCD: Tensor, position_BC: Tensor, memory: Pool) -> Tensor:
        return self._over_pool_and_self(x_BCD, position_BC, Pool(*(leaf[:, None] for leaf in memory)))

    def _over_prefixes(self, x_BTD: Tensor, places: Places, start: Pool) -> tuple[Tensor, Pool]:
        query_BTHE, key_BTHE, value_BTHE = self._heads(x_BTD)
        logit_BTG = torch.where(places.mask[..., None], self._logits(x_BTD, places.position), MASKED)
        pools = prefix_pools(logit_BTG, _pooled(query_BTHE, key_BTHE), start, places.segment)
        return self._over(pools, value_BTHE, query_BTHE), pools

    def _over_pool_and_self(self, x: Tensor, position: Tensor, pool: Pool) -> Tensor:
        query, key, value = self._heads(x)
        own = token_pool(self._logits(x, position), _pooled(query, key))
        return self._over(merge(pool, own), value, query)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [..., H, E] each."""
        return (
            split_heads(self.query(x), self.heads),
            split_heads(self.key(x), self.heads),
            split_heads(self.value(x), self.heads),
        )

    def _logits(self, x: Tensor, position: Tensor) -> Tensor:
        """Pooling logits [..., 2H], float32: of the queries' pools, then of the keys'."""
        logit = torch.cat([self.query_weight(x), self.key_weight(x)], dim=-1).float()
        return logit + position[..., None] * self.recency_rate.repeat(2) if self.recency_bias else logit

    def _normalized(self, x: Tensor) -> Tensor:
        return l2_normalize(x) if self.normalize else x

    def _over(self, pools: Pool, value: Tensor, query: Tensor) -> Tensor:
        return self._output(value, query, *pools.mean().chunk(2, dim=-2))

    def _output(self, value: Tensor, query: Tensor, pooled_query: Tensor, pooled_key: Tensor) -> Tensor:
        mixed = value * self._normalized(self._normalized(pooled_query) * pooled_key) + query
        if self.pool_residual:
            mixed = mixed + pooled_key
        return self.out_proj(mixed.reshape(*mixed.shape[:-2], -1))


def _pooled(query: Tensor, key: Tensor) -> Tensor:
    """What the pools sum, in float32: queries and, after them, keys [..., 2H, E]."""
    return torch.cat([query, key], dim=-2).float()


class PaperAttention(nn.Module):
    """Additive attention as published, the variant "paper": value = query, key logits from `q * K`, residual after the projection.

    Its key logits depend on the pooled query, so its pools do not merge and it has the joint mode alone.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.heads = num_heads
        self.query = nn.Linear(width, width)
        self.query_att = nn.Linear(width, num_heads)
        self.key = nn.Linear(width, width)
        self.key_att = nn.Linear(width, num_heads)
        self.transform = nn.Linear(width, width)

    def joint(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Wu et al. (2021), equations 1-6. Masked logits get -10000 added. Returns [B, T, D]."""
        scale = (x_BTD.shape[-1] // self.heads) ** -0.5
        bias_BT1 = (~mask_BT[..., None]).float() * -10000.0

        def pool(logit_BTH: Tensor, value_BTHE: Tensor) -> Tensor:
            weight_BTH = (logit_BTH.float() * scale + bias_BT1).softmax(1)
            return (weight_BTH.transpose(1, 2)[:, :, None] @ value_BTHE.transpose(1, 2)).transpose(1, 2)

        query_BTD, key_BTD = self.query(x_BTD), self.key(x_BTD)
        query_B1HE = pool(self.query_att(query_BTD), split_heads(query_BTD, self.heads))
        mixed_BTHE = split_heads(key_BTD, self.heads) * query_B1HE
        key_B1HE = pool(self.key_att(mixed_BTHE.reshape(x_BTD.shape)), mixed_BTHE)
        weighted_BTHE = key_B1HE * split_heads(query_BTD, self.heads)
        return self.transform(weighted_BTHE.reshape(x_BTD.shape)) + query_BTD


class FastformerEncoder(Encoder):
    """An encoder with additive attention."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config, lambda: AdditiveAttention(config))

    def joint(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """All tokens see all tokens. `mask_BT` is True on real tokens. Returns [B, T, D]."""
        for block in self.blocks:
            x_BTD, _ = block(x_BTD, _joint(block, mask_BT))
        return self._final(x_BTD)


def _joint(block: nn.Module, mask_BT: Tensor) -> Attend:
    return lambda y: (cast(AdditiveAttention, block.attention).joint(y, mask_BT), None)
