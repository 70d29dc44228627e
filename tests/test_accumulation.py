"""Gradient accumulation: micro-batches give the update of the whole batch in less memory."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from short_training import config, make_task, train

from tenrec_jax.errors import UserError
from tenrec_jax.parameters import assembled, named
from tenrec_jax.run_data import RunData
from tenrec_jax.training.optimizers import OptimizerConfig, make_optimizer
from tenrec_jax.training.parallel import AXIS, DataParallel
from tenrec_jax.training.tasks import ScoredTimelines
from tenrec_jax.training.trainer import Batch, LossSum, compile_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(("how", "accumulate"), [("pmap", 2), ("shard_map", 4)])
def test_micro_batches_of_the_ranker_train_as_the_whole_batch_does(
    how: str, accumulate: int, short_table: Path
) -> None:
    task, devices = make_task("ranking", short_table), jax.local_devices()[:2]
    whole = train(task, DataParallel(devices), steps=5)
    parts = train(task, DataParallel(devices, how), steps=5, accumulate=accumulate)
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(parts.weight, whole.weight, rtol=1e-6, atol=1e-6)


def test_in_batch_negatives_are_those_of_the_micro_batch_on_all_devices(short_table: Path) -> None:
    task = make_task("retrieval", short_table)
    leaves, batch = named(jax.jit(task.init)(jax.random.key(0))), jax.tree.map(jax.numpy.asarray, task.batch(0))
    in_tables = {
        name: np.take(leaves[name], batch.ids[space], axis=0, mode="clip") for name, space in task.tables.items()
    }
    parameters = assembled(task.init(jax.random.key(0)), leaves | in_tables)

    @jax.jit
    def loss(split: ScoredTimelines) -> LossSum:
        def on_one_device(_: jax.Array) -> LossSum:
            return task.loss(parameters, Batch(split, batch.shared, batch.ids), jax.random.key(1))

        return jax.vmap(on_one_device, axis_name=AXIS)(jax.numpy.zeros(1))

    # Device 0 has rows 0 to 3 and device 1 the rest: each micro-batch is half of either.
    micro_batches = np.asarray([[0, 1, 4, 5], [2, 3, 6, 7]])
    halves = [loss(jax.tree.map(lambda x, rows=rows: x[rows], batch.split)) for rows in micro_batches]
    expected = float(sum(half.total[0] for half in halves) / sum(half.examples[0] for half in halves))
    two_devices = DataParallel(jax.local_devices()[:2])
    assert train(task, two_devices, steps=1, accumulate=2).loss == pytest.approx(expected, rel=1e-5)
    assert abs(train(task, two_devices, steps=1).loss - expected) > 1e-3 * expected


@pytest.mark.slow
def test_micro_batches_take_less_memory(short_table: Path) -> None:
    run = config()
    encoder = dataclasses.replace(run.ranking.model.encoder, num_layers=4, width=64, hidden=128)
    model = dataclasses.replace(run.ranking.model, encoder=encoder)
    run = dataclasses.replace(run, ranking=dataclasses.replace(run.ranking, model=model, events_per_batch=768))
    task = RunData(run, short_table, 1).ranking_task(lambda _: (0.0, {}))
    parallel, optimizer = DataParallel(jax.local_devices()[:1]), make_optimizer(OptimizerConfig(), 9, task.tables)
    parameters = jax.eval_shape(task.init, jax.random.key(0))
    state, batch = parallel.replicate(optimizer.init(named(task.init(jax.random.key(0))))), task.batch(0)
    arguments = state, *batch._replace(split=parallel.split(batch.split)), jax.random.key(0)

    def temporary(accumulate: int) -> int:
        step_fn = compile_step(task, optimizer, parallel, parameters, accumulate=accumulate)
        return step_fn.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(1) / 3


def test_a_batch_that_cannot_be_divided_is_refused_with_what_can_be_set(short_table: Path) -> None:
    run = config()
    train_config = dataclasses.replace(run.ranking.train, accumulate=3)
    run = dataclasses.replace(run, ranking=dataclasses.replace(run.ranking, train=train_config))
    with pytest.raises(
        UserError,
        match=r"ranking\.train\.accumulate is 3, but a device has 2 rows .*: accumulate over 1, 2, or change",
    ):
        RunData(run, short_table, 4).ranking_task(lambda _: (0.0, {}))
    with pytest.raises(ValueError, match="4 rows of a device cannot be divided into 3 micro-batches"):
        train(make_task("ranking", short_table), DataParallel(jax.local_devices()[:2]), steps=1, accumulate=3)
    with pytest.raises(ValueError, match="accumulate is 0"):
        dataclasses.replace(train_config, accumulate=0)
