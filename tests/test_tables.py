"""Row-wise updates of tables against dense formulas in float64, optax and torch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tenrec_jax.models.initializers import normal_table
from tenrec_jax.training import tables
from tenrec_jax.training.optimizers import Optimizer, TrainState
from tenrec_jax.training.parallel import AXIS, DataParallel
from tenrec_jax.training.tables import TableOptimizerConfig, TableState, UniqueIds, unique_ids

ADAGRAD = TableOptimizerConfig("rowwise_adagrad")
ADAM = TableOptimizerConfig("lazy_adam", b2=0.999)
KINDS = [pytest.param(ADAGRAD, id="rowwise_adagrad"), pytest.param(ADAM, id="lazy_adam")]
N, D = 40, 6


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def schedule(step: int) -> float:
    """Warms up and falls, so that no two steps have the same rate."""
    return 0.05 * min(1.0, (step + 1) / 5) / (1 + step / 50)


def sparse_batch(step: int, rows: int = N) -> tuple[UniqueIds, np.ndarray]:
    """Some rows, each with a gradient; row 0 is always there, and so is padding."""
    generator = np.random.default_rng((1, step))
    unique = unique_ids([generator.integers(0, rows, 7)], rows, multiple_of=16)
    real = unique.ids_P < rows
    gradient = generator.standard_normal((len(unique.ids_P), D)) * generator.choice([0.1, 1.0, 10.0], (len(real), 1))
    return unique, (gradient * real[:, None]).astype(np.float32)


def run(
    config: TableOptimizerConfig, table: np.ndarray, batches: list[tuple[np.ndarray, np.ndarray]], **options: Any
) -> tuple[jax.Array, TableState]:
    stored, state = jnp.asarray(table), tables.init(config, jnp.asarray(table), average="average_decay" in options)
    step_fn = jax.jit(lambda *arguments: tables.update(config, *arguments, **options))
    for step, (ids_P, gradient_PD) in enumerate(batches):
        stored, state = step_fn(stored, state, ids_P, gradient_PD, schedule(step), step)
    return stored, state


class DenseReference:
    """The formulas on whole tables, in float64, as one reads them in the papers."""

    def __init__(self, config: TableOptimizerConfig, table: np.ndarray) -> None:
        self.config, self.table, self.steps = config, table.astype(np.float64), 0
        self.accumulator, self.mean, self.square = np.zeros(len(table)), np.zeros(table.shape), np.zeros(table.shape)
        self.average = self.table.copy()

    def step(self, ids_P: np.ndarray, gradient_PD: np.ndarray, rate: float, average_decay: float = 0.0) -> None:
        config, self.steps = self.config, self.steps + 1
        move = np.zeros(self.table.shape)
        for row, gradient in zip(ids_P, gradient_PD.astype(np.float64), strict=True):
            if row >= len(self.table):
                continue
            if config.kind == "rowwise_adagrad":
                self.accumulator[row] += (gradient**2).mean()
                move[row] = gradient / (np.sqrt(self.accumulator[row]) + config.eps)
            else:
                self.mean[row] = config.b1 * self.mean[row] + (1 - config.b1) * gradient
                self.square[row] = config.b2 * self.square[row] + (1 - config.b2) * gradient**2
                square = self.square[row] / (1 - config.b2**self.steps)
                move[row] = self.mean[row] / (1 - config.b1**self.steps) / (np.sqrt(square) + config.eps)
        self.table = (1 - rate * config.weight_decay) * self.table - rate * move
        decay = min(average_decay, self.steps / (self.steps + 9))
        self.average = decay * self.average + (1 - decay) * self.table


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_equals_the_dense_formula_on_batches_that_touch_every_row(
    config: TableOptimizerConfig, weight_decay: float
) -> None:
    config = TableOptimizerConfig(config.kind, b2=config.b2, weight_decay=weight_decay)
    table, everything = draw(N, D), np.arange(N, dtype=np.int32)
    batches = [(everything, draw(N, D, seed=step + 1)) for step in range(30)]
    reference = DenseReference(config, table)
    for step, batch in enumerate(batches):
        reference.step(*batch, schedule(step))
    np.testing.assert_allclose(tables.current_table(*run(config, table, batches)), reference.table, atol=2e-6)


def test_lazy_adam_equals_optax_adamw_on_batches_that_touch_every_row() -> None:
    config = TableOptimizerConfig("lazy_adam", b2=0.98, weight_decay=0.1)
    table, everything = draw(N, D), np.arange(N, dtype=np.int32)
    batches = [(everything, draw(N, D, seed=step + 1)) for step in range(30)]
    adamw = optax.adamw(lambda step: jnp.asarray([schedule(s) for s in range(30)])[step], b2=0.98, weight_decay=0.1)
    dense = jnp.asarray(table)
    state = adamw.init(dense)
    for _, gradient in batches:
        updates, state = adamw.update(jnp.asarray(gradient), state, dense)
        dense = optax.apply_updates(dense, updates)
    np.testing.assert_allclose(tables.current_table(*run(config, table, batches)), dense, atol=1e-6)


def test_lazy_adam_equals_torch_sparse_adam_over_sparse_steps() -> None:
    # So small an eps that it does not matter that torch adds it before the bias correction.
    config, table = TableOptimizerConfig("lazy_adam", b2=0.999, eps=1e-12), draw(N, D)
    weight = torch.nn.Parameter(torch.from_numpy(table.copy()))
    optimizer = torch.optim.SparseAdam([weight], betas=(config.b1, config.b2), eps=config.eps)
    batches = [(unique.ids_P, gradient) for unique, gradient in map(sparse_batch, range(100))]
    for step, (ids_P, gradient_PD) in enumerate(batches):
        real = ids_P < N
        indices = torch.from_numpy(ids_P[real].astype(np.int64))[None]
        weight.grad = torch.sparse_coo_tensor(
            indices, torch.from_numpy(gradient_PD[real]), weight.shape, check_invariants=True
        )
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.step()
    np.testing.assert_allclose(run(config, table, batches)[0], weight.detach(), atol=1e-6)


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.2, 16.0])
@pytest.mark.parametrize("average_decay", [0.5, 0.95])
# At a weight decay of 16 and at an average's of 0.5 the numbers kept for all rows are moved into the arrays more than once.
def test_sparse_steps_equal_the_dense_formulas_for_decay_and_average(
    config: TableOptimizerConfig, weight_decay: float, average_decay: float
) -> None:
    config = TableOptimizerConfig(config.kind, b2=config.b2, weight_decay=weight_decay)
    table, reference = draw(N, D), DenseReference(config, draw(N, D))
    batches = [(unique.ids_P, gradient) for unique, gradient in map(sparse_batch, range(400))]
    for step, batch in enumerate(batches):
        reference.step(*batch, schedule(step), average_decay)
    stored, state = run(config, table, batches, average_decay=average_decay)
    np.testing.assert_allclose(tables.current_table(stored, state), reference.table, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(tables.average_table(stored, state), reference.average, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("config", KINDS)
def test_a_row_decays_while_nothing_touches_it_as_the_dense_rule_decays_it(config: TableOptimizerConfig) -> None:
    """Decay of 1e-8 to 1e-5 a step, too little to show in one float32 step, over gaps of different lengths."""
    config = TableOptimizerConfig(config.kind, weight_decay=2e-4)
    table, ids_P = draw(N, D), np.asarray([0, 5], np.int32)
    stored, state = jnp.asarray(table), tables.init(config, jnp.asarray(table))

    def quiet(steps: int, carry: tuple[jax.Array, TableState]) -> tuple[jax.Array, TableState]:
        def body(step: jax.Array, carry: tuple[jax.Array, TableState]) -> tuple[jax.Array, TableState]:
            return tables.update(config, *carry, ids_P, jnp.zeros((2, D)), 0.05 / (1 + step / 1000), step)

        return jax.jit(lambda carry: jax.lax.fori_loop(0, steps, body, carry))(carry)

    for steps in (1, 1_000, 50_000):
        stored, state = quiet(steps, (jnp.asarray(table), tables.init(config, jnp.asarray(table))))
        decay = np.prod(1 - 2e-4 * 0.05 / (1 + np.arange(steps) / 1000))
        np.testing.assert_allclose(tables.current_table(stored, state), table * decay, rtol=5e-7)
        np.testing.assert_allclose(tables.gather(stored, state, ids_P), table[ids_P] * decay, rtol=5e-7)


@pytest.mark.parametrize("config", KINDS)
def test_rows_outside_the_batch_keep_every_bit(config: TableOptimizerConfig) -> None:
    config = TableOptimizerConfig(config.kind, weight_decay=0.1)
    table, before = draw(N, D), tables.init(config, jnp.asarray(draw(N, D)), average=True)
    unique, gradient = sparse_batch(0)
    stored, state = tables.update(config, jnp.asarray(table), before, unique.ids_P, gradient, 0.1, 0, average_decay=0.9)
    outside = np.setdiff1d(np.arange(N), unique.ids_P)
    assert len(outside) > N / 2
    np.testing.assert_array_equal(np.asarray(stored)[outside], table[outside])
    for old, new in zip(jax.tree.leaves(before.moments), jax.tree.leaves(state.moments), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[outside], np.asarray(old)[outside])
    np.testing.assert_array_equal(np.asarray(state.average.lag_ND)[outside], 0)
    touched = unique.ids_P[unique.ids_P < N]
    assert (np.asarray(stored)[touched] != table[touched]).any(axis=1).all()


def test_without_weight_decay_the_stored_table_is_the_table() -> None:
    batches = [(unique.ids_P, gradient) for unique, gradient in map(sparse_batch, range(5))]
    stored, state = run(ADAGRAD, draw(N, D), batches)
    np.testing.assert_array_equal(tables.current_table(stored, state), stored)
    np.testing.assert_array_equal(tables.gather(stored, state, np.arange(N)), stored)


def test_gradient_of_gathered_rows_sums_duplicates_as_the_gradient_of_the_whole_table_does() -> None:
    graphdef, parameters = nnx.split(nnx.Embed(N, D, rngs=nnx.Rngs(0)))
    table = jnp.asarray(draw(N, D))
    ids_BS = np.random.default_rng(0).integers(0, 9, (5, 8))
    weight_BSD = jnp.asarray(draw(5, 8, D))

    def loss(rows: jax.Array, index_BS: np.ndarray) -> jax.Array:
        embed = nnx.merge(graphdef, jax.tree.map(lambda _: rows, parameters))
        return (jnp.sin(embed(index_BS)) * weight_BSD).sum()

    unique = unique_ids([ids_BS], N, multiple_of=16)
    state = tables.init(ADAGRAD, table)
    rows_PD = tables.gather(table, state, unique.ids_P)
    row_gradient = jax.grad(loss)(rows_PD, unique.places[0])
    dense = jax.grad(loss)(table, ids_BS)
    real = unique.ids_P < N
    np.testing.assert_allclose(row_gradient[real], dense[unique.ids_P[real]], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(row_gradient[~real], 0)
    np.testing.assert_array_equal(np.delete(dense, unique.ids_P[real], axis=0), 0)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_counts_each_row_once_as_the_dense_norm_does(limit: float) -> None:
    ids_B = np.asarray([3, 3, 3, 7, 0, 3])
    unique = unique_ids([ids_B], N, multiple_of=8)
    per_lookup = draw(6, D)
    dense_table = np.zeros((N, D), np.float32)
    np.add.at(dense_table, ids_B, per_lookup)
    rows = np.zeros((8, D), np.float32)
    np.add.at(rows, unique.places[0], per_lookup)
    kernel = draw(4, 5)
    (kernel_clipped, rows_clipped), norm = tables.clip_by_global_norm((kernel, rows), limit)
    clip = optax.clip_by_global_norm(limit)
    (kernel_expected, table_expected), _ = clip.update((kernel, dense_table), clip.init(None))
    assert norm == pytest.approx(np.sqrt((kernel**2).sum() + (dense_table**2).sum()), rel=1e-6)
    np.testing.assert_allclose(kernel_clipped, kernel_expected, rtol=1e-6)
    np.testing.assert_allclose(rows_clipped[unique.places[0]], table_expected[ids_B], rtol=1e-6)


ID_ARRAYS = hnp.arrays(
    st.sampled_from([np.int32, np.int64]), hnp.array_shapes(min_dims=0, max_dims=3), elements=st.integers(0, 60)
)


@given(
    arrays=st.lists(ID_ARRAYS, min_size=1, max_size=3),
    num_rows=st.sampled_from([61, 1_000_000]),
    multiple_of=st.integers(1, 40),
)
def test_unique_ids_are_the_ids_each_once(arrays: list[np.ndarray], num_rows: int, multiple_of: int) -> None:
    unique = unique_ids(arrays, num_rows, multiple_of=multiple_of)
    for ids, places in zip(arrays, unique.places, strict=True):
        np.testing.assert_array_equal(unique.ids_P[places], ids)
    expected = sorted({0}.union(*(array.ravel().tolist() for array in arrays)))
    assert unique.ids_P[: len(expected)].tolist() == expected
    assert (unique.ids_P[len(expected) :] >= num_rows).all()
    assert (np.diff(unique.ids_P) > 0).all()
    assert len(unique.ids_P) % multiple_of == 0
    assert len(unique.ids_P) - len(expected) < multiple_of


@pytest.mark.parametrize("bad", [-1, 10, 2**33])
def test_an_id_that_is_no_row_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=f"id {bad} in array 1 of 2: the tables have rows 0 to 9"):
        unique_ids([np.asarray([1, 2]), np.asarray([[3], [bad]])], 10)


def test_ids_that_are_no_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="integers"):
        unique_ids([np.asarray([1.0])], 10)


@given(data=st.data(), kind=st.sampled_from(["rowwise_adagrad", "lazy_adam"]))
@settings(max_examples=30, deadline=None)
def test_the_size_of_the_gradient_does_not_change_the_path(data: st.DataObject, kind: str) -> None:
    """Both rules divide by the gradient's own size, so a loss in other units trains alike."""
    config = TableOptimizerConfig(kind, eps=1e-15)
    factor = 2.0 ** data.draw(st.integers(-10, 10))
    steps = [sparse_batch(step) for step in range(data.draw(st.integers(1, 4)))]
    one = run(config, draw(N, D), [(unique.ids_P, gradient) for unique, gradient in steps])[0]
    other = run(config, draw(N, D), [(unique.ids_P, gradient * factor) for unique, gradient in steps])[0]
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("average", [False, True])
def test_update_happens_in_place(config: TableOptimizerConfig, average: bool) -> None:
    """Compiled with donation, it needs no memory of a table's size and writes into its arguments."""
    rows, config = 100_000, TableOptimizerConfig(config.kind, weight_decay=0.1)
    table = jax.ShapeDtypeStruct((rows, D), jnp.float32)
    state = jax.eval_shape(lambda: tables.init(config, jnp.zeros((rows, D)), average=average))
    ids_P, gradient_PD = jax.ShapeDtypeStruct((64,), jnp.int32), jax.ShapeDtypeStruct((64, D), jnp.float32)

    def update(table: jax.Array, state: TableState, ids_P: jax.Array, gradient_PD: jax.Array) -> Any:
        return tables.update(config, table, state, ids_P, gradient_PD, 0.1, 0, average_decay=0.9 * average)

    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(table, state, ids_P, gradient_PD).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < rows * D * 4 / 4
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1000


