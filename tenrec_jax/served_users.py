"""The users that a recommender serves: their events in the log and those observed since, and the states of those who came last.

A user's state begins with the latest `max_length` events of the log, and goes on with what is observed, without reading anything again.
Only a model that cannot go on for ever (softmax attention, learned positions) begins anew from the later half when it is full.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tenrec_jax.artifact import Artifact
from tenrec_jax.data.interactions import RawId
from tenrec_jax.known_ids import KnownIds, checked_id
from tenrec_jax.requests import Event, RequestError, UnknownUserError
from tenrec_jax.retrieval.hits import Ids, is_among
from tenrec_jax.user_states import State, UserEvents, UserStates

# Users whose states are kept; of others they are computed again when they come back.
KEPT_STATES = 10_000


@dataclass
class User:
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

    @classmethod
    def after(cls, dense: int, events: UserEvents) -> "User":
        """A user with these events and no state yet."""
        return cls(dense, len(events.item), events, np.unique(events.item))

    @property
    def computed(self) -> State:
        """The state, which was computed before."""
        if self.state is None:
            raise ValueError("the user's state is not computed yet")
        return self.state


class ServedUsers:
    """See the module's docstring."""

    def __init__(self, loaded: Artifact, known: KnownIds, states: UserStates) -> None:
        self._catalogue, self._actions, self._max_length = loaded.catalogue, loaded.actions, loaded.max_length
        self._known, self._states = known, states
        self._kept: OrderedDict[RawId, User] = OrderedDict()
        # Since the folder was loaded: another version can be told the same.
        self._observed: dict[RawId, list[Event]] = {}

    def of(self, user_id: object) -> User:
        """A user of the log or of observations.

        Raises:
            RequestError: an id of another type than the log's.
            UnknownUserError: nothing is known of the user.
        """
        raw = checked_id(user_id, "user_id", is_text=self._known.users_are_text)
        user = self._found(raw)
        if user.dense == 0 and raw not in self._observed:
            raise UnknownUserError("user_id", f"{raw} is not in the log. Give a history to recommend to somebody new.")
        self._keep(raw, user)
        return user

    def read(self, history: Sequence[Event | RawId], name: str) -> UserEvents:
        """Events as the models read them; `name` is what messages call them.

        Raises:
            RequestError: an id of another type than the log's, or an unknown action.
        """
        events = [event if isinstance(event, Event) else Event(event) for event in history]
        item = self._known.items([event.item_id for event in events], name)
        action = np.zeros((len(events), len(self._actions)), np.int8)
        for place, event in enumerate(events):
            for each in event.actions:
                if each not in self._actions:
                    known = ", ".join(self._actions)
                    raise RequestError(f"{name}[{place}].actions", f"holds {each!r}; the log's actions are {known}.")
                action[place, self._actions.index(each)] = 1
        unknown = np.full(len(events), None, object)
        unknown[item == 0] = [event.item_id for event, number in zip(events, item, strict=True) if number == 0]
        return UserEvents(item, action, unknown)

    def compute(self, users: Sequence[User]) -> None:
        """The states of those who have none yet, from their latest events."""
        new = list({id(user): user for user in users if user.state is None}.values())
        for user in new:
            user.events = user.events.part(slice(max(0, len(user.events.item) - self._max_length), None))
        states = self._states.start([user.dense for user in new])
        for user, state in zip(new, self._states.extend(states, [user.events for user in new]), strict=True):
            user.state = state

    def observe(self, user_id: RawId, events: Sequence[Event], new: UserEvents) -> User:
        """Add events, which are `new` as the models read them, to a user's state; a user of whom nothing is known is welcome.

        Raises:
            RequestError: an id of another type than the log's.
        """
        raw = checked_id(user_id, "user_id", is_text=self._known.users_are_text)
        user = self._found(raw)
        self.compute([user])
        self._take_in(user, new)
        self._observed.setdefault(raw, []).extend(events)
        self._keep(raw, user)
        return user

    def adopt(self, other: "ServedUsers") -> None:
        """Take over what another version's users were observed to do.

        Raises:
            RequestError: events that this version cannot read.
        """
        for raw, events in other._observed.items():
            self.read(events, "events")
            self._observed[raw] = list(events)
        self._kept.clear()

    def _found(self, raw: RawId) -> User:
        """The user whose state is kept, or one of the events of the log and, after them, the observed ones."""
        if raw in self._kept:
            return self._kept[raw]
        dense = self._known.user(raw)
        rows = slice(self._catalogue.offsets[dense], self._catalogue.offsets[dense + 1])
        events = UserEvents.of_log(self._catalogue.item[rows], self._catalogue.action[rows])
        if raw in self._observed:
            events = events.then(self.read(self._observed[raw], "events"))
        return User.after(dense, events)

    def _keep(self, raw: RawId, user: User) -> None:
        self._kept[raw] = user
        self._kept.move_to_end(raw)
        if len(self._kept) > KEPT_STATES:
            self._kept.popitem(last=False)

    def _take_in(self, user: User, new: UserEvents) -> None:
        longest, events = self._max_length, user.events.then(new)
        if self._states.is_bounded and len(events.item) > longest:
            user.events, user.state = events.part(slice(-max(1, longest // 2), None)), None
            self.compute([user])
        else:
            (user.state,) = self._states.extend([user.computed], [new])
            user.events = events.part(slice(max(0, len(events.item) - longest), None))
        user.length += len(new.item)
        fresh = np.unique(new.item)
        fresh = fresh[~is_among(fresh, user.seen)]
        user.seen = np.insert(user.seen, np.searchsorted(user.seen, fresh), fresh)  # sorting all would take longer
