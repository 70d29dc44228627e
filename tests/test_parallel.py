"""Devices and processes: the same training on any number of either."""

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launched import DEADLINE, ROOT, environment, supervised
from short_training import DROPOUT, PLACEMENTS, STAGES, Trained, make_task, train

from tenrec_jax.errors import UserError
from tenrec_jax.parameters import named
from tenrec_jax.training.optimizers import OptimizerConfig, make_optimizer
from tenrec_jax.training.parallel import AXIS, DataParallel, join_processes
from tenrec_jax.training.tables import TableOptimizerConfig
from tenrec_jax.training.trainer import Batch, compile_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
ON_TWO_DEVICES = [pytest.param(how, 2, marks=pytest.mark.slow) for how in ("pmap", "shard_map")]


@pytest.fixture(scope="module", params=STAGES)
def on_one_device(request: pytest.FixtureRequest, short_table: Path) -> tuple[str, Trained]:
    return request.param, train(make_task(request.param, short_table), DataParallel(jax.local_devices()[:1], "pmap"))


def assert_same_training(a: Trained, b: Trained) -> None:
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(a.weight, b.weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("how", "devices"), [("shard_map", 1), *ON_TWO_DEVICES, ("pmap", 4), ("shard_map", 4)])
def test_fifty_steps_on_more_devices_train_the_same_model(
    how: str, devices: int, on_one_device: tuple[str, Trained], short_table: Path
) -> None:
    stage, expected = on_one_device
    assert_same_training(
        train(make_task(stage, short_table), DataParallel(jax.local_devices()[:devices], how)), expected
    )


