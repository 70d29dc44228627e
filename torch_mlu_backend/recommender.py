"""Both stages as one object: raw ids in, ranked raw ids out, as `tenrec_jax.recommender` does it.

Retrieval compares the user's query with every item: where the exporting side searches with ScaNN, it may have missed what is found here.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from torch_mlu_backend import artifact
from torch_mlu_backend import device as devices
from torch_mlu_backend.artifact import RawId
from torch_mlu_backend.device import Autocast
from torch_mlu_backend.errors import UserError
from torch_mlu_backend.modules.ranker import Ranker
from torch_mlu_backend.modules.records import Events, Profile
from torch_mlu_backend.modules.two_tower import TwoTower

SHORTEST = 32


@dataclass(frozen=True)
class RecommendedItem:
    """One recommendation.

    Attributes:
        item_id: raw id.
        score: what the list is ordered by (`Order.fused`): the expected worth of the actions times the odds of retrieval, co-visits and
            popularity, or where there is no ranker the logarithm of these; of given items, with a ranker, the worth alone.
        retrieval_score: inner product of query and item vector.
        probabilities: of each action, by name; empty where there is no ranker.
    """

    item_id: RawId
    score: float
    retrieval_score: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Recommendations:
    """An answer, best item first; fewer than asked for where the catalogue holds no more unseen items.

    Attributes:
        version: of the recommender that was exported.
        history_length: events that were read. unknown_items: raw ids in a given history that the catalogue does not hold.
        seen_removed: items that would have been among the candidates, had the user not seen them.
        milliseconds: by stage ("query", "search", "rank", "total").
    """

    items: tuple[RecommendedItem, ...]
    version: str
    history_length: int
    unknown_items: tuple[RawId, ...]
    seen_removed: int
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class _User:
    """Dense ids of a user and of the user's events, on the CPU."""

    user: int
    item: Tensor
    action: Tensor
    unknown_items: tuple[RawId, ...]


