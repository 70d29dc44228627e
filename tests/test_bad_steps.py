"""Steps whose loss or gradient is not finite: nothing moves, they are counted, and after three in a row the run stops."""

import json
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_task import EXAMPLES, FAULTS, RegressionTask, train

from tenrec_jax.errors import UserError
from tenrec_jax.parameters import named
from tenrec_jax.stages import METRICS
from tenrec_jax.training.metrics_writer import BAD_BATCHES, read_lines
from tenrec_jax.training.optimizers import Optimizer, OptimizerConfig, make_optimizer
from tenrec_jax.training.parallel import DataParallel
from tenrec_jax.training.tables import TableOptimizerConfig
from tenrec_jax.training.train_log import SPIKE_WINDOWS, is_spike
from tenrec_jax.training.trainer import compile_step


def leaves(state: object) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("kind", ["rowwise_adagrad", "lazy_adam"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_step_moves_neither_parameters_nor_what_the_rules_remember(fault: str, kind: str) -> None:
    task, parallel = RegressionTask({1: fault}), DataParallel(jax.local_devices()[:1])
    rule = TableOptimizerConfig(kind, weight_decay=0.01)
    config = OptimizerConfig(learning_rate=0.05, warmup_steps=0, schedule="constant", tables=rule)
    optimizer = make_optimizer(config, 10, task.tables)
    parameters = task.init(jax.random.key(0))
    step_fn = compile_step(task, optimizer, parallel, like=parameters)
    state, states, told = parallel.replicate(optimizer.init(named(parameters))), [], []
    for step in range(3):
        batch = task.batch(step)
        state, metrics = step_fn(state, *batch._replace(split=parallel.split(batch.split)), jax.random.key(1))
        states.append(parallel.read(parallel.unreplicate(state)))
        told.append(parallel.read(metrics).compute())
    good, bad, after = states
    for before, now in zip(leaves(good._replace(step=0)), leaves(bad._replace(step=0)), strict=True):
        np.testing.assert_array_equal(before, now)
    assert [int(each.step) for each in states] == [1, 2, 3]
    assert [float(each["bad_steps"]) for each in told] == [0, 1, 0]
    assert np.isnan(told[1]["loss"])  # of no example
    assert all(np.isfinite(leaf).all() for leaf in leaves(after))
    assert any((a != b).any() for a, b in zip(leaves(bad.dense), leaves(after.dense), strict=True))


def test_an_update_that_would_overflow_is_not_applied() -> None:
    optimizer = Optimizer(optax.sgd(1e38), TableOptimizerConfig(), {}, {})
    state = optimizer.init({"w": jnp.ones(3)})
    after, _, good = optimizer.update(state, {}, {"w": jnp.full(3, 1e3)}, {})
    assert not good
    np.testing.assert_array_equal(after.dense["w"], np.ones(3))


@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_bad_steps_are_counted_written_down_and_stop_the_run_by_the_rule(
    count: int, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """Faults at random steps of several runs: isolated ones are passed over, three in a row stop the run."""
    drawn, injected, stopped, runs = random.Random(count), 0, 0, 0
    while injected < count:
        runs += 1
        # Within one epoch of five steps, so that no checkpoint lies between the bad steps.
        start, length = 5 * drawn.randrange(3) + drawn.randrange(3), drawn.choice([1, 2, 3])
        faults = {step: drawn.choice(FAULTS) for step in range(start, start + length)}
        injected += length
        workdir = tmp_path / str(runs)
        if length < 3:
            result = train(workdir, RegressionTask(faults))
            assert all(np.isfinite(leaf).all() for leaf in leaves(result.parameters))
        else:
            stopped += 1
            with pytest.raises(UserError, match=f"3 steps in a row, the last one {start + 3}, .*{BAD_BATCHES}"):
                train(workdir, RegressionTask(faults))
            # Where the faults were, now is sound data: the run goes on from its last checkpoint, and nothing of them is left.
            repaired, sound = train(workdir, RegressionTask()), train(tmp_path / "sound", RegressionTask())
            for a, b in zip(leaves(repaired.parameters), leaves(sound.parameters), strict=True):
                np.testing.assert_array_equal(a, b)
            assert not (workdir / BAD_BATCHES).exists() or not read_lines(workdir / BAD_BATCHES)
            continue
        lines = read_lines(workdir / BAD_BATCHES)
        assert [(line["step"], line["rows"]) for line in lines] == [(step + 1, [step]) for step in faults]
        counted = sum(line.get("bad_steps", 0) for line in read_lines(workdir / METRICS))
        assert counted == length
        assert "NaN" not in (workdir / METRICS).read_text()
    tell(f"not finite: {injected} bad steps in {runs} runs, all counted; {stopped} runs stopped by the rule")


def test_means_of_a_window_are_over_its_good_steps(tmp_path: Path) -> None:
    task = RegressionTask({1: "loss nan", 3: "batch inf"})
    train(tmp_path, task, epochs=1)
    (line,) = [line for line in read_lines(tmp_path / METRICS) if "loss" in line]
    assert line["bad_steps"] == 2

    # By hand: the good steps' losses, from parameters that the bad ones did not move.
    good = [step for step in range(5) if step not in task.faults]
    seen: list[float] = []
    parallel = DataParallel(jax.local_devices()[:1])
    rule = TableOptimizerConfig("lazy_adam", weight_decay=0.01)
    config = OptimizerConfig(learning_rate=0.05, warmup_steps=0, schedule="constant", weight_decay=0.01, tables=rule)
    optimizer, init_key = make_optimizer(config, 5, task.tables), jax.random.split(jax.random.key(0))[0]
    parameters = task.init(init_key)
    step_fn = compile_step(task, optimizer, parallel, like=parameters)
    state = parallel.replicate(optimizer.init(named(parameters)))
    for step in range(5):
        batch = task.batch(step)
        whole = optimizer.parameters(parallel.local(parallel.unreplicate(state)))
        if step in good:
            seen.append(loss_by_hand(whole, batch))
        state, _ = step_fn(state, *batch._replace(split=parallel.split(batch.split)), jax.random.key(0))
    assert line["loss"] == pytest.approx(np.mean(seen), rel=1e-4)


def loss_by_hand(parameters: dict[str, jax.Array], batch: tuple) -> float:
    (x_BD, place_B), _, ids = batch
    table, kernel, bias = (np.asarray(parameters[name]) for name in ("table.embedding", "dense.kernel", "dense.bias"))
    row_BD = table[ids["row"][place_B]]
    error_B = (x_BD * row_BD) @ kernel[:, 0] + bias[0] - x_BD.sum(1)
    return float((np.square(error_B).sum() + np.sqrt(np.square(kernel).sum())) / EXAMPLES)


def test_bad_steps_in_a_row_are_counted_across_an_interruption(tmp_path: Path) -> None:
    """Two before a checkpoint and one after it are three."""
    train(tmp_path, RegressionTask({3: "loss nan", 4: "loss nan"}), epochs=1)
    with pytest.raises(UserError, match="3 steps in a row, the last one 6"):
        train(tmp_path, RegressionTask({5: "loss nan"}), epochs=2)
    lines = [json.loads(line) for line in (tmp_path / BAD_BATCHES).read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 5, 6]


def test_a_spike_stands_out_from_the_windows_before_it() -> None:
    random_state = np.random.default_rng(0)
    usual = deque((3.0 + 0.05 * random_state.normal(size=SPIKE_WINDOWS)).tolist(), maxlen=SPIKE_WINDOWS)
    assert is_spike(4.0, usual)
    assert not is_spike(3.2, usual)
    assert not is_spike(1.0, usual)
    assert not is_spike(9.0, deque([3.0] * 3))  # too few to know what is usual


def test_a_run_whose_evaluations_give_no_number_says_so(tmp_path: Path) -> None:
    task = RegressionTask()
    task.evaluate = lambda parameters: (float("nan"), {})
    with pytest.raises(UserError, match="No evaluation of stage regression gave a number"):
        train(tmp_path, task, epochs=1)
    assert isinstance(task.init(jax.random.key(0)), nnx.State)
