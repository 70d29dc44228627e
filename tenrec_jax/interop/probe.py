"""Stored inputs with the outputs that the models gave here, layer by layer: what another machine checks itself against.

Names of a recommender's probe: `inputs/...` as in `Inputs`; `retrieval/layer_00`, ... the user tower's blocks on the events,
`retrieval/query` and `retrieval/scores` of the candidates; `ranking/layer_00`, ... the ranker's blocks on the candidates, `ranking/logits`
and `ranking/scores`, the expected worth that orders a list.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from tenrec_jax.artifact import Artifact
from tenrec_jax.models.blocks import Encoder, EncoderState, places_of
from tenrec_jax.models.features import event_tokens
from tenrec_jax.models.ranker import Ranker
from tenrec_jax.models.two_tower import TwoTower
from tenrec_jax.timeline import Events, Profile

USERS, LONGEST, CANDIDATES = 4, 64, 64


class Inputs(NamedTuple):
    """Users [B], their events [B, T], the ids that the models read, and candidates [B, C]."""

    user: Any
    gender: Any
    age: Any
    item: Any
    category: Any
    action: Any
    mask: Any
    candidate_item: Any
    candidate_category: Any

    @property
    def profile(self) -> Profile:
        """The users."""
        return Profile(self.user, self.gender, self.age)

    @property
    def events(self) -> Events:
        """Their events."""
        return Events(self.item, self.category, self.action, self.mask)


def draw(loaded: Artifact, seed: int = 0) -> Inputs:
    """Random users with histories of no event, one, half the length and all of it, and random candidates of the catalogue."""
    random = np.random.default_rng(seed)
    catalogue, length = loaded.catalogue, min(loaded.max_length, LONGEST)

    def some(ids: int, *shape: int) -> np.ndarray:
        return random.integers(0, ids, shape, dtype=np.int32)

    user = some(len(catalogue.user_id), USERS)
    item, candidate = (some(len(catalogue.item_id), USERS, n) for n in (length, CANDIDATES))
    real = np.array([[0], [1], [length // 2], [length]])
    return Inputs(
        catalogue.trained_user[user],
        catalogue.gender[user],
        catalogue.age[user],
        catalogue.trained_item[item],
        catalogue.category[item],
        (random.random((USERS, length, len(loaded.actions))) < 0.3).astype(np.int8),
        np.arange(length) < real,
        catalogue.trained_item[candidate],
        catalogue.category[candidate],
    )


def outputs(loaded: Artifact, inputs: Inputs) -> dict[str, np.ndarray]:
    """What both models give for `inputs`, by the names above, computed in full float32 precision."""
    with jax.default_matmul_precision("highest"):
        found = _prefixed("retrieval", _retrieval(*loaded.retrieval, inputs))
        if loaded.ranking is not None:
            values_A = jnp.asarray(loaded.serving.rules.action_values.of(loaded.actions))
            found |= _prefixed("ranking", _ranking(*loaded.ranking, inputs, values_A))
    return {name: np.asarray(array) for name, array in found.items()}


def _prefixed(stage: str, found: dict[str, Array]) -> dict[str, Array]:
    return {f"{stage}/{name}": array for name, array in found.items()}


@jax.jit(static_argnums=0)
def _retrieval(graphdef: nnx.GraphDef, parameters: nnx.State, inputs: Inputs) -> dict[str, Array]:
    model: TwoTower = nnx.merge(graphdef, parameters)
    start = model.start(inputs.profile)
    query_BD = model.extend(start, inputs.events).query_BD
    vector_BCD = model.item_vectors(inputs.candidate_item, inputs.candidate_category)
    layers = _event_layers(model, start.encoder, inputs.events)
    return layers | {"query": query_BD, "scores": jnp.einsum("bd,bcd->bc", query_BD, vector_BCD)}


@jax.jit(static_argnums=0)
def _ranking(graphdef: nnx.GraphDef, parameters: nnx.State, inputs: Inputs, values_A: Array) -> dict[str, Array]:
    model: Ranker = nnx.merge(graphdef, parameters)
    state = model.extend(model.start(inputs.profile), inputs.events)
    logits_BCA = model.score(state, inputs.candidate_item, inputs.candidate_category)
    item_BCD = model.items(inputs.candidate_item, inputs.candidate_category)
    length_B1 = state.encoder.length_B[:, None]
    position_BC = jnp.broadcast_to(length_B1, inputs.candidate_item.shape)

    def attend(attention: Any, y: Array, memory: Any) -> Array:
        return attention.isolated(y, position_BC, memory)

    layers = _layers(model.encoder, state.encoder, model.events.candidates(item_BCD, length_B1 - 1), attend)
    return layers | {"logits": logits_BCA, "scores": jax.nn.sigmoid(logits_BCA) @ values_A}


def _event_layers(model: TwoTower, state: EncoderState, events: Events) -> dict[str, Array]:
    places = places_of(events.mask)
    places = places._replace(position=places.position + state.length_B[:, None])
    place_BT = jnp.broadcast_to(jnp.arange(events.item.shape[1]), events.item.shape)

    def attend(attention: Any, y: Array, memory: Any) -> Array:
        return attention.extend(y, places, memory)[0]

    return _layers(model.encoder, state, event_tokens(model.items, model.events, events, place_BT), attend)


def _layers(
    encoder: Encoder, state: EncoderState, x: Array, attend: Callable[[Any, Array, Any], Array]
) -> dict[str, Array]:
    """The output of every block, one after the other rather than by a scan, which shows the last one alone."""
    found = {}
    for number, (block, memory) in enumerate(blocks_of(encoder, state.memory)):
        x, _ = block(x, lambda y, block=block, memory=memory: (attend(block.attention, y, memory), None), None)
        found[layer_name(number)] = x
    return found


def layer_name(number: int) -> str:
    """What the output of a block is called in a probe."""
    return f"layer_{number:02}"


def blocks_of(encoder: Encoder, memory: Any = None) -> Iterator[tuple[Any, Any]]:
    """The encoder's blocks one by one, each with its part of a state's memory."""
    graphdef, stacked = nnx.split(encoder.blocks)
    for layer in range(encoder.config.num_layers):
        parameters, part = jax.tree.map(lambda leaf, layer=layer: leaf[layer], (stacked, memory))
        yield nnx.merge(graphdef, parameters), part
