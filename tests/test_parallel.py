"""Devices and processes: the same training on any number of either, and what happens when a process dies."""

import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from short_training import DROPOUT, PLACEMENTS, STAGES, Trained, make_task, train

from tenrec_jax.errors import UserError
from tenrec_jax.parameters import named
from tenrec_jax.training.optimizers import OptimizerConfig, make_optimizer
from tenrec_jax.training.parallel import AXIS, DataParallel, join_processes
from tenrec_jax.training.tables import TableOptimizerConfig
from tenrec_jax.training.trainer import Batch, compile_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(__file__).parents[1]
ON_TWO_DEVICES = [pytest.param(how, 2, marks=pytest.mark.slow) for how in ("pmap", "shard_map")]
DEADLINE = 300  # seconds after which a child process counts as hanging
SUPERVISE = """
import sys
from tenrec_jax.training.workers import supervise
sys.exit(supervise(sys.argv[2:], 2, grace_seconds=float(sys.argv[1])))
"""


@pytest.fixture(scope="module", params=STAGES)
def on_one_device(request: pytest.FixtureRequest, short_table: Path) -> tuple[str, Trained]:
    return request.param, train(make_task(request.param, short_table), DataParallel(jax.local_devices()[:1], "pmap"))


def environment(**variables: object) -> dict[str, str]:
    """This process's, in which scripts import the package that is tested."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | {name: str(value) for name, value in variables.items()}


def supervised(*command: object, grace_seconds: float = 30, **popen: object) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", SUPERVISE, grace_seconds, sys.executable, *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    return subprocess.Popen(list(map(str, arguments)), **(pipes | popen))


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


WAITING_WORKER = """
import os, signal, sys
from pathlib import Path
index, folder = int(os.environ["JAX_PROCESS_ID"]), Path(sys.argv[1])
(folder / f"pid{index}").write_text(str(os.getpid()))
"""


def assert_ended(folder: Path) -> None:
    for index in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / f"pid{index}").read_text()), 0)


def test_when_a_worker_is_killed_the_others_are_stopped_even_if_they_will_not(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    script = f"""{WAITING_WORKER}
if index == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "ready").write_text("")  # returns when worker 1 reads
    signal.pause()
print("last words", flush=True)
(folder / "ready").read_text()
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = supervised("-c", script, tmp_path, grace_seconds=0.1)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "worker 1 of 2 was killed by SIGKILL (exit code -9)" in err
    assert "same command resumes" in err
    assert "[worker 1] last words" in err
    assert_ended(tmp_path)


def test_a_worker_that_refuses_its_input_speaks_for_itself(tmp_path: Path) -> None:
    script = (
        f"{WAITING_WORKER}\nif index == 0:\n    sys.stderr.write('error: no such log')\n    sys.exit(2)\nsignal.pause()"
    )
    process = supervised("-c", script, tmp_path)
    _, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (2, "error: no such log")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_stops_all_workers(number: signal.Signals, tmp_path: Path) -> None:
    process = supervised("-c", f"{WAITING_WORKER}\nprint('ready', flush=True)\nsignal.pause()", tmp_path)
    assert process.stdout.readline() == "ready\n"
    assert process.stderr.readline() == "[worker 1] ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + number
    assert f"Stopped by {number.name}. The same command resumes" in err
    assert_ended(tmp_path)


def test_workers_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    script = f"""{WAITING_WORKER}
from tenrec_jax.training.workers import end_with_launcher
end_with_launcher()
print("ready", flush=True)
signal.pause()
"""
    process = supervised("-c", script, tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    # Worker 0 holds the other end of the pipe: it is closed when the worker has ended.
    process.communicate(timeout=DEADLINE)


def test_a_local_worker_takes_its_share_of_the_cores_and_a_gpu_unless_told_otherwise(tmp_path: Path) -> None:
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS", "NPROC", "OMP_NUM_THREADS")
    script = f"import os; print([os.environ[name] for name in {names}])"
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for given, expected in (({}, [threads, threads]), ({"NPROC": 3, "OMP_NUM_THREADS": 5}, ["3", "5"])):
        process = supervised("-c", script, env=environment(**given))
        out, err = process.communicate(timeout=DEADLINE)
        assert out == f"{['2', '0', '0', *expected]}\n"
        assert err == f"[worker 1] {['2', '1', '1', *expected]}\n"


def launch(table: Path, workdir: Path, placement: str) -> subprocess.Popen[str]:
    arguments = [
        f"--config={ROOT / 'tests' / 'tiny_run.py'}",
        f"--config.data.path={table.with_name('log.csv')}",
        f"--config.retrieval.train.table_placement={placement}",
        f"--workdir={workdir}",
        "--num_processes=2",
    ]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / "launch.py"), *arguments],
        env=environment(JAX_COMPILATION_CACHE_DIR=table.with_name("xla"), JAX_DISABLE_MOST_OPTIMIZATIONS=1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid: int) -> dict[str, int]:
    """Process ids of the workers, by their index."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pairs = [
        (dict(line.partition("=")[::2] for line in Path(f"/proc/{child}/environ").read_text().split("\0")), child)
        for child in found
    ]
    return {variables["JAX_PROCESS_ID"]: int(child) for variables, child in pairs}


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_run_of_two_processes_goes_on_after_one_was_killed(placement: str, short_table: Path, tmp_path: Path) -> None:
    whole = launch(short_table, tmp_path / "whole", placement)
    _, err = whole.communicate(timeout=DEADLINE)
    assert whole.returncode == 0, err

    killed = launch(short_table, tmp_path / "killed", placement)
    for line in killed.stderr:
        # The bar shows a best value when an evaluation has been, and its checkpoint is being written.
        if "best=0" in line:
            break
    os.kill(children(killed.pid)["1"], signal.SIGKILL)
    _, err = killed.communicate(timeout=DEADLINE)
    assert killed.returncode == 1
    assert "worker 1 of 2 was killed by SIGKILL" in err
    assert "same command resumes" in err
    assert not (tmp_path / "killed" / "DONE").exists()

    again = launch(short_table, tmp_path / "killed", placement)
    out, err = again.communicate(timeout=DEADLINE)
    assert again.returncode == 0, err
    assert "recall@10" in out
    for name in ("recommender/retrieval.safetensors", "recommender/manifest.json", "metrics.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
