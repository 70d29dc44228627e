"""What the service is asked, strictly: no field that is not known, no boolean for a number, and a bound on everything that can be long.

The answers are described here too, for the API's documentation; they are written from the recommender's own records.
"""

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from tenrec_jax import requests
from tenrec_jax.data.interactions import RawId
from tenrec_jax.requests import CLICK
from tenrec_jax.serving.live import Asked

MAX_K, MAX_HISTORY, MAX_CANDIDATES, MAX_EVENTS, MAX_BLOCKED = 1_000, 10_000, 1_000, 1_000, 10_000
MAX_TEXT, MAX_ACTIONS = 256, 32
SMALLEST, LARGEST = -(2**63), 2**63 - 1


def raw_id(value: object) -> RawId:
    """An id as the log has it.

    Raises:
        ValueError: it is neither an integer of 64 bits nor a text that fits.
    """
    if isinstance(value, str):
        if not 0 < len(value) <= MAX_TEXT:
            raise ValueError(f"an id has 1 to {MAX_TEXT} characters")
        if not value.isascii() and any("\ud800" <= each <= "\udfff" for each in value):
            raise ValueError("an id is a text of Unicode, without halves of characters")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("an id is an integer or a text")
    if not SMALLEST <= value <= LARGEST:
        raise ValueError("an id is an integer of 64 bits")
    return value


def _event(value: object) -> object:
    """A bare id is a click."""
    return value if isinstance(value, dict) else {"item_id": raw_id(value)}


ID_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "integer", "minimum": SMALLEST, "maximum": LARGEST},
        {"type": "string", "minLength": 1, "maxLength": MAX_TEXT},
    ]
}
Id = Annotated[RawId, PlainValidator(raw_id), WithJsonSchema(ID_SCHEMA)]
Action = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Value = Annotated[float, Field(allow_inf_nan=False)]
# The models' numbers have 32 bits: sums of far larger ones would not be finite.
Weight = Annotated[Value, Field(ge=0, le=1e6)]
Category = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Body(BaseModel):
    """A JSON object of known fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Event(Body):
    """What a user did with an item; without actions it was shown and nothing was done."""

    item_id: Id
    actions: Annotated[list[Action], Field(max_length=MAX_ACTIONS)] = [CLICK]

    def plain(self) -> requests.Event:
        """As the recommender reads it."""
        return requests.Event(self.item_id, tuple(self.actions))


HistoryEntry = Annotated[Event, BeforeValidator(_event, json_schema_input_type=Id | Event)]


class ActionValues(Body):
    """Worth of each action; an item's worth is the sum of probability times value."""

    click: Weight = requests.ActionValues.click
    like: Weight = requests.ActionValues.like
    share: Weight = requests.ActionValues.share
    follow: Weight = requests.ActionValues.follow

    def given(self) -> dict[str, float]:
        """Those that were given."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class Rules(Body):
    """What becomes of candidates beside what the models say. What is left out is the recommender's own rule."""

    action_values: ActionValues = ActionValues()
    exclude_seen: bool = Field(default=True, description="Leave out items in the user's events.")
    blocked_items: Annotated[list[Id], Field(max_length=MAX_BLOCKED)] = []
    blocked_categories: Annotated[list[Category], Field(max_length=MAX_BLOCKED)] = []
    diversity: Annotated[Value, Field(ge=0, lt=1, description="Share of diversity in maximal marginal relevance.")] = (
        0.0
    )
    max_per_category: Annotated[int, Field(ge=0, le=MAX_K, description="0 allows any number.")] = 0
    exploration: Annotated[
        Value,
        Field(ge=0, lt=1, description="Probability by which a place is given to a candidate drawn from the rest."),
    ] = 0.0
    seed: Annotated[int, Field(ge=0, le=LARGEST)] | None = Field(
        default=None, description="Of the exploration; the same seed and user give the same list."
    )
    retrieval_weight: Weight = Field(
        default=requests.Rules.retrieval_weight, description="Weight of retrieval, and of co-visits, beside the worth."
    )

    def given(self) -> dict[str, Any]:
        """Those that were given, but for the values of actions, as the recommender's `Rules` has them."""
        values = {name: getattr(self, name) for name in self.model_fields_set - {"action_values"}}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


class _Who(Body):
    """Somebody: a user of the log or of observations, or anyone by a history."""

    user_id: Id | None = Field(default=None, description="A user of the log, or one who was observed.")
    history: Annotated[list[HistoryEntry], Field(max_length=MAX_HISTORY)] | None = Field(
        default=None, description="What somebody did, oldest first; a bare id is a click. Empty: nothing is known."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.user_id is None) == (self.history is None):
            raise ValueError("give either a user_id or a history, not both and not neither")
        return self

    @property
    def events(self) -> tuple[requests.Event | RawId, ...] | None:
        """The history, as the recommender reads it."""
        return None if self.history is None else tuple(event.plain() for event in self.history)


