"""Both stages as one object: raw ids in, ranked raw ids out.

A user's state, of constant size, gives a query; the index answers with candidates, those that rules forbid are left out, the ranker says
how probable each action on the others is, co-visits what the latest clicks say for them, and rules make the list. Without either the order
is retrieval's.
"""

import dataclasses
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tenrec_jax import artifact, rules
from tenrec_jax.answers import told_events, told_hits, told_items
from tenrec_jax.co_visits import counted
from tenrec_jax.data.interactions import RawId
from tenrec_jax.errors import UserError
from tenrec_jax.known_ids import KnownIds
from tenrec_jax.requests import (
    Event,
    Item,
    Observed,
    Recommendations,
    RecommendedItem,
    Request,
    RequestError,
    RuleEffect,
    Rules,
)
from tenrec_jax.retrieval.hits import Allowed, AllowedHits, Ids, is_among
from tenrec_jax.rules import Candidates, Ruled
from tenrec_jax.served_users import ServedUsers, User
from tenrec_jax.user_states import UserStates, power_of_two


class _Asked(NamedTuple):
    """A request that can be answered: its place among the others, whom and what it is about, and unknown items of its history."""

    place: int
    request: Request
    rules: Rules
    user: User
    unknown: tuple[RawId, ...] = ()


class Recommender:
    """Serves a recommender folder. Make one with `Recommender.load`; one thread at a time may use it."""

    def __init__(self, loaded: artifact.Artifact) -> None:
        self._artifact, self._index = loaded, loaded.index
        self._known = KnownIds(loaded.catalogue)
        self._states = UserStates(loaded, self._known)
        self._users = ServedUsers(loaded, self._known, self._states)
        # Items added and deleted since the folder was loaded: another version can be told the same.
        self._changes: list[Item | RawId] = []

    @classmethod
    def load(cls, folder: str | Path) -> "Recommender":
        """Load a folder that `experiments/launch.py` wrote.

        Raises:
            UserError: the folder is not a recommender, or is damaged.
        """
        return cls(artifact.load(Path(folder)))

    @property
    def version(self) -> str:
        """Content hash of the folder."""
        return self._artifact.version

    @property
    def actions(self) -> tuple[str, ...]:
        """Names of the log's actions."""
        return self._artifact.actions

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories 1, 2, ...; empty where the log has none."""
        return self._artifact.identity.categories

    @property
    def rules(self) -> Rules:
        """What requests without rules are answered by."""
        return self._artifact.serving.rules

    @property
    def user_ids(self) -> np.ndarray:
        """Raw ids of the users in the log, int64 or str objects [U]."""
        return self._artifact.catalogue.user_id[1:]

    @property
    def catalogue_size(self) -> int:
        """Number of items that can be recommended: those that training rows mention, and those that were added."""
        return self._index.size

    def catalogue(self, first: int) -> tuple[Item, ...]:
        """The first items that can be recommended."""
        dense = np.sort(self._index.item_ids_N)[:first]
        pairs = zip(self._known.item_id[dense].tolist(), self._known.category_N[dense].tolist(), strict=True)
        return tuple(Item(raw, category) for raw, category in pairs)

    @property
    def is_ranked(self) -> bool:
        """Whether a ranker has a part in the order of the candidates."""
        return self._states.is_ranked

    @property
    def ids_are_text(self) -> tuple[bool, bool]:
        """Whether user ids and item ids are text rather than integers."""
        return self._known.users_are_text, self._known.items_are_text

    def warm(self, batch_sizes: Sequence[int] = (1, 4, 16)) -> None:
        """Compile what answers to so many requests at a time need, so that no request waits for it."""
        self._states.warm(batch_sizes, self._artifact.serving.candidates)
        self.recommend(history=[], k=1)

    def recommend(
        self,
        *,
        user_id: RawId | None = None,
        history: Sequence[Event | RawId] | None = None,
        k: int = 20,
        exclude_seen: bool | None = None,
        rules: Rules | None = None,
        explain: bool = False,
    ) -> Recommendations:
        """Recommend items to a user of the log or of observations, or to anyone from a history alone.

        Args:
            user_id, history, k, rules, explain: see `Request`.
            exclude_seen: in place of what the rules say of it.

        Raises:
            RequestError: neither or both of user_id and history, an unknown user, k below 1, or an id of another type than the log's.
        """
        if exclude_seen is not None:
            rules = dataclasses.replace(rules or self.rules, exclude_seen=exclude_seen)
        events = None if history is None else tuple(history)
        (answer,) = self.answer([Request(user_id, events, k=k, rules=rules, explain=explain)])
        if isinstance(answer, RequestError):
            raise answer
        return answer

    def answer(self, requests: Sequence[Request]) -> list[Recommendations | RequestError]:
        """Answer several requests together, which takes far less time than one by one. A wrong one gets an error and harms no other.

        The milliseconds of an answer are those of all together.
        """
        clock = _Clock()
        answers: dict[int, Recommendations | RequestError] = {}
        asked: list[_Asked] = []
        for place, request in enumerate(requests):
            try:
                asked.append(self._asked(place, request))
            except RequestError as error:
                answers[place] = error
        self._users.compute([each.user for each in asked])
        clock.done("state")
        hits = self._search(asked)
        clock.done("search")
        candidates = self._candidates([each.user for each in asked], hits)
        clock.done("rank")
        made = [self._list(*each) for each in zip(asked, hits, candidates, strict=True)]
        clock.done("rules")
        milliseconds = clock.milliseconds()
        for each, found, (items, effects) in zip(asked, hits, made, strict=True):
            answers[each.place] = Recommendations(
                items=items,
                version=self.version,
                history_length=each.user.length,
                unknown_items=each.unknown,
                effects=effects,
                milliseconds=milliseconds,
                history=told_events(self._known, self.actions, each.user.events) if each.request.explain else None,
                retrieved=told_hits(self._known, found, each.request.k) if each.request.explain else None,
            )
        return [answers[place] for place in range(len(requests))]

    def score(
        self,
        items: Sequence[RawId],
        *,
        user_id: RawId | None = None,
        history: Sequence[Event | RawId] | None = None,
    ) -> tuple[RecommendedItem, ...]:
        """Score given items, in the order given; each score is a function of the user and that item alone.

        Args:
            items: raw ids of the catalogue, at least one.
            user_id, history: as for `recommend`.

        Raises:
            RequestError: as `recommend` does, and for an item that the catalogue does not hold.
        """
        user = self._asked(0, Request(user_id, None if history is None else tuple(history))).user
        item_C = self._known_items(items, "items")
        if not len(item_C):
            raise RequestError("items", "is empty: there are no items to score.")
        self._users.compute([user])
        retrieval_C = self._states.item_vectors(item_C) @ self._states.queries([user.computed])[0]
        hits = AllowedHits(retrieval_C, item_C, item_C[:0])
        (candidates,) = self._candidates([user], [hits])
        scored = rules.by_worth(candidates, self._artifact.order, self.rules.action_values, self.actions, 0.0)
        told = told_items(self._known, self.actions, scored, len(item_C))
        by_item = dict(zip(scored.item_C.tolist(), told, strict=True))
        return tuple(by_item[item] for item in item_C.tolist())

    def observe(self, user_id: RawId, events: Sequence[Event]) -> Observed:
        """Take note of what a user did; later answers know of it. A user whom the log does not hold is welcome.

        The time does not depend on how much is known of the user.

        Raises:
            RequestError: an id of another type than the log's, or an unknown action. Nothing has changed then.
        """
        if not events:
            raise RequestError("events", "is empty: there is nothing to observe.")
        new = self._users.read(events, "events")
        user = self._users.observe(user_id, events, new)
        return Observed(user.length, new.unknown_items)

    def upsert(self, items: Sequence[Item]) -> None:
        """Add items to the catalogue, or change their categories. The next answers know of it.

        Raises:
            RequestError: an id of another type than the log's, one that occurs twice, or a category that training did not know. Nothing
                has changed then.
        """
        known = self._known.items([item.item_id for item in items], "items")
        categories, seen = self._artifact.identity.vocabulary.categories, set()
        for place, item in enumerate(items):
            if not 0 <= item.category < categories:
                raise RequestError(
                    f"items[{place}].category", f"is {item.category}; it must be 0 (none) to {categories - 1}."
                )
            if item.item_id in seen:
                raise RequestError(f"items[{place}]", f"is {item.item_id}, which occurs twice.")
            seen.add(item.item_id)
        if not items:
            return
        dense = self._known.upsert(items, known)
        self._states.items_changed()
        self._index.upsert(dense, self._states.item_vectors(dense))
        self._changes += items

    def delete(self, item_ids: Sequence[RawId]) -> None:
        """Recommend items no more. Histories that hold them are read as before.

        Raises:
            RequestError: an id that the catalogue does not hold, or that occurs twice. Nothing has changed then.
        """
        dense = self._known_items(item_ids, "delete")
        there = np.isin(dense, self._index.item_ids_N)
        twice = np.ones(len(dense), bool)
        twice[np.unique(dense, return_index=True)[1]] = False
        for place in np.flatnonzero(~there | twice)[:1]:
            fault = "occurs twice" if there[place] else "is not recommended anyway"
            raise RequestError(f"delete[{place}]", f"is {item_ids[place]}, which {fault}.")
        if len(dense):
            self._index.delete(dense)
            self._changes += item_ids

    def adopt(self, other: "Recommender") -> None:
        """Take over what another recommender was told since it was loaded: observations, added and deleted items.

        Raises:
            UserError: it does not fit this one, whose log has other kinds of ids, actions or categories. Load this one again then.
        """
        if self.ids_are_text != other.ids_are_text:
            raise UserError(
                f"{self.version} has other types of ids than {other.version}: what was observed does not fit."
            )
        for change in other._changes:
            if isinstance(change, Item):
                self.upsert([change])
            elif np.isin(self._known.items([change], "delete"), self._index.item_ids_N).all():
                self.delete([change])
        self._users.adopt(other._users)

    def _asked(self, place: int, request: Request) -> _Asked:
        k = request.k
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise RequestError("k", f"is {k!r}; it must be an integer of at least 1.")
        if (request.user_id is None) == (request.history is None):
            raise RequestError("", "Give either a user_id or a history, not both and not neither.")
        asked_rules = request.rules or self.rules
        self._known.items(asked_rules.blocked_items, "rules.blocked_items")
        if request.history is not None:
            events = self._users.read(request.history, "history")
            return _Asked(place, request, asked_rules, User.after(0, events), events.unknown_items)
        return _Asked(place, request, asked_rules, self._users.of(request.user_id))

    def _search(self, asked: Sequence[_Asked]) -> list[AllowedHits]:
        """The candidates of each request. Those that want equally many are searched together: nobody's hang on another's wish."""
        hits: list[AllowedHits] = [AllowedHits.none()] * len(asked)
        wanted = np.array([max(each.request.k, self._artifact.serving.candidates) for each in asked])
        for size in np.unique(wanted).tolist():
            rows = np.flatnonzero(wanted == size).tolist()
            query_BD = self._states.queries([asked[row].user.computed for row in rows])
            found = self._index.search_allowed(query_BD, [self._allowed(asked[row]) for row in rows], size)
            for row, hit in zip(rows, found, strict=True):
                hits[row] = hit
        return hits

    def _allowed(self, asked: _Asked) -> Allowed:
        blocked = self._known.items(asked.rules.blocked_items, "rules.blocked_items")
        categories = np.asarray(asked.rules.blocked_categories, np.int32)

        def allowed(item_n: Ids) -> np.ndarray:
            seen = is_among(item_n, asked.user.seen) if asked.rules.exclude_seen else np.zeros(len(item_n), bool)
            return ~(seen | np.isin(item_n, blocked) | np.isin(self._known.category_N[item_n], categories))

        return allowed

    def _candidates(self, users: Sequence[User], hits: Sequence[AllowedHits]) -> list[Candidates]:
        """What was found, in retrieval's order, with the ranker's probabilities and co-visits."""
        items = [hit.items_C for hit in hits]
        if self.is_ranked and items:
            widest, usual = max(map(len, items)), self._artifact.serving.candidates
            width = usual if widest <= usual else power_of_two(widest)
            probabilities = self._states.probabilities([user.computed for user in users], items, width)
        else:
            probabilities = [np.zeros((len(item_C), 0), np.float32) for item_C in items]
        co_visits, decay = self._artifact.co_visits, self._artifact.order.decay
        return [
            Candidates(
                hit.items_C,
                self._known.category_N[hit.items_C],
                hit.scores_C,
                probability_CA,
                *counted(co_visits, user.events.item, user.events.action[:, 0] > 0, hit.items_C, decay),
                hit.scores_C,
                np.zeros(len(hit.items_C), bool),
            )
            for user, hit, probability_CA in zip(users, hits, probabilities, strict=True)
        ]

    def _list(
        self, asked: _Asked, hits: AllowedHits, found: Candidates
    ) -> tuple[tuple[RecommendedItem, ...], tuple[RuleEffect, ...]]:
        """The list, and what the rules did on the way to it."""
        how, k, raw_item, effects = asked.rules, asked.request.k, self._known.item_id, []
        seen_R = is_among(hits.refused_R, asked.user.seen)
        if how.exclude_seen:
            effects.append(Ruled(found, hits.refused_R[seen_R].tolist()).effect(rules.SEEN, raw_item))
        if how.blocked_items or how.blocked_categories:
            blocked = hits.refused_R[~seen_R] if how.exclude_seen else hits.refused_R
            effects.append(Ruled(found, blocked.tolist()).effect(rules.BLOCKED, raw_item))
        candidates = rules.by_worth(found, self._artifact.order, how.action_values, self.actions, how.retrieval_weight)
        steps: list[tuple[str, Callable[[Candidates], Ruled]]] = []
        if how.diversity:
            steps.append((rules.DIVERSITY, lambda found: rules.diversified(found, how.diversity, k)))
        if how.max_per_category:
            steps.append((rules.CATEGORY_CAP, lambda found: rules.capped(found, how.max_per_category, k)))
        if how.exploration:
            draws, most = _random(asked), how.max_per_category
            steps.append((rules.EXPLORATION, lambda found: rules.explored(found, how.exploration, most, k, draws)))
        for name, rule in steps:
            ruled = rule(candidates)
            candidates = ruled.candidates
            effects.append(ruled.effect(name, raw_item))
        return told_items(self._known, self.actions, candidates, k), tuple(effects)

    def _known_items(self, items: Sequence[RawId], name: str) -> Ids:
        """Dense ids of items that the catalogue has to hold."""
        dense = self._known.items(items, name)
        for place in np.flatnonzero(dense == 0)[:1]:
            raise RequestError(f"{name}[{place}]", f"is {items[place]}, which is not in the catalogue.")
        return dense


class _Clock:
    """Milliseconds by stage."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._spent: dict[str, float] = {}

    def done(self, stage: str) -> None:
        """A stage is done; the next begins."""
        now = time.perf_counter()
        self._spent[stage], self._last = 1e3 * (now - self._last), now

    def milliseconds(self) -> dict[str, float]:
        """Of each stage, and in total."""
        return self._spent | {"total": 1e3 * (self._last - self._began)}


def _random(asked: _Asked) -> np.random.Generator:
    """Of a request's draws: anew each time, or of its seed and user."""
    if asked.rules.seed is None:
        return np.random.default_rng()
    return np.random.default_rng([asked.rules.seed, zlib.crc32(str(asked.request.user_id).encode())])
