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

HISTORY, FLOOR, SUBJECT_PRIOR = 128, 1e-3, 10.0


class CoVisits(NamedTuple):
    """What stands near each item, on the CPU: `item_NK`, the K items that belong to it most, int32 [N + 1, K], 0 where there are fewer,
    `weight_NK`, how much, float32, `clicks_N`, training clicks of each item, `subject_N`, its subject, 0 for none, and `share_K`, that of
    each subject in all rows."""

    item_NK: Tensor
    weight_NK: Tensor
    clicks_N: Tensor
    subject_N: Tensor
    share_K: Tensor

    @classmethod
    def load(cls, path: Path) -> "CoVisits":
        """Read an exported file.

        Raises:
            UserError: it holds something else.
        """
        names = ["item", "weight", "clicks", "subject", "share"]
        arrays = safetensors_file.read_named(path, names)
        found = cls(*(arrays[name] for name in names))
        items = found.item_NK.shape[:1]
        if found.item_NK.shape != found.weight_NK.shape or not items == found.clicks_N.shape == found.subject_N.shape:
            raise UserError(
                f"{path} cannot be read as co-visits: item, weight, clicks and subject do not fit. Export again."
            )
        if not 0 <= int(found.subject_N.min()) <= int(found.subject_N.max()) < len(found.share_K):
            raise UserError(f"{path} cannot be read as co-visits: an item's subject has no share. Export again.")
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

    def subjects(self, item_S: Tensor, item_C: Tensor) -> Tensor:
        """How many times as much of a candidate's subject the user's latest events have as all have, [C]; see `tenrec_jax.co_visits`."""
        count_K = torch.bincount(self.subject_N[item_S[-HISTORY:]], minlength=len(self.share_K))
        expected_K = (count_K[1:].sum() + SUBJECT_PRIOR) * self.share_K
        more_K = torch.where(self.share_K > 0, (count_K + SUBJECT_PRIOR * self.share_K) / expected_K, 1.0)
        return more_K[self.subject_N[item_C]]


@dataclass(frozen=True)
class Order:
    """The powers of retrieval's odds, of the co-visits, of the items' clicks and of their subjects, and how much each event leaves of what
    those before it say by co-visits."""

    retrieval: float = 1.0
    co_visits: float = 0.0
    popularity: float = 0.0
    subjects: float = 0.0
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
        self,
        retrieval_C: Tensor,
        worth_C: Tensor | None,
        co_visits_C: Tensor,
        clicks_C: Tensor,
        subjects_C: Tensor,
        weight: float,
    ) -> Tensor:
        """What orders the candidates [C]: a product with a ranker, a logarithm without; see `tenrec_jax.order.fused`."""
        log_odds_C = self.retrieval * retrieval_C + self.co_visits * torch.log1p(co_visits_C / FLOOR)
        log_odds_C = (
            log_odds_C + self.popularity * torch.log1p(clicks_C.float()) + self.subjects * torch.log(subjects_C)
        )
        if worth_C is None:
            return log_odds_C
        best = log_odds_C.max() if len(log_odds_C) else 0.0
        return worth_C * torch.exp(weight * (log_odds_C - best))
