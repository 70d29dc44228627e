"""Fifty steps of each stage on a log of one batch shape; run as a script, one of several processes of such a training."""

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from tenrec_jax.config import RunConfig, default_config
from tenrec_jax.data.ingest import ingest
from tenrec_jax.data.schema import KINDS
from tenrec_jax.parameters import named
from tenrec_jax.run_data import RunData
from tenrec_jax.training.optimizers import Optimizer
from tenrec_jax.training.parallel import DataParallel, join_processes, leave_processes
from tenrec_jax.training.tables import TableOptimizerConfig
from tenrec_jax.training.trainer import Task, compile_step, whole_parameters
from tenrec_jax.training.workers import end_with_launcher

STEPS, DEVICES = 50, 4
STAGES = ("retrieval", "ranking")
CLIP_NORM = 0.5
PLACEMENTS = ("replicated", "row_sharded")
# In the training that several processes share: a device draws by its place among all devices.
DROPOUT = {"retrieval": 0.1, "ranking": 0.0}


class Trained(NamedTuple):
    """The loss of every step [50], and the final weights end to end."""

    loss: np.ndarray
    weight: np.ndarray


def quick_compilation() -> None:
    """Compile in half the time, to slower code: these programs run for fractions of a second."""
    jax.config.update("jax_disable_most_optimizations", True)


def write_table(folder: Path) -> None:
    """A log of 64 users with 12 rows each, so that every batch has one shape and a step is compiled once."""
    random = np.random.default_rng(0)
    rows = [
        f"{user},{random.integers(1, 40)},{','.join(map(str, random.integers(0, 2, 4)))},1,0,1,4"
        for user in range(1, 65)
        for _ in range(12)
    ]
    (folder / "log.csv").write_text("\n".join([",".join(KINDS["qb_video"].header), *rows]) + "\n")
    ingest([folder / "log.csv"], "qb_video", folder / "table", progress=False)


def config(dropout: float = 0.0) -> RunConfig:
    """Both stages at width 8, 8 users a batch.

    Embeddings start large: the layer norm of small ones enlarges every rounding, from step to step, until it is all one sees.
    """
    run = default_config()

    def shrunk(stage):
        encoder = dataclasses.replace(
            stage.model.encoder, num_layers=1, width=8, num_heads=2, hidden=8, dropout=dropout
        )
        features = dataclasses.replace(stage.model.features, max_length=16, init_scale=0.5, dropout=dropout)
        model = dataclasses.replace(stage.model, features=features, encoder=encoder)
        return dataclasses.replace(stage, model=model, events_per_batch=96)

    return dataclasses.replace(
        run, retrieval=dataclasses.replace(shrunk(run.retrieval), negatives=16), ranking=shrunk(run.ranking)
    )


def make_task(stage: str, table: Path, dropout: float = 0.0) -> Task:
    """A stage whose batches four devices can share."""

    def no_evaluation(parameters):
        raise NotImplementedError

    data = RunData(config(dropout), table, DEVICES)
    return data.retrieval_task(no_evaluation) if stage == "retrieval" else data.ranking_task(no_evaluation)


def train(
    task: Task, parallel: DataParallel, steps: int = STEPS, *, row_sharded: bool = False, accumulate: int = 1
) -> Trained:
    """Train for some steps, with gradients clipped in most of them.

    SGD with momentum, and for the tables Adagrad with a large eps: Adam, and Adagrad with a small one, would turn the rounding of a
    gradient that is zero in truth into a full step.
    """
    rule = TableOptimizerConfig("rowwise_adagrad", eps=1.0)
    optimizer = Optimizer(
        optax.sgd(0.01, momentum=0.9),
        rule,
        dict.fromkeys(task.tables, lambda _: 0.1),
        task.tables,
        clip_norm=CLIP_NORM,
        average_decay=0.5,
        shards=parallel.size if row_sharded else 1,
    )
    parameters, losses = jax.jit(task.init)(jax.random.key(0)), []
    state = parallel.replicate(optimizer.init(named(parameters)), optimizer.divided)
    step_fn = compile_step(task, optimizer, parallel, like=parameters, accumulate=accumulate)
    for step in range(steps):
        batch = task.batch(step, parallel.process_index, parallel.process_count)
        key = jax.random.fold_in(jax.random.key(1), step)
        state, report = step_fn(state, parallel.split(batch.split), batch.shared, batch.ids, key)
        losses.append(float(parallel.read(report).loss.compute()))
    trained = whole_parameters(parallel.unreplicate(state, optimizer.divided), optimizer, parallel, like=parameters)
    weights = jax.tree.leaves(trained)
    return Trained(np.asarray(losses), np.concatenate([np.ravel(leaf) for leaf in weights]))


def main(table: str, out: str, processes: str) -> None:
    """Train both stages as one of several processes of one device each, and save what came out."""
    end_with_launcher()
    quick_compilation()
    jax.config.update("jax_num_cpu_devices", 1)
    if not join_processes(int(processes)):
        raise SystemExit("the environment names no coordinator")
    parallel = DataParallel()
    for stage in STAGES:
        task = make_task(stage, Path(table), dropout=DROPOUT[stage])
        for placement in PLACEMENTS:
            trained = train(task, parallel, row_sharded=placement == "row_sharded")
            np.savez(Path(out) / f"{stage}_{placement}{parallel.process_index}.npz", **trained._asdict())
    leave_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
