"""Both stages as one object: raw ids in, ranked raw ids out.

A user's events become a query, the index answers with candidates, items already seen are removed, and the ranker orders the rest by the
worth of the actions it expects. Without a ranker the order is retrieval's.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tenrec_jax import artifact
from tenrec_jax.data.interactions import RawId, RawIdIndex
from tenrec_jax.errors import UserError
from tenrec_jax.models.compiled import item_vectors, probabilities_after
from tenrec_jax.models.features import FeatureConfig
from tenrec_jax.models.hashing import TableConfig, hash_rows
from tenrec_jax.parameters import assembled, named
from tenrec_jax.timeline import Events, Profile
from tenrec_jax.training.id_spaces import HASHED, ITEM, USER


@dataclass(frozen=True)
class RecommendedItem:
    """One recommendation.

    Attributes:
        item_id: raw id, an integer or, where the log's ids are text, a str.
        score: what the list is ordered by: the expected worth of the actions, or the retrieval score where there is no ranker.
        retrieval_score: inner product of query and item vector.
        probabilities: of each action, by name; empty where there is no ranker.
    """

    item_id: RawId
    score: float
    retrieval_score: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Recommendations:
    """An answer.

    Attributes:
        items: best first; fewer than asked for where the catalogue holds no more unseen items.
        version: of the recommender.
        history_length: events that were read. unknown_items: raw ids in a given history that the catalogue does not hold.
        seen_removed: candidates left out because the user has seen them.
        milliseconds: by stage ("query", "search", "rank", "total"). The first call of a shape compiles it.
    """

    items: tuple[RecommendedItem, ...]
    version: str
    history_length: int
    unknown_items: tuple[RawId, ...]
    seen_removed: int
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class _User:
    """Dense ids of a user and of the user's events."""

    user: int
    item: np.ndarray
    action: np.ndarray
    unknown_items: tuple[RawId, ...]