class Recommender:
    """Serves an exported recommender on a device. Make one with `Recommender.load`."""

    def __init__(self, loaded: artifact.Artifact, device: torch.device, autocast: Autocast | None = None) -> None:
        self._artifact, self._device, self._autocast = loaded, device, autocast
        with devices.autocast(device, autocast):
            self._two_tower = cast(TwoTower, loaded.retrieval.module.to(device))
        self._ranker = cast(Ranker, loaded.ranking.module.to(device)) if loaded.ranking else None
        self._vectors_ND = loaded.catalogue.vectors.to(device)

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", autocast: Autocast | None = None) -> "Recommender":
        """Load a folder that `tenrec-jax export` wrote.

        Raises:
            UserError: no exported recommender, a damaged one, or a device or autocast that is not to be had.
        """
        return cls(artifact.load(Path(folder)), devices.resolve(device).device, autocast)

    @torch.no_grad()
    def recommend(
        self,
        *,
        user_id: RawId | None = None,
        history: Sequence[RawId] | None = None,
        k: int = 20,
        exclude_seen: bool = True,
    ) -> Recommendations:
        """Recommend items to a user of the log, or to anyone from a history alone.

        Args:
            user_id: raw id of a user of the log. Give this or `history`.
            history: raw ids of clicked items, oldest first; empty for somebody of whom nothing is known.
            k: number of items, at least 1.
            exclude_seen: leave out items in the user's events.

        Raises:
            UserError: neither or both of user_id and history, an unknown user, or k below 1.
        """
        began = time.perf_counter()
        if k < 1:
            raise UserError(f"k is {k!r}; it must be an integer of at least 1.")
        user = self._user(user_id, history)
        with devices.autocast(self._device, self._autocast):
            profile, events = self._inputs(user)
            query_D = self._query(profile, events)
            queried = time.perf_counter()
            item_C, score_C, removed = self._candidates(query_D, user, k, exclude_seen)
            searched = time.perf_counter()
            items = self._scored(user, profile, events, item_C, score_C, self._artifact.rules.retrieval_weight)
        items.sort(key=lambda item: -item.score)
        ranked = time.perf_counter()
        seconds = {
            "query": queried - began, "search": searched - queried, "rank": ranked - searched, "total": ranked - began
        }  # fmt: skip
        return Recommendations(
            items=tuple(items[:k]),
            version=self._artifact.manifest["version"],
            history_length=len(user.item),
            unknown_items=user.unknown_items,
            seen_removed=removed,
            milliseconds={name: 1e3 * value for name, value in seconds.items()},
        )

    @torch.no_grad()
    def score(
        self, items: Sequence[RawId], *, user_id: RawId | None = None, history: Sequence[RawId] | None = None
    ) -> tuple[RecommendedItem, ...]:
        """Score given items, in the order given; each score is a function of the user and that item alone.

        Raises:
            UserError: as `recommend` does, for an item that the catalogue does not hold, and for no items.
        """
        user, catalogue = self._user(user_id, history), self._artifact.catalogue
        if not items:
            raise UserError("There are no items to score.")
        if unknown := [raw for raw in items if raw not in catalogue.item_id]:
            raise UserError(f"Not in the catalogue: {', '.join(map(str, unknown))}.")
        item_C = torch.tensor([catalogue.item_id[raw] for raw in items])
        with devices.autocast(self._device, self._autocast):
            profile, events = self._inputs(user)
            query_D = self._query(profile, events)
            vector_CD = self._two_tower.item_vectors(*self._of_items(item_C))
            return tuple(self._scored(user, profile, events, item_C, (vector_CD @ query_D).float().cpu(), 0.0))

    @property
    def ids_are_text(self) -> tuple[bool, bool]:
        """Whether user ids and item ids are text rather than integers."""
        catalogue = self._artifact.catalogue
        return isinstance(next(iter(catalogue.user_id), 0), str), isinstance(next(iter(catalogue.item_id), 0), str)

    def _user(self, user_id: RawId | None, history: Sequence[RawId] | None) -> _User:
        if (user_id is None) == (history is None):
            raise UserError("Give either a user_id or a history, not both and not neither.")
        catalogue = self._artifact.catalogue
        if history is not None:
            item = torch.tensor([catalogue.item_id.get(raw, 0) for raw in history], dtype=torch.int64)
            action = torch.zeros((len(history), len(self._artifact.actions)), dtype=torch.int8)
            action[:, 0] = 1
            return _User(0, item, action, tuple(raw for raw in history if raw not in catalogue.item_id))
        user = catalogue.user_id.get(cast(RawId, user_id), 0)
        if user == 0:
            raise UserError(f"User {user_id} is not in the log. Give a history to recommend to somebody new.")
        first, last = catalogue.offsets[user : user + 2].tolist()
        return _User(user, catalogue.item[first:last].long(), catalogue.action[first:last], ())

    def _inputs(self, user: _User) -> tuple[Profile, Events]:
        catalogue, longest = self._artifact.catalogue, self._artifact.max_length
        item, action = user.item[-longest:], user.action[-longest:]
        # Few lengths, so that an accelerator meets few shapes.
        padding = min(longest, max(SHORTEST, 1 << (len(item) - 1).bit_length() if len(item) else 0)) - len(item)
        mask = torch.arange(len(item) + padding) < len(item)
        item, action = torch.nn.functional.pad(item, (0, padding)), torch.nn.functional.pad(action, (0, 0, 0, padding))
        events = Events(*self._of_items(item[None]), action[None].to(self._device), mask[None].to(self._device))
        one = slice(user.user, user.user + 1)
        profile = Profile(catalogue.trained_user[one], catalogue.gender[one], catalogue.age[one])
        return Profile(*(x.to(self._device) for x in profile)), events

    def _of_items(self, item: Tensor) -> tuple[Tensor, Tensor]:
        """The id that the models know, and the category, on the device."""
        catalogue = self._artifact.catalogue
        return catalogue.trained_item[item].to(self._device), catalogue.category[item].to(self._device)

    def _query(self, profile: Profile, events: Events) -> Tensor:
        return self._two_tower.extend(self._two_tower.start(profile), events).query_BD[0]

    def _candidates(self, query_D: Tensor, user: _User, k: int, exclude_seen: bool) -> tuple[Tensor, Tensor, int]:
        """Dense ids and retrieval scores of the best items [C], and how many seen ones were left out."""
        catalogue = self._artifact.catalogue
        wanted = max(k, self._artifact.rules.candidates)
        seen = user.item.unique() if exclude_seen else user.item[:0]
        found = (self._vectors_ND @ query_D.to(self._vectors_ND.dtype)).topk(
            min(wanted + len(seen), len(self._vectors_ND))
        )
        item_C, score_C = catalogue.indexed[found.indices.cpu()].long(), found.values.float().cpu()
        fresh = (~torch.isin(item_C, seen)).nonzero()[:wanted, 0]
        last = int(fresh[-1]) + 1 if len(fresh) == wanted else len(item_C)
        return item_C[fresh], score_C[fresh], last - len(fresh)

    def _scored(
        self, user: _User, profile: Profile, events: Events, item_C: Tensor, score_C: Tensor, weight: float
    ) -> list[RecommendedItem]:
        """The items in the order given; `weight` is that of what comes next, beside a ranker."""
        loaded = self._artifact
        probability_CA, worth_C = torch.zeros((len(item_C), 0)), None
        if self._ranker is not None and len(item_C):
            state = self._ranker.extend(self._ranker.start(profile), events)
            probability_CA = self._ranker.score(state, *self._of_items(item_C[None]))[0].float().sigmoid().cpu()
            worth_C = probability_CA @ torch.tensor(loaded.rules.action_values)
        co_visits_C, clicks_C, subjects_C = torch.zeros(len(item_C)), torch.zeros(len(item_C)), torch.ones(len(item_C))
        if loaded.co_visits is not None:
            latest = slice(-loaded.max_length, None)
            co_visits_C = loaded.co_visits.scores(
                user.item[latest], user.action[latest, 0] > 0, item_C, loaded.order.decay
            )
            clicks_C = loaded.co_visits.clicks_N[item_C]
            subjects_C = loaded.co_visits.subjects(user.item[latest], item_C)
        fused_C = loaded.order.fused(score_C, worth_C, co_visits_C, clicks_C, subjects_C, weight)
        names = loaded.actions if self._ranker is not None else ()
        return [
            RecommendedItem(
                cast(RawId, loaded.catalogue.raw_item[item]), fused, score, dict(zip(names, row, strict=True))
            )
            for item, fused, score, row in zip(
                *(column.tolist() for column in (item_C, fused_C, score_C, probability_CA)), strict=True
            )
        ]
