"""Which slot of a packed row belongs to whom."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Slots(NamedTuple):
    """The slots of packed rows, [B, T] each. Padding at a row's end belongs to the row's last timeline.

    Attributes:
        first: True on the first slot of a timeline.
        segment: which of the row's timelines a slot belongs to, from 0.
        place: of the slot in its timeline, from 0.
    """

    first: Array
    segment: Array
    place: Array

    def own(self, x_BUD: Array) -> Array:
        """Of what the timelines of a row have one each, that of each slot's timeline: [B, U, D] to [B, T, D]."""
        return jnp.take_along_axis(x_BUD, self.segment[..., None], axis=1)


def slots_of(start_BU: Array, length: int) -> Slots:
    """The slots of rows of `length` slots whose timelines begin at `start_BU`, ascending from 0; `length` stands for none."""
    batch, slot_T = len(start_BU), jnp.arange(length)
    first_BT = jnp.zeros((batch, length), bool).at[jnp.arange(batch)[:, None], start_BU].set(True, mode="drop")
    begin_BT = jax.lax.cummax(jnp.where(first_BT, slot_T, 0), axis=1)
    return Slots(first_BT, jnp.cumsum(first_BT, axis=1, dtype=jnp.int32) - 1, slot_T - begin_BT)
