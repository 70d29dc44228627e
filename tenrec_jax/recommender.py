"""Both stages as one object: raw ids in, ranked raw ids out.

A user's state, of constant size, gives a query; the index answers with candidates, those that rules forbid are left out, the ranker says
how probable each action on the others is, and rules make the list. Without a ranker the order is retrieval's.

A user's state begins with the latest `max_length` events of the log, and goes on with what is observed, without reading anything again.
Only a model that cannot go on for ever (softmax attention, learned positions) begins anew from the later half when it is full.
"""

import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tenrec_jax import artifact, rules
from tenrec_jax.data.interactions import RawId
from tenrec_jax.errors import UserError
from tenrec_jax.known_ids import KnownIds, checked_id
from tenrec_jax.requests import (
    Event,
    Item,
    KnownEvent,
    Observed,
    Recommendations,
    RecommendedItem,
    Request,
    RequestError,
    Retrieved,
    RuleEffect,
    Rules,
    UnknownUserError,
)
from tenrec_jax.retrieval.hits import Allowed, AllowedHits, Ids, is_among
from tenrec_jax.rules import Candidates, Ruled
from tenrec_jax.user_states import State, UserEvents, UserStates, power_of_two

# Users whose states are kept; of others they are computed again when they come back.
KEPT_STATES = 10_000
EXPLAINED_EVENTS = 50


@dataclass
class _User:
    """A user, or somebody of whom a history is given.

    Attributes:
        dense: id in the log, 0 for others.
        length: events in the state. events: the latest of them. seen: dense ids of the items in all events, ascending.
        state: None before it is computed.
    """

    dense: int
    length: int
    events: UserEvents
    seen: Ids
    state: State | None = None


class _Asked(NamedTuple):
    """A request that can be answered: its place among the others, whom and what it is about, and unknown items of its history."""

    place: int
    request: Request
    rules: Rules
    user: _User
    unknown: tuple[RawId, ...] = ()


