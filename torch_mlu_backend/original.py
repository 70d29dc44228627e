"""Models of the original system: raw ids are hashed into their tables, and given candidates scored.

A table of n + 1 rows holds the hashes 1..n of raw ids, `id * 2654435761 mod n + 1` (the first of the original's hash functions,
`id * (i + 1) * 2654435761`), and in row 0 the padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torch_mlu_backend import artifact, weights
from torch_mlu_backend import device as devices
from torch_mlu_backend.device import Autocast
from torch_mlu_backend.errors import UserError

MULTIPLIER = 2654435761


@dataclass(frozen=True)
class OriginalScores:
    """Of candidates, in the order given: the score, and each action's logit [C, A]. They depend on each other in the ranker."""

    scores: tuple[float, ...]
    logits: tuple[tuple[float, ...], ...]


def hashed(raw_id: int, rows: int) -> int:
    """The row of a table of `rows` rows in which a raw id is looked up. Exact for integers of any size."""
    return raw_id * MULTIPLIER % (rows - 1) + 1


class OriginalScorer:
    """Scores with a ranker or two-tower that `tenrec-jax import-original` read."""

    def __init__(self, model: weights.Model, device: torch.device, autocast: Autocast | None = None) -> None:
        self._description, self._module = model.description, model.module.to(device)
        self._device, self._autocast = device, autocast

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", autocast: Autocast | None = None) -> "OriginalScorer":
        """Load a folder that `tenrec-jax import-original` wrote. Raises: UserError: it is not one, or is damaged."""
        kind = artifact.read_manifest(Path(folder))["kind"]
        if kind not in (artifact.ORIGINAL_RANKER, artifact.ORIGINAL_TWO_TOWER):
            raise UserError(f"{folder} holds a {kind}, not a model of the original system.")
        return cls(weights.load(Path(folder) / artifact.MODEL, kind), devices.resolve(device).device, autocast)

    @torch.no_grad()
    def score(
        self,
        user: int,
        history: Sequence[int],
        candidates: Sequence[int],
        *,
        gender: int = 0,
        age: int = 0,
        categories: Sequence[int] | None = None,
        history_actions: Sequence[Sequence[float]] | None = None,
    ) -> OriginalScores:
        """Score candidates for one user, all by raw id.

        Args:
            user, history, candidates: raw ids; the history is in time order and may be empty.
            gender, age: feature values; 0 is unknown. categories: of the candidates; None is unknown.
            history_actions: read by the two-tower alone, one row of labels an event; None takes every event for a click.

        Raises:
            UserError: no candidates, more than the model has positions for, or a value outside its table.
        """
        vocabulary, positions = self._description.vocabulary, self._description.config.positions
        if not candidates or max(len(history), len(candidates)) > positions:
            raise UserError(f"the model takes up to {positions} events of history and 1 to {positions} candidates.")
        categories = [0] * len(candidates) if categories is None else categories
        actions = (
            [[1.0] + [0.0] * (vocabulary.actions - 1)] * len(history) if history_actions is None else history_actions
        )
        if len(categories) != len(candidates) or len(actions) != len(history):
            raise UserError("categories must be as many as candidates, and history_actions as many as events.")
        for name, values, size in (
            ("gender", [gender], vocabulary.genders),
            ("age", [age], vocabulary.ages),
            ("categories", categories, vocabulary.categories),
        ):
            if not all(0 <= value < size for value in values):
                raise UserError(f"{name} must lie in 0..{size - 1}.")
        user_1 = self._tensor([hashed(user, vocabulary.users)])
        # An empty history is one slot of padding.
        history_1S = self._tensor([[hashed(raw, vocabulary.items) for raw in history] or [0]])
        actions_1SA = self._tensor([list(actions) or [[0.0] * vocabulary.actions]])
        candidate_1C = self._tensor([[hashed(raw, vocabulary.items) for raw in candidates]])
        gender_1, age_1, category_1C = self._tensor([gender]), self._tensor([age]), self._tensor([list(categories)])
        with devices.autocast(self._device, self._autocast):
            if self._description.kind == artifact.ORIGINAL_RANKER:
                logits_1CA = self._module(user_1, history_1S, candidate_1C, gender_1, age_1, category_1C)
                scores_1C = logits_1CA[..., 0]
            else:
                found = self._module(user_1, history_1S, actions_1SA, candidate_1C, gender_1, age_1, category_1C)
                scores_1C, logits_1CA = found.scores, found.logits
        return OriginalScores(tuple(scores_1C[0].float().tolist()), tuple(map(tuple, logits_1CA[0].float().tolist())))

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values).to(self._device)
