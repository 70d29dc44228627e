"""Row-wise sparse updates of embedding tables: a step costs what its batch touches, whatever the size of the catalogue.

1. On the host `unique_ids` makes the ids of a batch unique and replaces them by their places among the unique ones.
2. `gather` reads those rows. The model looks them up by place, and the loss is differentiated with respect to them: the gradient of a
   lookup sums the duplicates, and no gradient of a table's size exists.
3. `clip_by_global_norm` clips them together with the dense gradients; each row counts once.
4. `update` changes those rows in place, if the table and its state are donated.

Decay that the dense formula applies to every row in every step (weight decay, the moving average of the parameters) would touch the whole
table. All rows are multiplied by the same number, so the number is kept instead: a table is `scale * stored`. A row read at any later
step has decayed by exactly the product of the steps between, under any schedule, and nothing is kept per row. `current_table` and
`average_table` multiply it out for whoever reads a whole table; without weight decay the stored table is the table.

A device may hold a stretch of the rows alone, with their part of the state: given `ids_P` less the number of its first row, `gather` and
`update` read zeros for, and do not change, what lies before and behind it.

Arrays: P unique ids of a batch, N rows of a table, D its width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tenrec_jax.settings import InnerShare, NonNegative, Settings

# Below this, decay is multiplied into the arrays: a pass over all rows, and a rare one.
SMALLEST_SCALE = 2.0**-60
SETTLED_TOGETHER = 4096
# Marking ids in an array over all rows beats sorting them as long as the rows are no more than this many times the ids.
ROWS_PER_ID_FOR_MARKS = 100
# What holds of the ids of a step; those below 0 are rows of another device, not the last ones of this.
_PLACES: Any = {"unique_indices": True, "indices_are_sorted": True, "wrap_negative_indices": False}


class UniqueIds(NamedTuple):
    """The ids of a batch, each once.

    Attributes:
        ids_P: int32, strictly increasing: 0, the others, and padding with numbers of no row (N, N + 1, ...).
        places: int32 arrays of the shapes given, `ids_P[places] == ids`; place 0 is id 0.
    """

    ids_P: np.ndarray
    places: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class TableOptimizerConfig(Settings):
    """How the rows of tables learn.

    Row-wise Adagrad keeps one number a row. With `g` the row's gradient in this step, at learning rate `r`:

        accumulator += mean_D(g ** 2)
        row -= r * g / (sqrt(accumulator) + eps)

    It is Adagrad (Duchi, Hazan and Singer, 2011) with the squares averaged over the row (Mudigere et al., 2022, arXiv:2104.05158;
    FBGEMM's rowwise_adagrad). A row's rate falls with what it has learned, not with the steps that others took.

    Lazy Adam is Adam (Kingma and Ba, 2015) on the rows of the batch; at step `t`, counted from 1 over all batches:

        mean = b1 * mean + (1 - b1) * g;    square = b2 * square + (1 - b2) * g ** 2
        row -= r * (mean / (1 - b1 ** t)) / (sqrt(square / (1 - b2 ** t)) + eps)

    Rows outside the batch keep their moments and stay where they are, as with `torch.optim.SparseAdam` (which adds `eps` before the
    bias correction). It is not dense Adam, where the moments of an untouched row decay and go on moving it.

    A row of the batch with a gradient of zero, such as id 0 in a batch without unknown ids, stays as it is under row-wise Adagrad; lazy
    Adam treats it as Adam does. Both equal their dense formula on a batch that touches every row.

    Attributes:
        kind: "rowwise_adagrad" or "lazy_adam".
        eps: added to the denominator.
        initial_accumulator: row-wise Adagrad's, at the start.
        b1, b2: lazy Adam's, above 0 and below 1.
        weight_decay: decoupled (Loshchilov and Hutter, 2019): every row, touched or not, is multiplied by `1 - r * weight_decay` in every
            step. `r * weight_decay` must stay below 1.
    """

    kind: Literal["rowwise_adagrad", "lazy_adam"] = "rowwise_adagrad"
    eps: NonNegative = 1e-8
    initial_accumulator: NonNegative = 0.0
    b1: InnerShare = 0.9
    b2: InnerShare = 0.98
    weight_decay: NonNegative = 0.0


class AdagradMoments(NamedTuple):
    """Row-wise Adagrad's state: the sum of mean squared gradients, float32 [N]."""

    accumulator_N: jax.Array


class AdamMoments(NamedTuple):
    """Lazy Adam's state: moving averages of the gradient and, beside it, of its square, float32 [N, 2 D].

    In one array, since reading a row anywhere in a large array costs more than reading a longer one.
    """

    mean_and_square_N: jax.Array


class Scale(NamedTuple):
    """A product of factors just below 1. The number is `value - error`: alone, float32 would round such factors away."""

    value: jax.Array
    error: jax.Array


class Average(NamedTuple):
    """A moving average of a table: `weight * lag_ND + share * stored`."""

    lag_ND: jax.Array
    weight: Scale
    share: jax.Array


class TableState(NamedTuple):
    """What a table's updates remember. The table is `scale * stored`, where `stored` is the array that `update` changes."""

    moments: AdagradMoments | AdamMoments
    scale: Scale
    average: Average | None


def unique_ids(ids: Sequence[np.ndarray], num_rows: int, *, multiple_of: int = 2048) -> UniqueIds:
    """Make the ids of a batch unique, on the host.

    Args:
        ids: integer arrays of any shape, all of one id space.
        num_rows: rows N of the tables, entry 0 included.
        multiple_of: the number P of unique ids is padded to a multiple of this, since every P is compiled for anew.

    Returns:
        The unique ids, 0 always among them, and for each array the places of its ids.

    Raises:
        ValueError: an id is no row: JAX would read or drop it silently.
    """
    flat = np.concatenate([np.zeros(1, np.int32), *(np.asarray(array).ravel() for array in ids)])
    if flat.dtype.kind not in "iu":
        raise ValueError(f"ids must be integers, got {[str(np.asarray(array).dtype) for array in ids]}")
    low, high = flat.min(), flat.max()
    if low < 0 or high >= num_rows:
        bad = low if low < 0 else high
        where = next(i for i, array in enumerate(ids) if (np.asarray(array) == bad).any())
        raise ValueError(f"id {bad} in array {where} of {len(ids)}: the tables have rows 0 to {num_rows - 1}")
    if num_rows <= ROWS_PER_ID_FOR_MARKS * len(flat):
        marked_N = np.zeros(num_rows, bool)
        marked_N[flat] = True
        unique = np.flatnonzero(marked_N)
        place_N = np.empty(num_rows, np.int32)
        place_N[unique] = np.arange(len(unique), dtype=np.int32)
        places = place_N[flat]
    else:
        unique, places = np.unique(flat, return_inverse=True)
    padding = -len(unique) % multiple_of
    ids_P = np.concatenate([unique, np.arange(num_rows, num_rows + padding)]).astype(np.int32)
    ends = np.cumsum([np.size(array) for array in ids])[:-1]
    pieces = np.split(places[1:].astype(np.int32), ends)
    return UniqueIds(ids_P, tuple(piece.reshape(np.shape(array)) for piece, array in zip(pieces, ids, strict=True)))


def init(config: TableOptimizerConfig, table_ND: jax.Array, *, average: bool = False) -> TableState:
    """The state of a table that has not been updated; with `average`, a moving average that starts at the table."""
    moments: AdagradMoments | AdamMoments
    if config.kind == "rowwise_adagrad":
        moments = AdagradMoments(jnp.full(table_ND.shape[0], config.initial_accumulator, jnp.float32))
    else:
        moments = AdamMoments(jnp.zeros((table_ND.shape[0], 2 * table_ND.shape[1])))
    lagged = Average(jnp.zeros(table_ND.shape), _one(), jnp.ones(())) if average else None
    return TableState(moments, _one(), lagged)


def gather(table_ND: jax.Array, state: TableState, ids_P: jax.Array) -> jax.Array:
    """The rows of `ids_P`, [P, D]; those of padding, and of other devices, are zero."""
    return _get(table_ND, ids_P) * state.scale.value


def clip_by_global_norm(gradients: Any, limit: float) -> tuple[Any, jax.Array]:
    """Scale gradients down to a norm of at most `limit` (Pascanu, Mikolov and Bengio, 2013).

    Args:
        gradients: any tree, the dense gradients and those of gathered rows together. A row's gradient is the sum over its occurrences
            and devices, so each row counts once and the norm is that of the dense gradient, which is zero elsewhere.
        limit: above 0.

    Returns:
        The gradients, and their norm before.
    """
    norm = optax.tree.norm(gradients)
    factor = jnp.where(norm > limit, limit / norm, 1.0)
    return jax.tree.map(lambda gradient: gradient * factor, gradients), norm


def update(
    config: TableOptimizerConfig,
    table_ND: jax.Array,
    state: TableState,
    ids_P: jax.Array,
    gradient_PD: jax.Array,
    learning_rate: jax.typing.ArrayLike,
    step: jax.typing.ArrayLike,
    *,
    average_decay: float = 0.0,
) -> tuple[jax.Array, TableState]:
    """One step on the rows of a batch; in place where the table and the state are donated.

    Args:
        config: the rule.
        table_ND: stored table, float32 [N, D].
        state: of the table.
        ids_P: `UniqueIds.ids_P`; padding changes nothing, nor do rows of other devices.
        gradient_PD: gradient of the loss with respect to the gathered rows, summed over devices. The same on all devices.
        learning_rate: of this step.
        step: steps before this one.
        average_decay: that of `average_decay_at`, above 0 and below 1; 0 where the state has no average.

    Returns:
        The stored table and the state after the step.

    Raises:
        ValueError: `average_decay` does not fit the state.
    """
    if (state.average is not None) != (0 < average_decay < 1):
        has = "has no average" if state.average is None else "has an average"
        raise ValueError(
            f"the state {has} and average_decay is {average_decay}: above 0 and below 1 with one, 0 without"
        )
    if config.weight_decay or state.average is not None:
        table_ND, state = _settled_if_worn(table_ND, state)
    learning_rate = jnp.asarray(learning_rate)
    moments, direction_PD = _direction(config, state.moments, ids_P, gradient_PD, jnp.asarray(step) + 1)
    scale = _shrunk(state.scale, learning_rate * config.weight_decay)
    change_PD = -learning_rate / scale.value * direction_PD
    average = state.average
    if average is not None:
        renewal = 1 - average_decay_at(average_decay, step)
        # With q the stored table, the average is weight * lag + share * q. Decay multiplies both numbers and adds (1 - decay) * scale to
        # the share, for all rows at once. A row whose q changes must take the old share of the change back out of its lag.
        average = Average(
            _add(average.lag_ND, ids_P, -average.share / average.weight.value * change_PD),
            _shrunk(average.weight, renewal),
            average.share + renewal * (scale.value - average.share),
        )
    return _add(table_ND, ids_P, change_PD), TableState(moments, scale, average)


def average_decay_at(decay: float, step: jax.typing.ArrayLike) -> jax.Array:
    """The decay of the moving average `d * average + (1 - d) * parameters` after `step` earlier steps.

        d = min(decay, (1 + step) / (10 + step))

    While it is young, an average with the full decay would be one of the initial parameters; this one is of about the last tenth of the
    steps until the full decay looks further back (as TensorFlow's ExponentialMovingAverage with `num_updates`).
    """
    step = jnp.asarray(step)
    return jnp.minimum(decay, (1 + step) / (10 + step))


def current_table(table_ND: jax.Array, state: TableState) -> jax.Array:
    """The table that a stored one stands for, every row decayed up to the last step, [N, D]."""
    return table_ND * state.scale.value


def average_table(table_ND: jax.Array, state: TableState) -> jax.Array:
    """The moving average of the table over the steps so far, [N, D]; a ValueError if the state keeps none."""
    if state.average is None:
        raise ValueError("this table's state has no average: make it with init(..., average=True)")
    return state.average.weight.value * state.average.lag_ND + state.average.share * table_ND


def _direction(
    config: TableOptimizerConfig,
    moments: AdagradMoments | AdamMoments,
    ids_P: jax.Array,
    gradient_PD: jax.Array,
    count: jax.Array,
) -> tuple[AdagradMoments | AdamMoments, jax.Array]:
    """The moments after the step, and what the learning rate multiplies [P, D]."""
    if isinstance(moments, AdagradMoments):
        accumulator_P = _get(moments.accumulator_N, ids_P) + jnp.square(gradient_PD).mean(-1)
        direction_PD = gradient_PD / (jnp.sqrt(accumulator_P) + config.eps)[:, None]
        return AdagradMoments(_set(moments.accumulator_N, ids_P, accumulator_P)), direction_PD
    mean_PD, square_PD = jnp.split(_get(moments.mean_and_square_N, ids_P), 2, axis=1)
    mean_PD = config.b1 * mean_PD + (1 - config.b1) * gradient_PD
    square_PD = config.b2 * square_PD + (1 - config.b2) * jnp.square(gradient_PD)
    # 1 - b ** t in float32 loses up to four digits of the first steps.
    mean_bias, square_bias = (-jnp.expm1(count * math.log(b)) for b in (config.b1, config.b2))
    direction_PD = mean_PD / mean_bias / (jnp.sqrt(square_PD / square_bias) + config.eps)
    both_P = jnp.concatenate([mean_PD, square_PD], axis=1)
    return AdamMoments(_set(moments.mean_and_square_N, ids_P, both_P)), direction_PD


def _get(array: jax.Array, ids_P: jax.Array) -> jax.Array:
    return array.at[ids_P].get(mode="fill", fill_value=0, **_PLACES)


def _set(array: jax.Array, ids_P: jax.Array, rows: jax.Array) -> jax.Array:
    return array.at[ids_P].set(rows, mode="drop", **_PLACES)


def _add(array: jax.Array, ids_P: jax.Array, rows: jax.Array) -> jax.Array:
    return array.at[ids_P].add(rows, mode="drop", **_PLACES)


def _one() -> Scale:
    return Scale(jnp.ones(()), jnp.zeros(()))


def _shrunk(scale: Scale, share: jax.typing.ArrayLike) -> Scale:
    """`scale * (1 - share)` by compensated summation (Kahan, 1965)."""
    change = -scale.value * share - scale.error
    value = scale.value + change
    return Scale(value, (value - scale.value) - change)


def _settled_if_worn(table_ND: jax.Array, state: TableState) -> tuple[jax.Array, TableState]:
    """The same table and average with all decay multiplied out, where the numbers kept for all rows come near to float32's limits."""
    average, scale = state.average, state.scale.value
    worn = scale < SMALLEST_SCALE
    if average is not None:
        # The share outgrows the scale where weight decay is faster than the average.
        worn |= (average.weight.value < SMALLEST_SCALE) | (average.share > 2 * scale)

    def settle(block: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        ids_P = block * SETTLED_TOGETHER + jnp.arange(SETTLED_TOGETHER)
        table_ND, *lags = arrays
        rows_PD = _get(table_ND, ids_P)
        if average is not None:
            distance_PD = average.weight.value * _get(lags[0], ids_P) + (average.share - scale) * rows_PD
            lags = [_set(lags[0], ids_P, distance_PD)]
        return _set(table_ND, ids_P, scale * rows_PD), *lags

    # A loop over no or all blocks of rows: for a conditional on whole tables the compiler keeps copies of them.
    blocks = jnp.where(worn, -(-len(table_ND) // SETTLED_TOGETHER), 0)
    arrays = (table_ND,) if average is None else (table_ND, average.lag_ND)
    table_ND, *lags = jax.lax.fori_loop(0, blocks, settle, arrays)

    def renewed(kept: Scale) -> Scale:
        return Scale(jnp.where(worn, 1.0, kept.value), jnp.where(worn, 0.0, kept.error))

    if average is not None:
        average = Average(lags[0], renewed(average.weight), jnp.where(worn, 1.0, average.share))
    return table_ND, state._replace(scale=renewed(state.scale), average=average)