class Recommender:
    """Serves a recommender folder. Make one with `Recommender.load`; one thread at a time may use it."""

    def __init__(self, loaded: artifact.Artifact) -> None:
        self._artifact, self._index = loaded, loaded.index
        self._known = KnownIds(loaded.catalogue)
        self._states = UserStates(loaded, self._known)
        self._users: OrderedDict[RawId, _User] = OrderedDict()
        # What was told since the folder was loaded: another version can be told the same.
        self._observed: dict[RawId, list[Event]] = {}
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
        """Whether a ranker orders the candidates."""
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
        rules: Rules | None = None,
        explain: bool = False,
    ) -> Recommendations:
        """Recommend items to a user of the log or of observations, or to anyone from a history alone; see `Request`.

        Raises:
            RequestError: neither or both of user_id and history, an unknown user, k below 1, or an id of another type than the log's.
        """
        (answer,) = self.answer(
            [Request(user_id, None if history is None else tuple(history), k=k, rules=rules, explain=explain)]
        )
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
        self._compute_states([each.user for each in asked])
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
                history=self._told_events(each.user.events) if each.request.explain else None,
                retrieved=self._told_hits(found, each.request.k) if each.request.explain else None,
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
        self._compute_states([user])
        retrieval_C = self._states.item_vectors(item_C) @ self._states.queries([_state(user)])[0]
        hits = AllowedHits(retrieval_C, item_C, item_C[:0])
        (candidates,) = self._candidates([user], [hits])
        scored = rules.by_worth(candidates, self.rules.action_values, self.actions, 0.0)
        by_item = dict(zip(scored.item_C.tolist(), self._told_items(scored, len(item_C)), strict=True))
        return tuple(by_item[item] for item in item_C.tolist())

    def observe(self, user_id: RawId, events: Sequence[Event]) -> Observed:
        """Take note of what a user did; later answers know of it. A user whom the log does not hold is welcome.

        The time does not depend on how much is known of the user.

        Raises:
            RequestError: an id of another type than the log's, or an unknown action. Nothing has changed then.
        """
        raw = checked_id(user_id, "user_id", is_text=self._known.users_are_text)
        new = self._read(events, "events")
        if not events:
            raise RequestError("events", "is empty: there is nothing to observe.")
        user = self._users.get(raw) or self._user_of_log(raw)
        self._compute_states([user])
        self._take_in(user, new)
        self._observed.setdefault(raw, []).extend(events)
        self._keep(raw, user)
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
        for raw, events in other._observed.items():
            self._read(events, "events")
            self._observed[raw] = list(events)
        self._users.clear()

    def _asked(self, place: int, request: Request) -> _Asked:
        k = request.k
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise RequestError("k", f"is {k!r}; it must be an integer of at least 1.")
        if (request.user_id is None) == (request.history is None):
            raise RequestError("", "Give either a user_id or a history, not both and not neither.")
        asked_rules = request.rules or self.rules
        self._known.items(asked_rules.blocked_items, "rules.blocked_items")
        if request.history is not None:
            events = self._read(request.history, "history")
            someone = _User(0, len(events.item), events, np.unique(events.item))
            return _Asked(place, request, asked_rules, someone, events.unknown_items)
        raw = checked_id(request.user_id, "user_id", is_text=self._known.users_are_text)
        user = self._users.get(raw) or self._user_of_log(raw)
        if user.dense == 0 and raw not in self._observed:
            raise UnknownUserError("user_id", f"{raw} is not in the log. Give a history to recommend to somebody new.")
        self._keep(raw, user)
        return _Asked(place, request, asked_rules, user)

    def _user_of_log(self, raw: RawId) -> _User:
        """A user's events of the log and, after them, the observed ones."""
        catalogue, dense = self._artifact.catalogue, self._known.user(raw)
        rows = slice(catalogue.offsets[dense], catalogue.offsets[dense + 1])
        events = UserEvents.of_log(catalogue.item[rows], catalogue.action[rows])
        if raw in self._observed:
            events = events.then(self._read(self._observed[raw], "events"))
        return _User(dense, len(events.item), events, np.unique(events.item))

    def _keep(self, raw: RawId, user: _User) -> None:
        self._users[raw] = user
        self._users.move_to_end(raw)
        if len(self._users) > KEPT_STATES:
            self._users.popitem(last=False)

    def _read(self, history: Sequence[Event | RawId], name: str) -> UserEvents:
        events = [event if isinstance(event, Event) else Event(event) for event in history]
        item = self._known.items([event.item_id for event in events], name)
        action = np.zeros((len(events), len(self.actions)), np.int8)
        for place, event in enumerate(events):
            for each in event.actions:
                if each not in self.actions:
                    known = ", ".join(self.actions)
                    raise RequestError(f"{name}[{place}].actions", f"holds {each!r}; the log's actions are {known}.")
                action[place, self.actions.index(each)] = 1
        unknown = np.full(len(events), None, object)
        unknown[item == 0] = [event.item_id for event, number in zip(events, item, strict=True) if number == 0]
        return UserEvents(item, action, unknown)

    def _compute_states(self, users: Sequence[_User]) -> None:
        """The states of those who have none yet, from their latest events."""
        new = list({id(user): user for user in users if user.state is None}.values())
        for user in new:
            user.events = user.events.part(slice(max(0, len(user.events.item) - self._artifact.max_length), None))
        states = self._states.start([user.dense for user in new])
        for user, state in zip(new, self._states.extend(states, [user.events for user in new]), strict=True):
            user.state = state

    def _take_in(self, user: _User, new: UserEvents) -> None:
        longest = self._artifact.max_length
        events = user.events.then(new)
        if self._states.is_bounded and len(events.item) > longest:
            user.events = events.part(slice(-max(1, longest // 2), None))
            user.state = None
            self._compute_states([user])
        else:
            (user.state,) = self._states.extend([_state(user)], [new])
            user.events = events.part(slice(max(0, len(events.item) - longest), None))
        user.length += len(new.item)
        fresh = np.unique(new.item)
        fresh = fresh[~is_among(fresh, user.seen)]
        user.seen = np.insert(user.seen, np.searchsorted(user.seen, fresh), fresh)  # sorting all would take longer

    def _search(self, asked: Sequence[_Asked]) -> list[AllowedHits]:
        """The candidates of each request. Those that want equally many are searched together: nobody's hang on another's wish."""
        hits: list[AllowedHits] = [AllowedHits.none()] * len(asked)
        wanted = np.array([max(each.request.k, self._artifact.serving.candidates) for each in asked])
        for size in np.unique(wanted).tolist():
            rows = np.flatnonzero(wanted == size).tolist()
            query_BD = self._states.queries([_state(asked[row].user) for row in rows])
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

    def _candidates(self, users: Sequence[_User], hits: Sequence[AllowedHits]) -> list[Candidates]:
        """What was found, in retrieval's order, with the ranker's probabilities."""
        items = [hit.items_C for hit in hits]
        if self.is_ranked and items:
            widest, usual = max(map(len, items)), self._artifact.serving.candidates
            width = usual if widest <= usual else power_of_two(widest)
            probabilities = self._states.probabilities([_state(user) for user in users], items, width)
        else:
            probabilities = [np.zeros((len(item_C), 0), np.float32) for item_C in items]
        return [
            Candidates(
                hit.items_C,
                self._known.category_N[hit.items_C],
                hit.scores_C,
                probability_CA,
                hit.scores_C,
                np.zeros(len(hit.items_C), bool),
            )
            for hit, probability_CA in zip(hits, probabilities, strict=True)
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
        candidates = rules.by_worth(found, how.action_values, self.actions, how.retrieval_weight)
        if how.diversity:
            ruled = rules.diversified(candidates, how.diversity, k)
            candidates = ruled.candidates
            effects.append(ruled.effect(rules.DIVERSITY, raw_item))
        if how.max_per_category:
            ruled = rules.capped(candidates, how.max_per_category, k)
            candidates = ruled.candidates
            effects.append(ruled.effect(rules.CATEGORY_CAP, raw_item))
        if how.exploration:
            ruled = rules.explored(candidates, how.exploration, how.max_per_category, k, _random(asked))
            candidates = ruled.candidates
            effects.append(ruled.effect(rules.EXPLORATION, raw_item))
        return self._told_items(candidates, k), tuple(effects)

    def _told_items(self, candidates: Candidates, k: int) -> tuple[RecommendedItem, ...]:
        first = candidates.at(np.arange(min(k, len(candidates.item_C))))
        columns = (
            self._known.item_id[first.item_C],
            first.category_C,
            first.score_C,
            first.retrieval_C,
            first.probability_CA,
            first.explored_C,
        )
        names = self.actions if self.is_ranked else ()
        return tuple(
            RecommendedItem(raw, category, score, retrieval, dict(zip(names, probability, strict=True)), by_chance)
            for raw, category, score, retrieval, probability, by_chance in zip(
                *(column.tolist() for column in columns), strict=True
            )
        )

    def _told_events(self, events: UserEvents) -> tuple[KnownEvent, ...]:
        latest = events.part(slice(max(0, len(events.item) - EXPLAINED_EVENTS), None))
        raw = [
            unknown if number == 0 else self._known.item_id[number : number + 1].tolist()[0]
            for number, unknown in zip(latest.item.tolist(), latest.unknown, strict=True)
        ]
        done = [tuple(name for name, one in zip(self.actions, row, strict=True) if one) for row in latest.action]
        categories = self._known.category_N[latest.item].tolist()
        return tuple(KnownEvent(*each) for each in zip(raw, categories, done, strict=True))

    def _told_hits(self, hits: AllowedHits, k: int) -> tuple[Retrieved, ...]:
        item_K, score_K = hits.items_C[:k], hits.scores_C[:k].tolist()
        ids, categories = self._known.item_id[item_K].tolist(), self._known.category_N[item_K].tolist()
        return tuple(Retrieved(*each) for each in zip(ids, categories, score_K, strict=True))

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


def _state(user: _User) -> State:
    if user.state is None:
        raise ValueError("the user's state is not computed yet")
    return user.state


def _random(asked: _Asked) -> np.random.Generator:
    """Of a request's draws: anew each time, or of its seed and user."""
    if asked.rules.seed is None:
        return np.random.default_rng()
    return np.random.default_rng([asked.rules.seed, zlib.crc32(str(asked.request.user_id).encode())])
