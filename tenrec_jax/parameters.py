"""Parameters as a flat dict by dotted name: how they are saved, and how training tells tables from dense weights."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx


def named(parameters: nnx.State) -> dict[str, Any]:
    """The leaves of a module's parameters by name, such as `items.id.embedding`."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(parameters))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def assembled(like: nnx.State, leaves: Mapping[str, Any]) -> nnx.State:
    """The inverse of `named`: `leaves` in the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named(like)])
