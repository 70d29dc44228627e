"""What a recommender is asked, and what it answers: plain records, for Python callers, the command line and the server alike."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from tenrec_jax.data.interactions import RawId
from tenrec_jax.errors import UserError
from tenrec_jax.settings import Natural, NonNegative, Range, Settings, Share

CLICK = "click"
Worth = Annotated[float, Range(at_least=0, at_most=1e6)]


class RequestError(UserError):
    """A request that cannot be answered.

    Attributes:
        field: what is wrong in it, for example "history[3]" or "rules.diversity"; "" where it is the whole.
        message: what is wrong with that, and the remedy; it follows the field's name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}".strip())
        self.field, self.message = field, message


class UnknownUserError(RequestError):
    """A user of whom neither the log nor an observation tells anything."""


@dataclass(frozen=True)
class Event:
    """Something that a user did.

    Attributes:
        item_id: raw id; one that the catalogue does not hold counts as an unknown item.
        actions: what the user did with it; none at all is an exposure without a click.
    """

    item_id: RawId
    actions: tuple[str, ...] = (CLICK,)


@dataclass(frozen=True)
class Item:
    """An item that is added to the catalogue, or changed in it.

    Attributes:
        item_id: raw id.
        category: number of the item's category, as answers give it; 0 where it is missing.
    """

    item_id: RawId
    category: int = 0


@dataclass(frozen=True)
class ActionValues(Settings):
    """Worth of each action. An item's expected worth is the sum over the log's actions of probability times value."""

    click: Worth = 1.0
    like: Worth = 2.0
    share: Worth = 4.0
    follow: Worth = 3.0

    def conflicts(self) -> Iterator[str]:
        if not any(vars(self).values()):
            yield "all are 0: with no value other than 0 all items are worth the same"

    def of(self, actions: tuple[str, ...]) -> tuple[float, ...]:
        """The values of a log's actions, in their order."""
        return tuple(getattr(self, action) for action in actions)


@dataclass(frozen=True)
class Rules(Settings):
    """What becomes of candidates beside what the models say.

    Attributes:
        action_values: worth of each action.
        retrieval_weight: b in the score `worth * exp(b * (retrieval score - the best candidate's))`. With 1 it is the worth expected of
            an item times the probability that retrieval gives it of coming next; 0 orders by worth alone, that of what is shown. Co-visits,
            where there are any, say what comes next too, and have the same weight (`tenrec_jax.order`).
        exclude_seen: leave out items in the user's events.
        blocked_items, blocked_categories: never recommended.
        diversity: share l of diversity in maximal marginal relevance, `(1 - l) * relevance - l * similarity` (Carbonell and Goldstein,
            1998): relevance is the score, from 0 for the worst candidate to 1 for the best; an item is similar, 1 instead of 0, where
            an item of its category stands before it. 0 leaves the order alone.
        max_per_category: items of one category in the list; 0 allows any number. Items without a category are not counted.
        exploration: probability by which a place of the list is given to a candidate drawn from the rest.
        seed: of those draws; the same seed and user give the same draws. None draws anew each time.
    """

    action_values: ActionValues = field(default_factory=ActionValues)
    retrieval_weight: NonNegative = 1.0
    exclude_seen: bool = True
    blocked_items: tuple[RawId, ...] = ()
    blocked_categories: tuple[int, ...] = ()
    diversity: Share = 0.0
    max_per_category: Natural = 0
    exploration: Share = 0.0
    seed: int | None = None

    def conflicts(self) -> Iterator[str]:
        if self.seed is not None and self.seed < 0:
            yield f"seed is {self.seed}; it must be at least 0"


@dataclass(frozen=True)
class Request:
    """Recommendations to a user of the log or of observations, or to anyone from a history alone: give one of both.

    Attributes:
        user_id: raw id.
        history: what somebody did, oldest first; empty for somebody of whom nothing is known. A raw id stands for a click on it.
        k: number of items, at least 1.
        rules: None takes the recommender's own.
        explain: also tell the history and what retrieval found.
    """

    user_id: RawId | None = None
    history: tuple[Event | RawId, ...] | None = None
    k: int = 20
    rules: Rules | None = None
    explain: bool = False


@dataclass(frozen=True)
class RecommendedItem:
    """One recommendation.

    Attributes:
        item_id: raw id, an integer or, where the log's ids are text, a str.
        category: number of its category, 0 where it is missing.
        score: what the list is ordered by, see `Rules.retrieval_weight`; of given items the expected worth of the actions alone, which
            no other item has a part in; where there is no ranker, the retrieval score and the logarithm of what co-visits say.
        retrieval_score: inner product of query and item vector.
        probabilities: of each action, by name; empty where there is no ranker.
        explored: whether chance put it there.
    """

    item_id: RawId
    category: int
    score: float
    retrieval_score: float
    probabilities: dict[str, float]
    explored: bool = False


@dataclass(frozen=True)
class Move:
    """A rule moved an item from one place of the order to another; places count from 1."""

    item_id: RawId
    before: int
    after: int


@dataclass(frozen=True)
class RuleEffect:
    """What a rule did: the candidates that it removed, and the items of the list that it moved."""

    rule: str
    removed: tuple[RawId, ...] = ()
    moved: tuple[Move, ...] = ()


@dataclass(frozen=True)
class Retrieved:
    """A candidate as retrieval found it."""

    item_id: RawId
    category: int
    retrieval_score: float


@dataclass(frozen=True)
class KnownEvent:
    """An event of a user's history, as the recommender read it; the category of an item outside the catalogue is 0."""

    item_id: RawId
    category: int
    actions: tuple[str, ...]


@dataclass(frozen=True)
class Recommendations:
    """An answer.

    Attributes:
        items: best first; fewer than asked for where the catalogue holds no more that the rules allow.
        version: of the recommender.
        history_length: events that were read.
        unknown_items: raw ids in a given history that the catalogue does not hold.
        effects: of the rules that were on, in the order in which they were applied.
        milliseconds: by stage ("state", "search", "rank", "rules", "total"), of the whole micro-batch.
        history: the latest events, oldest first, and retrieved: the first k of retrieval; None where no explanation was asked for.
    """

    items: tuple[RecommendedItem, ...]
    version: str
    history_length: int
    unknown_items: tuple[RawId, ...]
    effects: tuple[RuleEffect, ...]
    milliseconds: dict[str, float]
    history: tuple[KnownEvent, ...] | None = None
    retrieved: tuple[Retrieved, ...] | None = None


@dataclass(frozen=True)
class Observed:
    """After events were observed: the number of events in the user's state, and the raw ids that the catalogue does not hold."""

    history_length: int
    unknown_items: tuple[RawId, ...]
