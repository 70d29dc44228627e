"""Users' states: what both stages keep of a user, in constant size. They begin with a profile, take in events, and score candidates.

A state is a list of arrays with one user each, so that those of any users are put together into a batch. Batches are padded to a few
sizes and events to two lengths: what serving needs is compiled once, by `warm`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tenrec_jax.artifact import Artifact, Model
from tenrec_jax.data.interactions import RawId
from tenrec_jax.known_ids import KnownIds
from tenrec_jax.models.compiled import item_vectors
from tenrec_jax.models.features import FeatureConfig
from tenrec_jax.models.hashing import TableConfig, hash_rows
from tenrec_jax.parameters import assembled, named
from tenrec_jax.timeline import Events, Profile
from tenrec_jax.training.id_spaces import HASHED, ITEM, USER

BATCH_SIZES = (1, 4, 16, 64)
# The share of a batch that is worth its padding.
FULL = 0.75
# Events that one call takes in, the rest of which is padding: an observation or two, or a stretch of a history.
FEW, MANY = 8, 64
# Items for which a hashed table gets room when the first one is added.
ROOM = 1024

State = list[np.ndarray]


class UserEvents(NamedTuple):
    """Events of one user, in order.

    Attributes:
        item: dense ids, int32 [S]; 0 where the catalogue holds no such item.
        action: labels, int8 [S, A].
        unknown: raw ids, objects [S], of the items that the catalogue does not hold; None elsewhere.
    """

    item: np.ndarray
    action: np.ndarray
    unknown: np.ndarray

    @classmethod
    def of_log(cls, item: np.ndarray, action: np.ndarray) -> "UserEvents":
        """Events whose items are all known."""
        return cls(item, action, np.full(len(item), None, object))

    @property
    def unknown_items(self) -> tuple[RawId, ...]:
        """The raw ids of the items that the catalogue does not hold."""
        return tuple(raw for raw in self.unknown if raw is not None)

    def then(self, later: "UserEvents") -> "UserEvents":
        """These, and later ones."""
        return UserEvents(*(np.concatenate(pair) for pair in zip(self, later, strict=True)))

    def part(self, rows: slice) -> "UserEvents":
        """Some of them."""
        return UserEvents(*(field[rows] for field in self))


class UserStates:
    """Computes with both stages' models; `known` numbers the items and users."""

    def __init__(self, loaded: Artifact, known: KnownIds) -> None:
        self._known, self._catalogue = known, loaded.catalogue
        self._max_length, self._actions = loaded.max_length, len(loaded.actions)
        identity = loaded.identity
        self._stages = [_Stage(loaded.retrieval, identity.retrieval.features, known)]
        if loaded.ranking is not None and identity.ranking is not None:
            self._stages.append(_Stage(loaded.ranking, identity.ranking.features, known))
        encoders = [config.encoder for config in (identity.retrieval, identity.ranking) if config is not None]
        self.is_bounded = any(encoder.attention == "softmax" for encoder in encoders) or any(
            stage.features.positions == "learned" for stage in self._stages
        )
        self._few, self._many = min(FEW, self._max_length), min(MANY, self._max_length)
        one = self._start(np.zeros(1, np.int32))
        self._structure = jax.tree.structure(one)
        # Memories lead with the layer, all else with the user.
        self._axes = [
            int("memory" in jax.tree_util.keystr(path)) for path, _ in jax.tree_util.tree_leaves_with_path(one)
        ]

    @property
    def is_ranked(self) -> bool:
        """Whether there is a ranker."""
        return len(self._stages) > 1

    def start(self, users: Sequence[int]) -> list[State]:
        """The states of dense users before their first event."""
        return [state for part in _parts(users) for state in self._started(part)]

    def extend(self, states: Sequence[State], events: Sequence[UserEvents]) -> list[State]:
        """The states after further events of each user."""
        pairs = list(zip(states, events, strict=True))
        return [state for part in _parts(pairs) for state in self._extended(*_columns(part))]

    def queries(self, states: Sequence[State]) -> np.ndarray:
        """What retrieval searches with, [B, D]."""
        return np.concatenate([jax.tree.unflatten(self._structure, state)[0].query_BD for state in states])

    def probabilities(self, states: Sequence[State], items: Sequence[np.ndarray], width: int) -> list[np.ndarray]:
        """Of each action, [C, A] a user, on the user's candidates [C], dense ids of which there are at most `width`."""
        pairs = list(zip(states, items, strict=True))
        return [found for part in _parts(pairs) for found in self._scored(*_columns(part), width)]

    def item_vectors(self, item_N: np.ndarray) -> np.ndarray:
        """The vectors [N, D] of dense items by which retrieval finds them."""
        stage, size = self._stages[0], len(item_N)
        padded = np.pad(item_N, (0, power_of_two(size) - size))
        known, category = stage.items(padded), self._known.category_N[padded]
        return np.asarray(item_vectors(stage.graphdef, stage.parameters, known, category))[:size]

    def items_changed(self) -> None:
        """Take note of items that were added."""
        for stage in self._stages:
            stage.add_rows()

    def warm(self, batch_sizes: Sequence[int], width: int) -> None:
        """Compile what serving batches of these sizes needs, with `width` candidates."""
        for size in batch_sizes:
            states = self._started([0] * size)
            for length in (self._few, self._many):
                item, action = np.zeros(length, np.int32), np.zeros((length, self._actions), np.int8)
                states = self._extended(states, [UserEvents.of_log(item, action)] * size)
            if self.is_ranked:
                self._scored(states, [np.zeros(width, np.int32)] * size, width)

    def _started(self, users: Sequence[int]) -> list[State]:
        user_B = np.asarray([*users, *[0] * (_batch_size(len(users)) - len(users))], np.int32)
        return self._separate(self._start(user_B), len(users))

    def _start(self, user_B: np.ndarray) -> list[Any]:
        gender, age = self._catalogue.gender[user_B], self._catalogue.age[user_B]
        return [
            _start(stage.graphdef, stage.structure, stage.leaves, Profile(stage.users(user_B), gender, age))
            for stage in self._stages
        ]

    def _extended(self, states: list[State], events: list[UserEvents]) -> list[State]:
        both = self._together(states)
        longest, begin = max(len(each.item) for each in events), 0
        while begin < longest:
            length = self._few if longest - begin <= self._few else self._many
            part = [each.part(slice(begin, begin + length)) for each in events]
            both = [self._extend(stage, state, part, length) for stage, state in zip(self._stages, both, strict=True)]
            begin += length
        return self._separate(both, len(states))

    def _extend(self, stage: "_Stage", state: Any, events: list[UserEvents], length: int) -> Any:
        rows = _batch_size(len(events))
        item_BS = np.zeros((rows, length), np.int32)
        action_BSA, mask_BS = np.zeros((rows, length, self._actions), np.int8), np.zeros((rows, length), bool)
        for row, each in enumerate(events):
            item_BS[row, : len(each.item)], action_BSA[row, : len(each.item)] = each.item, each.action
            mask_BS[row, : len(each.item)] = True
        model_item_BS, rows_Sk = stage.reading(item_BS, [each.unknown for each in events])
        read = Events(model_item_BS, self._known.category_N[item_BS], action_BSA, mask_BS)
        return _extend(stage.graphdef, stage.structure, stage.leaves, rows_Sk, state, read)

    def _scored(self, states: list[State], items: list[np.ndarray], width: int) -> list[np.ndarray]:
        stage, both = self._stages[1], self._together(states)
        item_BC = np.zeros((_batch_size(len(items)), width), np.int32)
        for row, item_C in enumerate(items):
            item_BC[row, : len(item_C)] = item_C
        known, category = stage.items(item_BC), self._known.category_N[item_BC]
        found = np.asarray(_probabilities(stage.graphdef, stage.structure, stage.leaves, both[1], known, category))
        return [found[row, : len(item_C)] for row, item_C in enumerate(items)]

    def _together(self, states: list[State]) -> Any:
        """One batch, padded by the first of them."""
        padded = [*states, *[states[0]] * (_batch_size(len(states)) - len(states))]
        leaves = [np.concatenate(parts, axis=axis) for axis, *parts in zip(self._axes, *padded, strict=True)]
        return jax.tree.unflatten(self._structure, leaves)

    def _separate(self, both: Any, size: int) -> list[State]:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(both)]
        return [
            # Copies: a view would keep the whole batch.
            [leaf.take([row], axis) for leaf, axis in zip(leaves, self._axes, strict=True)]
            for row in range(size)
        ]


