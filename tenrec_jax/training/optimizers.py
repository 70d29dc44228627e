"""How parameters move: AdamW from optax on the dense weights, row-wise updates on the tables, one schedule and one clipping for both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tenrec_jax.settings import InnerShare, Natural, NonNegative, Positive, Settings
from tenrec_jax.training import tables
from tenrec_jax.training.parallel import AXIS
from tenrec_jax.training.tables import Average, TableOptimizerConfig, TableState

Named = dict[str, jax.Array]


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW, its schedule and the tables' own rule.

    Attributes:
        learning_rate: peak rate.
        warmup_steps: steps of linear warm-up.
        schedule: "constant" after the warm-up, or "cosine" down to a hundredth of the peak.
        weight_decay: decoupled, on the matrices of dense layers.
        b2: second-moment decay of AdamW.
        clip_norm: global norm to which gradients are clipped; 0 is off. Each row of a table counts once.
        tables: the rule by which rows of tables move.
        table_learning_rate: peak rate of the tables, on the same schedule; biases of one value an action move at `learning_rate`. A small
            one keeps a small log from being learned by heart.
    """

    learning_rate: Positive = 1e-3
    warmup_steps: Natural = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: NonNegative = 0.0
    b2: InnerShare = 0.98
    clip_norm: NonNegative = 1.0
    tables: TableOptimizerConfig = field(default_factory=TableOptimizerConfig)
    table_learning_rate: NonNegative = 0.05


class TrainState(NamedTuple):
    """What a step updates.

    Attributes:
        step: steps done, int32.
        dense, tables: parameters by name. `stored` tables: see `tables.TableState`.
        optimizer: optax's state. table_states: by name.
        average: moving average of the dense weights; empty where none is kept.
    """

    step: jax.Array
    dense: Named
    tables: Named
    optimizer: optax.OptState
    table_states: dict[str, TableState]
    average: Named


class Norms(NamedTuple):
    """Global norms of a step: of the gradients before clipping, of the dense weights, and of their change."""

    gradient: jax.Array
    parameter: jax.Array
    update: jax.Array