def test_devices_that_share_a_batch_agree_with_one_device() -> None:
    """Every device uses the ids of the whole batch and the summed gradient of their rows."""
    table, ids_BS = jnp.asarray(draw(N, D)), np.random.default_rng(3).integers(0, N, (8, 3))
    unique = unique_ids([ids_BS], N, multiple_of=8)
    weight_BSD = draw(8, 3, D)

    def step(carry: Any, split: Any, ids_P: jax.Array) -> tuple[Any, None]:
        table, state = carry
        places_BS, weight_BSD = split
        rows_PD = tables.gather(table, state, ids_P)
        gradient_PD = jax.grad(lambda rows: (jnp.sin(rows[places_BS]) * weight_BSD).sum())(rows_PD)
        return tables.update(ADAM, table, state, ids_P, jax.lax.psum(gradient_PD, AXIS), 0.1, 0), None

    def result(devices: int) -> list[np.ndarray]:
        """The table of each device."""
        parallel = DataParallel(jax.local_devices()[:devices])
        compiled: Callable = parallel.compile(step, broadcast=(2,))
        carry = parallel.replicate((table, tables.init(ADAM, table)))
        carry, _ = compiled(carry, parallel.split((unique.places[0], weight_BSD)), unique.ids_P)
        return [np.asarray(shard.data) for shard in carry[0].addressable_shards]

    many, (one,) = result(4), result(1)
    for table_of_device in many:
        np.testing.assert_array_equal(table_of_device, many[0])
    np.testing.assert_allclose(many[0], one, atol=1e-6)


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("weight_decay", [0.2, 16.0])
def test_rows_divided_over_devices_decay_and_average_by_the_dense_formulas(
    config: TableOptimizerConfig, weight_decay: float, how: Any
) -> None:
    """42 rows on four devices, two of them padding, which stays zero; every step is clipped by the norm of the whole gradient."""
    config, rows = TableOptimizerConfig(config.kind, b2=config.b2, weight_decay=weight_decay), 42
    table, reference = draw(rows, D), DenseReference(config, draw(rows, D))
    parallel = DataParallel(jax.local_devices()[:4], how)
    rates = {"table": lambda step: jnp.asarray([schedule(s) for s in range(100)])[step]}
    spaces = {"table": "id"}
    optimizer = Optimizer(optax.sgd(0.1), config, rates, spaces, clip_norm=1.0, average_decay=0.5, shards=4)

    def step(state: TrainState, _: jax.Array, ids: dict, gradient_PD: jax.Array) -> tuple:
        row_D = optimizer.rows(state, ids)
        state, norms, _ = optimizer.update(state, ids, {}, {"table": gradient_PD})
        return state, (row_D, norms)

    step_fn = parallel.compile(step, broadcast=(2, 3), divided=optimizer.divided)
    state = parallel.replicate(optimizer.init({"table": jnp.asarray(table)}), optimizer.divided)
    for number in range(100):
        unique, gradient_PD = sparse_batch(number, rows)
        state, told = step_fn(state, parallel.split(np.zeros(4)), {"id": unique.ids_P}, gradient_PD)
        row, norms = parallel.unreplicate(told)
        real, norm = unique.ids_P < rows, np.linalg.norm(gradient_PD)
        np.testing.assert_allclose(row["table"][real], reference.table[unique.ids_P[real]], rtol=1e-5, atol=2e-6)
        assert float(norms.gradient) == pytest.approx(norm, rel=1e-5)
        reference.step(unique.ids_P, gradient_PD * min(1.0, 1.0 / norm), schedule(number), 0.5)
    whole = parallel.local(parallel.unreplicate(state, optimizer.divided))
    stored, kept = whole.tables["table"], whole.table_states["table"]
    np.testing.assert_allclose(tables.current_table(stored, kept)[:rows], reference.table, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(tables.average_table(stored, kept)[:rows], reference.average, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(stored[rows:], 0)


@pytest.mark.parametrize("wrong", [{"b1": 0.0}, {"b2": 1.0}, {"weight_decay": -0.1}])
def test_a_setting_out_of_range_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TableOptimizerConfig(**wrong)


@pytest.mark.parametrize(("average", "average_decay"), [(False, 0.9), (True, 0.0), (True, 1.0)])
def test_a_decay_that_does_not_fit_the_state_is_refused(average: bool, average_decay: float) -> None:
    table = jnp.zeros((N, D))
    state = tables.init(ADAGRAD, table, average=average)
    with pytest.raises(ValueError, match="average_decay"):
        tables.update(ADAGRAD, table, state, jnp.arange(2), table[:2], 0.1, 0, average_decay=average_decay)


def test_average_of_a_table_without_one_is_refused() -> None:
    with pytest.raises(ValueError, match="average=True"):
        tables.average_table(jnp.zeros((N, D)), tables.init(ADAGRAD, jnp.zeros((N, D))))


def test_a_table_that_is_drawn_in_parts_is_normal_everywhere_and_the_same_on_any_number_of_devices() -> None:
    rows, width = 4_000, 10
    init = normal_table(0.5, drawn_together=4 * rows)  # columns 0 to 3, 4 to 7 and 6 to 9
    table, whole = (np.asarray(f(jax.random.key(0), (rows, width))) for f in (init, normal_table(0.5)))
    for column in range(width):
        assert scipy.stats.kstest(table[:, column] / 0.5, "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(table.T) - np.eye(width)).max() < 0.1
    np.testing.assert_array_equal(whole, jax.nn.initializers.normal(0.5)(jax.random.key(0), (rows, width)))
    mesh = jax.sharding.Mesh(np.asarray(jax.local_devices()[:4]), (AXIS,))
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
    drawn = jax.jit(init, static_argnums=1, out_shardings=divided)(jax.random.key(0), (rows, width))
    assert {shard.data.shape for shard in drawn.addressable_shards} == {(rows // 4, width)}
    np.testing.assert_array_equal(drawn, table)
