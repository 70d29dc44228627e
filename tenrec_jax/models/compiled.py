"""Calls of the models as compiled functions. A module comes taken apart: each structure and each shape is compiled once, whoever calls."""

import jax
from flax import nnx
from jax import Array

from tenrec_jax.timeline import Events, Profile


@jax.jit(static_argnums=0)
def item_vectors(two_tower: nnx.GraphDef, parameters: nnx.State, item_N: Array, category_N: Array) -> Array:
    """`TwoTower.item_vectors`: [N, D]."""
    return nnx.merge(two_tower, parameters).item_vectors(item_N, category_N)


@jax.jit(static_argnums=0)
def probabilities_after(
    ranker: nnx.GraphDef, parameters: nnx.State, profile: Profile, events: Events, item_BC: Array, category_BC: Array
) -> Array:
    """Of each action on candidates, [B, C, A], after the users' events: `Ranker.score_after`."""
    return jax.nn.sigmoid(nnx.merge(ranker, parameters).score_after(profile, events, item_BC, category_BC))