class Recommender:
    """Serves a recommender folder. Make one with `Recommender.load`."""

    def __init__(self, loaded: artifact.Artifact) -> None:
        self._artifact = loaded
        self._lengths = np.asarray(_padded_lengths(loaded.max_length))
        catalogue = loaded.catalogue
        self._users, self._items = RawIdIndex(catalogue.user_id), RawIdIndex(catalogue.item_id)

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
    def user_ids(self) -> np.ndarray:
        """Raw ids of the users in the log, int64 or str objects [U]."""
        return self._artifact.catalogue.user_id[1:]

    @property
    def catalogue_size(self) -> int:
        """Number of items that can be recommended: those that training rows mention."""
        return self._artifact.index.size

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
            UserError: neither or both of user_id and history, an unknown user, k below 1, or an id of another type than the log's.
        """
        began = time.perf_counter()
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise UserError(f"k is {k!r}; it must be an integer of at least 1.")
        user = self._user(user_id, history)
        query_BD = self._query(user)
        queried = time.perf_counter()
        seen = np.unique(user.item) if exclude_seen else np.zeros(0, np.int32)
        score_C, item_C, removed = self._artifact.index.search_unseen(
            query_BD, seen, max(int(k), self._artifact.serving.candidates)
        )
        searched = time.perf_counter()
        items = self._rank(user, item_C, score_C)[:k]
        ranked = time.perf_counter()
        seconds = {
            "query": queried - began, "search": searched - queried, "rank": ranked - searched, "total": ranked - began
        }  # fmt: skip
        return Recommendations(
            items=tuple(items),
            version=self.version,
            history_length=len(user.item),
            unknown_items=user.unknown_items,
            seen_removed=removed,
            milliseconds={name: 1e3 * value for name, value in seconds.items()},
        )

    def score(
        self,
        items: Sequence[RawId],
        *,
        user_id: RawId | None = None,
        history: Sequence[RawId] | None = None,
    ) -> tuple[RecommendedItem, ...]:
        """Score given items, in the order given; each score is a function of the user and that item alone.

        Args:
            items: raw ids of the catalogue, at least one.
            user_id, history: as for `recommend`.

        Raises:
            UserError: as `recommend` does, and for an item that the catalogue does not hold.
        """
        user = self._user(user_id, history)
        item_C = self._items.dense(np.asarray(self._raw_items(items, "items"), object))
        if not len(item_C):
            raise UserError("There are no items to score.")
        if not item_C.all():
            unknown = [raw for raw, dense in zip(items, item_C, strict=True) if dense == 0]
            raise UserError(f"Not in the catalogue: {', '.join(map(str, unknown))}.")
        catalogue, features = self._artifact.catalogue, self._artifact.identity.retrieval.features
        model_item_C = self._model_items(item_C, features)
        vector_CD = np.asarray(item_vectors(*self._artifact.retrieval, model_item_C, catalogue.category[item_C]))
        ranked = self._rank(user, item_C, vector_CD @ self._query(user)[0])
        by_item = {item.item_id: item for item in ranked}
        return tuple(by_item[raw] for raw in catalogue.item_id[item_C].tolist())

    @property
    def ids_are_text(self) -> tuple[bool, bool]:
        """Whether user ids and item ids are text rather than integers."""
        return self._artifact.catalogue.user_id.dtype == object, self._artifact.catalogue.item_id.dtype == object

    def _user(self, user_id: RawId | None, history: Sequence[RawId] | None) -> _User:
        if (user_id is None) == (history is None):
            raise UserError("Give either a user_id or a history, not both and not neither.")
        return self._known_user(user_id) if history is None else self._new_user(history)

    def _known_user(self, user_id: RawId | None) -> _User:
        catalogue = self._artifact.catalogue
        user = int(self._users.dense(_raw_id(user_id, "user_id", is_text=self.ids_are_text[0])))
        if user == 0:
            raise UserError(f"User {user_id} is not in the log. Give a history to recommend to somebody new.")
        rows = slice(catalogue.offsets[user], catalogue.offsets[user + 1])
        return _User(user, catalogue.item[rows], catalogue.action[rows], ())

    def _new_user(self, history: Sequence[RawId]) -> _User:
        raw = self._raw_items(history, "history")
        item = self._items.dense(np.asarray(raw, object))
        action = np.zeros((len(item), len(self._artifact.actions)), np.int8)
        action[:, 0] = 1
        return _User(0, item, action, tuple(entry for entry, dense in zip(raw, item, strict=True) if dense == 0))

    def _raw_items(self, items: Sequence[RawId], name: str) -> list[RawId]:
        is_text = self.ids_are_text[1]
        return [_raw_id(item, f"{name}[{i}]", is_text=is_text) for i, item in enumerate(items)]

    def _query(self, user: _User) -> np.ndarray:
        retrieval = self._artifact.retrieval
        inputs = self._inputs(user, retrieval.parameters, self._artifact.identity.retrieval.features)
        return np.asarray(_query(retrieval.graphdef, *inputs))

    def _model_items(self, item: np.ndarray, features: FeatureConfig) -> np.ndarray:
        """Ids of catalogue items to a model: those that training rows mention keep theirs, hashed tables know all."""
        return item if ITEM in features.hashed_tables else self._artifact.catalogue.trained_item[item]

    def _inputs(self, user: _User, parameters: nnx.State, features: FeatureConfig) -> tuple[nnx.State, Profile, Events]:
        """What a stage reads of a user. Items outside the catalogue are unknown to it, or have rows by their hashes."""
        catalogue, hashed, longest = self._artifact.catalogue, features.hashed_tables, self._artifact.max_length
        item, action = user.item[-longest:], user.action[-longest:]
        padding = int(self._lengths[np.searchsorted(self._lengths, len(item))]) - len(item)
        one = np.asarray([user.user])
        known = self._model_items(item, features)
        outside = np.flatnonzero(item == 0)
        if ITEM in hashed and len(outside):
            rows_Sk = np.tile(hashed[ITEM].unknown_k, (len(item) + padding, 1))
            rows_Sk[outside] = self._hashed_rows(user.unknown_items[-len(outside) :], hashed[ITEM])
            # Numbered behind the catalogue, by their place in the history: one shape for all histories of a padded length.
            known = np.where(item == 0, len(catalogue.item_id) + np.arange(len(item), dtype=np.int32), item)
            parameters = _with_rows(parameters, rows_Sk)
        events = Events(
            item=np.pad(known, (0, padding))[None],
            category=np.pad(catalogue.category[item], (0, padding))[None],
            action=np.pad(action, ((0, padding), (0, 0)))[None],
            mask=np.pad(np.ones(len(item), bool), (0, padding))[None],
        )
        user_1 = one if USER in hashed else catalogue.trained_user[one]
        return parameters, Profile(user_1, catalogue.gender[one], catalogue.age[one]), events

    def _hashed_rows(self, raw: Sequence[RawId], table: TableConfig) -> np.ndarray:
        """The rows [S, k] of ids outside the catalogue. Integers of more than 64 bits, which no log holds, are unknown."""
        if self.ids_are_text[1]:
            return hash_rows(np.asarray(raw, object), table)
        fits_S = np.array([-(2**63) <= int(entry) < 2**63 for entry in raw])
        fitting_S = np.array([int(entry) if fits else 0 for entry, fits in zip(raw, fits_S, strict=True)], np.int64)
        return np.where(fits_S[:, None], hash_rows(fitting_S, table), table.unknown_k)

    def _rank(self, user: _User, item_C: np.ndarray, score_C: np.ndarray) -> list[RecommendedItem]:
        catalogue, ranking, config = self._artifact.catalogue, self._artifact.ranking, self._artifact.identity.ranking
        raw_C = catalogue.item_id[item_C].tolist()
        if ranking is None or config is None or not len(item_C):
            return [RecommendedItem(i, float(s), float(s), {}) for i, s in zip(raw_C, score_C, strict=True)]
        padding = (1 << (len(item_C) - 1).bit_length()) - len(item_C)
        padded_1C = np.pad(item_C, (0, padding))[None]
        probability_CA = np.asarray(
            probabilities_after(
                ranking.graphdef,
                *self._inputs(user, ranking.parameters, config.features),
                self._model_items(padded_1C, config.features),
                catalogue.category[padded_1C],
            )
        )[0, : len(item_C)]
        worth_C = probability_CA @ np.asarray(self._artifact.serving.action_values[: probability_CA.shape[1]])
        return [
            RecommendedItem(
                raw_C[i],
                float(worth_C[i]),
                float(score_C[i]),
                dict(zip(self._artifact.actions, map(float, probability_CA[i]), strict=True)),
            )
            for i in np.argsort(-worth_C, kind="stable")
        ]


def _raw_id(value: object, name: str, *, is_text: bool) -> RawId:
    if is_text:
        if not isinstance(value, str):
            raise UserError(f"{name} is {value!r}; the ids of this log are text.")
        return value
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"{name} is {value!r}; ids are integers.")
    return int(value)


def _padded_lengths(max_length: int, smallest: int = 32) -> tuple[int, ...]:
    """Lengths to which a history is padded: powers of two up to `max_length`. Each costs one compilation."""
    return (*(smallest << i for i in range(32) if smallest << i < max_length), max_length)


def _with_rows(parameters: nnx.State, rows_Sk: np.ndarray) -> nnx.State:
    """Parameters of a model that knows some more items, behind its own, by these rows of its hashed table."""
    leaves, (_, name) = named(parameters), HASHED[ITEM]
    return assembled(parameters, leaves | {name: jnp.concatenate([leaves[name], rows_Sk])})


@jax.jit(static_argnums=0)
def _query(graphdef: nnx.GraphDef, parameters: nnx.State, profile: Profile, events: Events) -> jax.Array:
    model = nnx.merge(graphdef, parameters)
    return model.extend(model.start(profile), events).query_BD