class _Stage:
    """A stage's model, and the ids by which it knows items and users.

    Items that training rows do not mention are unknown to exact tables. Hashed ones have rows of every raw id: those of items that were
    added, in a table with room for more, and of items that come with a request, which are numbered behind it by their place.
    """

    def __init__(self, model: Model, features: FeatureConfig, known: KnownIds) -> None:
        self.graphdef, self.parameters, self.features, self._known = *model, features, known
        self._table = features.hashed_tables.get(ITEM)
        self._first_added = self._room = len(known.item_id)
        self._flatten()

    def items(self, item: np.ndarray) -> np.ndarray:
        """The model's ids of dense items."""
        return self._known.trained_item_N[item] if self._table is None else item

    def users(self, user: np.ndarray) -> np.ndarray:
        """The model's ids of dense users."""
        return user if USER in self.features.hashed_tables else self._known.trained_user[user]

    def reading(self, item_BS: np.ndarray, unknown: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """The model's ids of events' items, and the rows [B * S, k] to put behind its table for those that are outside the catalogue."""
        if self._table is None:
            return self.items(item_BS), None
        rows_BSk = np.tile(self._table.unknown_k, (*item_BS.shape, 1))
        known_BS = item_BS.copy()
        for row, raw in enumerate(unknown):
            places = np.flatnonzero([each is not None for each in raw])
            rows_BSk[row, places] = _hashed_rows(raw[places], self._table, is_text=self._known.items_are_text)
            known_BS[row, places] = self._room + row * item_BS.shape[1] + places
        return known_BS, rows_BSk.reshape(-1, rows_BSk.shape[-1])

    def add_rows(self) -> None:
        """Give rows to the items that were added; where there is no room, twice as much is made, which compiles the model anew."""
        if self._table is None:
            return
        size = len(self._known.item_id)
        while self._room < size:
            self._room += max(ROOM, self._room - self._first_added)
        leaves, (_, name) = named(self.parameters), HASHED[ITEM]
        rows_k = np.tile(self._table.unknown_k, (self._room, 1))
        rows_k[: self._first_added] = leaves[name][: self._first_added]
        added = self._known.item_id[self._first_added :]
        rows_k[self._first_added : size] = _hashed_rows(added, self._table, is_text=self._known.items_are_text)
        self.parameters = assembled(self.parameters, leaves | {name: jnp.asarray(rows_k)})
        self._flatten()

    def _flatten(self) -> None:
        # JAX reads a list of arrays far faster than an `nnx.State`.
        self.leaves, self.structure = jax.tree.flatten(self.parameters)


def _hashed_rows(raw: np.ndarray, table: TableConfig, *, is_text: bool) -> np.ndarray:
    """The rows [S, k] of raw ids. Integers of more than 64 bits, which no log holds, are unknown."""
    if is_text:
        return hash_rows(np.asarray(raw, object), table)
    fits_S = np.array([-(2**63) <= int(entry) < 2**63 for entry in raw], bool)
    fitting_S = np.array([int(entry) if fits else 0 for entry, fits in zip(raw, fits_S, strict=True)], np.int64)
    return np.where(fits_S[:, None], hash_rows(fitting_S, table), table.unknown_k)


def _parts(values: Sequence[Any]) -> list[Sequence[Any]]:
    """In batches that are full, or nearly so: what they are padded with is computed too."""
    parts, start = [], 0
    while start < len(values):
        left = len(values) - start
        size = max(size for size in BATCH_SIZES if size == 1 or left >= FULL * size)
        parts.append(values[start : start + size])
        start += size
    return parts


def _columns(pairs: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [one for one, _ in pairs], [other for _, other in pairs]


def _batch_size(size: int) -> int:
    return next(each for each in BATCH_SIZES if each >= size)


def power_of_two(size: int) -> int:
    """The smallest that is not below a size: few sizes for many, as each is compiled."""
    return 1 << max(0, size - 1).bit_length()


@jax.jit(static_argnums=(0, 1))
def _start(graphdef: nnx.GraphDef, structure: Any, leaves: list, profile: Profile) -> Any:
    return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves)).start(profile)


@jax.jit(static_argnums=(0, 1))
def _extend(
    graphdef: nnx.GraphDef, structure: Any, leaves: list, rows_Sk: jax.Array | None, state: Any, events: Events
) -> Any:
    parameters = jax.tree.unflatten(structure, leaves)
    if rows_Sk is not None:
        known, (_, name) = named(parameters), HASHED[ITEM]
        parameters = assembled(parameters, known | {name: jnp.concatenate([known[name], rows_Sk])})
    return nnx.merge(graphdef, parameters).extend(state, events)


@jax.jit(static_argnums=(0, 1))
def _probabilities(
    graphdef: nnx.GraphDef, structure: Any, leaves: list, state: Any, item_BC: jax.Array, category_BC: jax.Array
) -> jax.Array:
    model = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
    return jax.nn.sigmoid(model.score(state, item_BC, category_BC))