@pytest.mark.parametrize(("how", "devices"), [*ON_TWO_DEVICES, ("pmap", 4), ("shard_map", 4)])
def test_fifty_steps_with_tables_divided_by_rows_train_the_same_model(
    how: str, devices: int, on_one_device: tuple[str, Trained], short_table: Path
) -> None:
    stage, expected = on_one_device
    parallel = DataParallel(jax.local_devices()[:devices], how)
    assert_same_training(train(make_task(stage, short_table), parallel, row_sharded=True), expected)


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_each_device_holds_its_part_of_the_rows_of_every_table_and_of_all_that_is_kept_of_them(
    how: str, short_table: Path
) -> None:
    task, parallel = make_task("ranking", short_table), DataParallel(jax.local_devices()[:4], how)
    optimizer = make_optimizer(
        OptimizerConfig(tables=TableOptimizerConfig("lazy_adam")), 10, task.tables, average_decay=0.5, shards=4
    )
    parameters = jax.jit(task.init)(jax.random.key(0))
    state = parallel.replicate(optimizer.init(named(parameters)), optimizer.divided)
    batch, step_fn = task.batch(0), compile_step(task, optimizer, parallel, like=parameters)
    state, _ = step_fn(state, *batch._replace(split=parallel.split(batch.split)), jax.random.key(1))
    rows = {name: len(named(parameters)[name]) for name in task.tables}
    assert any(number % 4 for number in rows.values())
    for name, number in rows.items():
        kept = state.table_states[name]
        width = named(parameters)[name].shape[1]
        for leaf, columns in (
            (state.tables[name], width),
            (kept.moments.mean_and_square_N, 2 * width),
            (kept.average.lag_ND, width),
        ):
            sizes = {shard.device: shard.data.nbytes for shard in leaf.addressable_shards}
            assert sizes == dict.fromkeys(parallel.devices, -(-number // 4) * columns * 4), name


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_a_state_that_is_made_in_place_is_never_copied(how: str) -> None:
    """Neither by what lies on all devices nor by what is divided over them, on the way in, through a step and out of it."""
    parallel, divided = DataParallel(jax.local_devices()[:4], how), {"on_all": False, "rows": True}

    def begin() -> dict[str, jax.Array]:
        return {"on_all": jnp.zeros((8, 64)), "rows": jnp.ones((8, 64))}

    def step(state, _):
        return jax.tree.map(lambda x: x.at[0].add(1.0), state), jax.lax.psum(1.0, AXIS)

    def memory(state: dict[str, jax.Array]) -> dict[str, list[int]]:
        return {name: [s.data.unsafe_buffer_pointer() for s in x.addressable_shards] for name, x in state.items()}

    places = jax.tree.map(lambda x: x.sharding, parallel.shapes(jax.eval_shape(begin), divided))
    made = jax.jit(begin, out_shardings=places)()
    before = memory(made)
    state, told = parallel.compile(step, divided=divided)(
        parallel.replicate(made, divided), parallel.split(np.zeros((4, 1)))
    )
    assert memory(state) == before
    assert float(parallel.read(told)) == 4
    after = parallel.unreplicate(state, divided)
    assert memory(after)["on_all"] == before["on_all"]
    assert after["rows"].shape == (8, 64)
    np.testing.assert_array_equal(np.asarray(after["rows"])[:, 0], [2, 1] * 4)


def test_in_batch_negatives_are_those_of_all_devices(short_table: Path) -> None:
    task = make_task("retrieval", short_table)
    parameters, batch = jax.jit(task.init)(jax.random.key(0)), task.batch(0)

    def loss(rows: slice, devices: int = 1, how: str = "pmap") -> float:
        def total(parameters, split, shared, key):
            return jax.lax.psum(task.loss(parameters, Batch(split, shared, batch.ids), key).total, AXIS)

        parallel = DataParallel(jax.local_devices()[:devices], how)
        total_fn = parallel.compile(total, donate_state=False, broadcast=(2, 3))
        split = parallel.split(jax.tree.map(lambda x: x[rows], batch.split))
        return float(
            parallel.unreplicate(total_fn(parallel.replicate(parameters), split, batch.shared, jax.random.key(1)))
        )

    whole = loss(slice(None))
    for how in ("pmap", "shard_map"):
        assert loss(slice(None), 4, how) == pytest.approx(whole, rel=1e-6)
    # Half the negatives give another loss, so this would show a device that keeps to its own.
    assert abs(loss(slice(0, 4)) + loss(slice(4, 8)) - whole) > 1e-3 * whole


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(short_table: Path, tmp_path: Path) -> None:
    process = supervised(ROOT / "tests" / "short_training.py", short_table, tmp_path, 2)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, out + err
    for stage in STAGES:
        expected = train(
            make_task(stage, short_table, dropout=DROPOUT[stage]), DataParallel(jax.local_devices()[:2], "pmap")
        )
        for placement, index in itertools.product(PLACEMENTS, range(2)):
            with np.load(tmp_path / f"{stage}_{placement}{index}.npz") as file:
                assert_same_training(Trained(**file), expected)


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_a_batch_that_cannot_be_divided_is_refused(how: str) -> None:
    parallel = DataParallel(jax.local_devices()[:4], how)
    with pytest.raises(ValueError, match="6 rows cannot be divided over 4 devices: batch sizes must be multiples of 4"):
        parallel.split((np.zeros((6, 3)),))


def test_an_environment_without_a_coordinator_is_left_alone() -> None:
    assert not join_processes(2, {})
    # A batch script of Slurm, which is no task of a step.
    assert not join_processes(2, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "JAX_NUM_PROCESSES is ''; it must be a number"),
        ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "the last is 1"),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"},
            "pass --num_processes=4, not 2",
        ),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "pass --num_processes=8, not 2"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        join_processes(2, variables)


def test_tasks_of_a_slurm_step_find_each_other() -> None:
    script = """
import jax
from tenrec_jax.training.parallel import DataParallel, join_processes, leave_processes
assert join_processes(2)
parallel = DataParallel()
print(parallel.size, parallel.how, parallel.from_main(0.1 + parallel.process_index))
leave_processes()
"""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    step = {"SLURM_JOB_ID": 7, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment(**step, SLURM_PROCID=i, SLURM_LOCALID=i, JAX_COORDINATOR_PORT=port),
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for task in tasks:
        out, _ = task.communicate(timeout=DEADLINE)
        assert task.returncode == 0
        assert "2 shard_map 0.1" in out


def test_the_slurm_script_runs_the_command_as_as_many_processes_as_it_has_tasks(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text("#!/bin/bash\necho $NPROC $*\n")
    (tmp_path / "srun").chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": ROOT, "SLURM_NTASKS": 8, "SLURM_CPUS_PER_TASK": 6, "PYTHON": "python3"}
    command = ["bash", ROOT / "experiments" / "cluster" / "slurm.sbatch", "--workdir=runs/a"]
    result = subprocess.run(
        command,
        env=environment(**job, PATH=f"{tmp_path}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == (
        "6 --kill-on-bad-exit=1 --cpus-per-task=6 python3 experiments/launch.py --num_processes=8 --workdir=runs/a\n"
    )
