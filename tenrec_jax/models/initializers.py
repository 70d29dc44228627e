"""Initial values of embedding tables."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

# Numbers that are drawn at once: on CPU drawing takes six times their memory beside them.
DRAWN_TOGETHER = 2**25


def normal_table(standard_deviation: float, drawn_together: int = DRAWN_TOGETHER) -> nnx.Initializer:
    """`nnx.initializers.normal`, for tables of any size [N, D]: of a large one, a few columns at a time are drawn into their place.

    Columns, since the rows may be divided over devices, each of which then draws its own.
    """
    normal = nnx.initializers.normal(standard_deviation)

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, *_: Any) -> Array:
        rows, width = shape
        columns = max(1, drawn_together // rows)
        if columns >= width:
            return normal(key, shape, dtype)

        def draw(turn: Array, table_ND: Array) -> Array:
            # The last columns end with the table's: some of them are drawn again.
            first = jnp.minimum(turn * columns, width - columns)
            drawn = normal(jax.random.fold_in(key, turn), (rows, columns), dtype)
            return jax.lax.dynamic_update_slice(table_ND, drawn, (0, first))

        return jax.lax.fori_loop(0, -(-width // columns), draw, jnp.zeros(shape, dtype))

    return init
