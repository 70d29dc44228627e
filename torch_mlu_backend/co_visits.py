"""Co-visits, and the order of candidates that they have a part in, as `tenrec_jax.co_visits` and `tenrec_jax.order` have them."""

import json
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torch_mlu_backend import safetensors_file
from torch_mlu_backend.errors import UserError

HISTORY, FLOOR = 128, 1e-3


class CoVisits(NamedTuple):
    """What stands near each item, on the CPU: `item_NK`, the K items that belong to it most, int32 [N + 1, K], 0 where there are fewer,
    `weight_NK`, how much, float32, and `clicks_N`, training clicks of each item."""

    item_NK: Tensor
    weight_NK: Tensor
    clicks_N: Tensor

    @classmethod
    def load(cls, path: Path) -> "CoVisits":
        """Read an exported file.

        Raises:
            UserError: it holds something else.
        """
        arrays = safetensors_file.read_named(path, ["item", "weight", "clicks"])
        found = cls(arrays["item"], arrays["weight"], arrays["clicks"])
        if found.item_NK.shape != found.weight_NK.shape or found.item_NK.shape[:1] != found.clicks_N.shape:
            raise UserError(f"{path} cannot be read as co-visits: item, weight and clicks do not fit. Export again.")
        return found

    def scores(self, item_S: Tensor, clicked_S: Tensor, item_C: Tensor, decay: float) -> Tensor:
        """The sum over a user's latest clicked events of `decay^age * weight` of each candidate, [C].

        Args:
            item_S, clicked_S: dense ids of the user's events, oldest first, and whether they were clicked, bool.
            item_C: dense ids of the candidates, distinct.
        """
        item_S, clicked_S = item_S[-HISTORY:], clicked_S[-HISTORY:]
        age_S = torch.arange(len(item_S) - 1, -1, -1)[clicked_S]
        near_SK, weight_SK = (
            self.item_NK[item_S[clicked_S]],
            self.weight_NK[item_S[clicked_S]] * (decay**age_S)[:, None],
        )
        sorted_C, order_C = item_C.sort()
        place_SK = torch.searchsorted(sorted_C, near_SK.long()).clamp(max=max(len(item_C) - 1, 0))
        sums_C = torch.zeros(len(item_C))
        if len(item_C):
            found_SK = sorted_C[place_SK] == near_SK
            sums_C.index_add_(0, order_C[place_SK[found_SK]], weight_SK[found_SK])
        return sums_C


@dataclass(frozen=True)
class Order:
    """The powers of retrieval's odds, of the co-visits and of the items' clicks, and how much each event leaves of what those before it say
    by co-visits."""

    retrieval: float = 1.0
    co_visits: float = 0.0
    popularity: float = 0.0
    decay: float = 0.8

    @classmethod
    def load(cls, path: Path) -> "Order":
        """Read an exported file.

        Raises:
            UserError: it holds something else.
        """
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
            if not all(isfinite(value) and value >= 0 for value in asdict(found).values()) or found.decay > 1:
                raise ValueError("a power is negative or not finite, or the decay is not between 0 and 1")
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path} cannot be read ({error}). Export again.") from error
        return found

    def fused(
        self, retrieval_C: Tensor, worth_C: Tensor | None, co_visits_C: Tensor, clicks_C: Tensor, weight: float
    ) -> Tensor:
        """What orders the candidates [C]: a product with a ranker, a logarithm without; see `tenrec_jax.order.fused`."""
        log_odds_C = self.retrieval * retrieval_C + self.co_visits * torch.log1p(co_visits_C / FLOOR)
        log_odds_C = log_odds_C + self.popularity * torch.log1p(clicks_C.float())
        if worth_C is None:
            return log_odds_C
        best = log_odds_C.max() if len(log_odds_C) else 0.0
        return worth_C * torch.exp(weight * (log_odds_C - best))