class RecommendBody(_Who):
    """A request for recommendations."""

    k: Annotated[int, Field(ge=1, le=MAX_K, description="Number of items.")] = 20
    explain: bool = Field(default=False, description="Also tell the history and what retrieval found.")
    rules: Rules = Rules()

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": 1, "k": 10},
                {"history": [12, 7, {"item_id": 99, "actions": ["click", "like"]}], "rules": {"diversity": 0.3}},
            ]
        }
    )

    def asked(self) -> Asked:
        """As the server asks the recommender."""
        rules = self.rules
        return Asked(self.user_id, self.events, self.k, rules.given(), rules.action_values.given(), self.explain)


class ScoreBody(_Who):
    """A request for scores of given items."""

    items: Annotated[list[Id], Field(min_length=1, max_length=MAX_CANDIDATES)]

    model_config = ConfigDict(json_schema_extra={"examples": [{"user_id": 1, "items": [12, 7, 99]}]})


class ObserveBody(Body):
    """What a user did just now, oldest first; the next recommendations know of it."""

    user_id: Id
    events: Annotated[list[Event], Field(min_length=1, max_length=MAX_EVENTS)]

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user_id": 1, "events": [{"item_id": 12, "actions": ["click", "like"]}]}]}
    )


class Item(Body):
    """An item of the catalogue, new or changed."""

    item_id: Id
    category: Category = 0


class ItemsBody(Body):
    """Changes of the catalogue."""

    upsert: Annotated[list[Item], Field(max_length=MAX_CANDIDATES)] = []
    delete: Annotated[list[Id], Field(max_length=MAX_CANDIDATES)] = []

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"upsert": [{"item_id": 12, "category": 3}], "delete": [7]}]}
    )


class RecommendedItem(BaseModel):
    """An item with what led to its place."""

    item_id: Id
    category: int
    score: float
    retrieval_score: float
    probabilities: dict[str, float]
    explored: bool


class Move(BaseModel):
    """A rule moved an item; places count from 1."""

    item_id: Id
    before: int
    after: int


class RuleEffect(BaseModel):
    """What a rule did."""

    rule: str
    removed: list[Id]
    moved: list[Move]


class KnownEvent(BaseModel):
    """An event of the history, as the recommender read it; the category of an item outside the catalogue is 0."""

    item_id: Id
    category: int
    actions: list[str]


class Retrieved(BaseModel):
    """A candidate as retrieval found it."""

    item_id: Id
    category: int
    retrieval_score: float


class RecommendAnswer(BaseModel):
    """Recommendations, best first."""

    items: list[RecommendedItem]
    version: str
    history_length: int
    unknown_items: list[Id]
    effects: list[RuleEffect]
    milliseconds: dict[str, float]
    history: list[KnownEvent] = Field(default=[], description="With explain alone: the latest events, oldest first.")
    retrieved: list[Retrieved] = Field(default=[], description="With explain alone: the first k of retrieval.")


class ScoreAnswer(BaseModel):
    """The items in the order given."""

    items: list[RecommendedItem]
    version: str
    milliseconds: dict[str, float]


class ObserveAnswer(BaseModel):
    """The user's state after the events."""

    version: str
    history_length: int
    unknown_items: list[Id]


class ItemsAnswer(BaseModel):
    """The catalogue after the changes."""

    version: str
    catalogue_size: int


class CatalogueItem(BaseModel):
    """An item that can be recommended."""

    item_id: Id
    category: int


class CatalogueAnswer(BaseModel):
    """What the recommender knows."""

    version: str
    actions: list[str]
    categories: list[str]
    catalogue_size: int
    users: list[Id]
    items: list[CatalogueItem]
    user_ids_are_text: bool
    item_ids_are_text: bool
    rules: dict[str, Any]
    ranked: bool


class Curve(BaseModel):
    """A metric over the steps of a stage; a value that is not defined is null."""

    stage: str
    metric: str
    steps: list[int]
    values: list[float | None]


class RunAnswer(BaseModel):
    """What the run left of which the recommender is a part."""

    name: str
    curves: list[Curve]
    results: dict[str, Any] | None


class VersionAnswer(BaseModel):
    """What answers."""

    recommender: str
    package: str
    loaded_at: str


class Status(BaseModel):
    """Of the server."""

    status: str


class ErrorDetail(BaseModel):
    """What is wrong."""

    field: str | None
    message: str
    request_id: str


class ErrorAnswer(BaseModel):
    """An answer that tells what is wrong."""

    error: ErrorDetail
