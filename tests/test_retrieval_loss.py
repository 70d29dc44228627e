"""The retrieval stage's full softmax against the whole catalogue scored by hand."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from short_training import config

from tenrec_jax.models.two_tower import TwoTower
from tenrec_jax.parameters import assembled, named
from tenrec_jax.run_data import RunData
from tenrec_jax.training.parallel import AXIS

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMOOTHING = 0.1


def test_the_full_softmax_scores_every_item_that_training_knows(short_table: Path) -> None:
    run = config()
    retrieval = dataclasses.replace(run.retrieval, loss="softmax", label_smoothing=SMOOTHING)
    data = RunData(dataclasses.replace(run, retrieval=retrieval), short_table, 1)
    task = data.retrieval_task(lambda _: (0.0, {}))
    start = jax.jit(task.init)(jax.random.key(0))
    leaves, batch = named(start), task.batch(0)
    rows = {name: np.take(leaves[name], batch.ids[space], axis=0, mode="clip") for name, space in task.tables.items()}
    in_batch = assembled(task.init(jax.random.key(0)), leaves | rows)
    got = jax.vmap(lambda _: task.loss(in_batch, batch, jax.random.key(1)), axis_name=AXIS)(np.zeros(1))

    model: TwoTower = nnx.merge(task.graphdef, in_batch)
    timeline = batch.split.timeline
    query_PD = np.asarray(model.queries(timeline)).reshape(-1, 8)
    known = np.unique(data.trained.item[data.trained.item > 0])
    assert len(known) > 30
    whole: TwoTower = nnx.merge(task.graphdef, start)
    vector_ND = np.asarray(whole.item_vectors(known, np.asarray(data.table.items.category)[known]))
    item_P = batch.ids["item"][timeline.events.item.reshape(-1)]
    counts_P = batch.split.score.reshape(-1) & (timeline.events.action[..., 0].reshape(-1) > 0) & (item_P > 0)
    labels = optax.smooth_labels((item_P[counts_P, None] == known).astype(np.float32), SMOOTHING)
    expected = optax.softmax_cross_entropy(query_PD[counts_P] @ vector_ND.T, labels).sum()
    assert int(got.examples[0]) == counts_P.sum()
    assert float(got.total[0]) == pytest.approx(float(expected), rel=1e-5)