class Optimizer:
    """Moves the parameters of a stage.

    Args:
        dense: rule of the dense weights.
        rule: rule of the tables. rates: learning rate by step of each table, by parameter name.
        spaces: id space of each table, by parameter name; the other parameters are dense.
        clip_norm: see `OptimizerConfig`.
        average_decay: parameters that are evaluated and kept are an exponential moving average with this decay a step (Polyak and
            Juditsky, 1992), less in the first steps (`tables.average_decay_at`); 0 takes the latest.
        shards: devices over which the rows of every table, and of what its updates remember, are divided; 1 has all rows on each. With n of
            them, tables are padded with rows of zeros to a multiple of n, and device d holds the d-th stretch. Then `rows` and `update`
            run within a step on n devices: every device contributes the rows that it has, and updates those alone.
        schedules: of the learning rates, by the names under which `learning_rates` tells them; what moves by them is said above.
    """

    def __init__(
        self,
        dense: optax.GradientTransformation,
        rule: TableOptimizerConfig,
        rates: Mapping[str, optax.Schedule],
        spaces: Mapping[str, str],
        *,
        clip_norm: float = 0.0,
        average_decay: float = 0.0,
        shards: int = 1,
        schedules: Mapping[str, optax.Schedule] = MappingProxyType({}),
    ) -> None:
        self._schedules = schedules
        self._dense, self._rule, self._rates, self._spaces = dense, rule, rates, spaces
        self._clip_norm, self._average_decay, self._shards = clip_norm, average_decay, shards

    @property
    def divided(self) -> TrainState:
        """Whether the rows of a leaf are divided over the devices, a prefix of the state's tree."""
        rows: Any = self._shards > 1
        no: Any = False
        average = Average(rows, no, no) if self._average_decay else None
        states = dict.fromkeys(self._spaces, TableState(rows, no, average))
        return TrainState(no, no, rows, no, states, no)

    def init(self, parameters: Named) -> TrainState:
        """The state before the first step, the rows of all devices."""
        dense = {name: leaf for name, leaf in parameters.items() if name not in self._spaces}
        stored = {
            name: jnp.pad(leaf, ((0, -len(leaf) % self._shards), (0, 0)))
            for name, leaf in parameters.items()
            if name in self._spaces
        }
        averages = self._average_decay > 0
        states = {name: tables.init(self._rule, table, average=averages) for name, table in stored.items()}
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, dense, stored, self._dense.init(dense), states, dense if averages else {})

    def rows(self, state: TrainState, ids: Mapping[str, jax.Array]) -> Named:
        """The rows of the tables that a batch names, [P, D] each; `ids` are the unique ids [P] of each space."""
        rows = {
            name: tables.gather(table, state.table_states[name], self._here(name, table, ids))
            for name, table in state.tables.items()
        }
        return jax.lax.psum(rows, AXIS) if self._shards > 1 else rows

    def update(
        self,
        state: TrainState,
        ids: Mapping[str, jax.Array],
        gradient: Named,
        row_gradient: Named,
        loss: jax.typing.ArrayLike = 0.0,
    ) -> tuple[TrainState, Norms, jax.Array]:
        """One step, in place where the state is donated.

        A step is bad if its loss, its gradient or the dense weights after it are not finite. A bad step is counted and moves nothing:
        parameters and what the rules remember stay as they are, to the bit; moving averages come nearer to them.

        Args:
            state: before it. ids: as for `rows`.
            gradient: of the dense weights. row_gradient: of the rows; both averaged over the examples of all devices.
            loss: of the step, the same on all devices.

        Returns:
            The state after it, its norms (of a bad step, some are not finite), and whether it was good.
        """
        both = gradient, row_gradient
        norm = optax.tree.norm(both)
        gradient, row_gradient = tables.clip_by_global_norm(both, self._clip_norm)[0] if self._clip_norm else both
        updates, optimizer = self._dense.update(gradient, state.optimizer, state.dense)
        dense = optax.apply_updates(state.dense, updates)
        norms = Norms(norm, optax.tree.norm(dense), optax.tree.norm(updates))
        good = jnp.isfinite(jnp.asarray(loss)) & jnp.isfinite(norms.gradient) & jnp.isfinite(norms.parameter)
        dense, optimizer = jax.tree.map(
            lambda after, before: jnp.where(good, after, before), (dense, optimizer), (state.dense, state.optimizer)
        )
        stored, states = {}, {}
        for name, table in state.tables.items():
            ids_P = self._here(name, table, ids)
            stored[name], states[name] = tables.update(
                self._rule,
                table,
                state.table_states[name],
                # A bad step names no row, and decays none.
                jnp.where(good, ids_P, len(table) + jnp.arange(len(ids_P))),
                row_gradient[name],
                jnp.where(good, self._rates[name](state.step), 0.0),
                state.step,
                average_decay=self._average_decay,
            )
        renewal = 1.0 - tables.average_decay_at(self._average_decay, state.step)
        average = optax.incremental_update(dense, state.average, renewal) if state.average else {}
        return TrainState(state.step + 1, dense, stored, optimizer, states, average), norms, good

    def learning_rates(self, step: jax.Array) -> Named:
        """The learning rates of a step, by name."""
        return {name: jnp.asarray(schedule(step)) for name, schedule in self._schedules.items()}

    def parameters(self, state: TrainState) -> Named:
        """The parameters to evaluate and to keep, whole tables with their padding. Where nothing decays they are the state's own arrays."""
        if not (self._average_decay or self._rule.weight_decay):
            return state.tables | state.dense
        whole = tables.average_table if self._average_decay else tables.current_table
        named = {name: whole(table, state.table_states[name]) for name, table in state.tables.items()}
        return named | (state.average or state.dense)

    def _here(self, name: str, table_ND: jax.Array, ids: Mapping[str, jax.Array]) -> jax.Array:
        """The ids of a table's rows, counted from the first row on this device."""
        ids_P = ids[self._spaces[name]]
        return ids_P - jax.lax.axis_index(AXIS) * len(table_ND) if self._shards > 1 else ids_P


def learning_rate_schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """Learning rate by step, for a run of `steps`."""
    if config.schedule == "cosine":
        warmup = config.warmup_steps
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), peak / 100)
    # Not optax's warmup_constant_schedule: without a warm-up that one stays at zero.
    warm_up, constant = optax.linear_schedule(0.0, peak, config.warmup_steps), optax.constant_schedule(peak)
    return optax.join_schedules([warm_up, constant], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    spaces: Mapping[str, str],
    average_decay: float = 0.0,
    *,
    shards: int = 1,
    rate_factors: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) and the tables' rule, for a run of `steps`; see `Optimizer`, and `Task` for `rate_factors`."""
    rate, table_rate = (
        learning_rate_schedule(config, steps, peak) for peak in (config.learning_rate, config.table_learning_rate)
    )
    adamw = optax.adamw(rate, b2=config.b2, weight_decay=config.weight_decay, mask=_matrices)
    dense = optax.chain(adamw, _scaled(rate_factors)) if rate_factors else adamw
    rates = {name: rate if "_bias." in name else table_rate for name in spaces}
    return Optimizer(
        dense,
        config.tables,
        rates,
        spaces,
        clip_norm=config.clip_norm,
        average_decay=average_decay,
        shards=shards,
        schedules={"learning_rate": rate, "table_learning_rate": table_rate},
    )


def _scaled(factors: Mapping[str, np.ndarray]) -> optax.GradientTransformation:
    """Updates times the factors of those that are named."""

    def scaled(updates: Named, _: Named | None = None) -> Named:
        return {name: update * factors[name] if name in factors else update for name, update in updates.items()}

    return optax.stateless(scaled)


def _matrices(parameters: Named) -> dict[str, Any]:
    return {name: name.endswith(".kernel") for name in parameters}
