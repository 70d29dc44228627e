"""A regression with a dense layer and an embedding table, whose steps can be made bad in several ways."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tenrec_jax.training.optimizers import OptimizerConfig
from tenrec_jax.training.parallel import DataParallel
from tenrec_jax.training.stopping import Stopping
from tenrec_jax.training.tables import TableOptimizerConfig, unique_ids
from tenrec_jax.training.trainer import Batch, FitResult, LossSum, TrainConfig, fit

ROWS, WIDTH, EXAMPLES = 20, 4, 8
# What becomes of a step: its loss, its gradient alone, or its batch is not finite.
FAULTS = ("loss nan", "loss inf", "gradient nan", "batch nan", "batch inf")


class Regression(nnx.Module):
    """A number from a row of a table and a vector."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table = nnx.Embed(ROWS, WIDTH, rngs=rngs)
        self.dense = nnx.Linear(WIDTH, 1, rngs=rngs)


class RegressionTask:
    """Five steps an epoch.

    Args:
        faults: what is wrong with which step.
    """

    name, tables, labels_per_example, steps_per_epoch = "regression", {"table.embedding": "row"}, 1, 5
    rate_factors = MappingProxyType({})

    def __init__(self, faults: Mapping[int, str] | None = None) -> None:
        self.faults, self.graphdef = dict(faults or {}), None

    def init(self, key: jax.Array) -> nnx.State:
        return nnx.state(Regression(nnx.Rngs(key)), nnx.Param)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        random, fault = np.random.default_rng(step), self.faults.get(step, "")
        found = unique_ids([random.integers(1, ROWS, EXAMPLES)], ROWS, multiple_of=EXAMPLES + 1)
        x_BD = random.normal(size=(EXAMPLES, WIDTH)).astype(np.float32)
        if fault.startswith("batch"):
            x_BD[3, 2] = float(fault.split()[1])
        poison = np.float32(fault.split()[1] if fault.startswith("loss") else 0.0)
        root = np.float32(0.0 if fault.startswith("gradient") else 1.0)
        return Batch((x_BD, found.places[0]), (poison, root), {"row": found.ids_P})

    def examples(self, step: int) -> dict[str, Any]:
        return {"rows": [step]}

    def loss(self, parameters: nnx.State, batch: Batch, key: jax.Array) -> LossSum:
        (x_BD, place_B), (poison, root), named = batch.split, batch.shared, nnx.to_pure_dict(parameters)
        row_BD = named["table"]["embedding"][place_B]
        error_B = (x_BD * row_BD) @ named["dense"]["kernel"][:, 0] + named["dense"]["bias"][0] - x_BD.sum(1)
        # Of a root of zero, the value is finite and the gradient is not.
        norm = jnp.sqrt(root * jnp.square(named["dense"]["kernel"]).sum())
        return LossSum(jnp.square(error_B).sum() + norm + poison, jnp.asarray(len(x_BD)))

    def evaluate(self, parameters: nnx.State) -> tuple[float, dict[str, float]]:
        value = float(jnp.square(nnx.to_pure_dict(parameters)["dense"]["kernel"]).sum())
        return value, {"size": value}


def train(
    workdir: Path, task: RegressionTask, *, epochs: int = 4, stopping: Stopping | None = None, **options: Any
) -> FitResult:
    """Train with lazy Adam on the table, weight decay and a moving average: everything that a step may move."""
    rule = TableOptimizerConfig("lazy_adam", weight_decay=0.01)
    optimizer = OptimizerConfig(learning_rate=0.05, warmup_steps=0, schedule="constant", weight_decay=0.01, tables=rule)
    config = TrainConfig(epochs=epochs, optimizer=optimizer, **options)
    workdir.mkdir(exist_ok=True)
    parallel = DataParallel(jax.local_devices()[:1])
    return fit(task, config, workdir=workdir, seed=0, parallel=parallel, stopping=stopping)
