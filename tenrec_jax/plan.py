"""What a run would do, told without doing it."""

import dataclasses
import itertools
import json

from clu import parameter_overview
from flax import nnx

from tenrec_jax import artifact
from tenrec_jax.config import STAGES, RunConfig
from tenrec_jax.models.features import Vocabulary
from tenrec_jax.step_costs import ExampleBatches, Program, StepCost, programs, step_cost
from tenrec_jax.training.metrics_writer import progress_bar
from tenrec_jax.training.parallel import DataParallel

# The size of the tables is the log's, which is not read here.
EXAMPLE_VOCABULARY = Vocabulary(users=10_001, items=100_001, genders=3, ages=8, categories=3, actions=4)
COLUMNS = ("argument", "output", "temporary", "peak")


def describe(config: RunConfig, parallel: DataParallel) -> str:
    """The configuration, the stages, both models' parameter tables and what their training steps cost, at an example size of the log.

    Raises:
        UserError: a batch cannot be divided into micro-batches.
    """
    source = config.data.path or f"a synthetic twin of {config.data.twin_rows:,} rows (seed {config.data.twin_seed})"
    stages = [stage for stage in STAGES if stage != "ranking" or config.ranking.enabled]
    models = {"two-tower": artifact.two_tower(config.retrieval.model, EXAMPLE_VOCABULARY)}
    features = {"two-tower": config.retrieval.model.features, "ranker": config.ranking.model.features}
    if config.ranking.enabled:
        models["ranker"] = artifact.ranker(config.ranking.model, EXAMPLE_VOCABULARY)
    lines = [
        json.dumps(dataclasses.asdict(config), indent=2),
        f"\nsource    {source}, read as {config.data.kind}",
        f"protocol  {config.data.protocol}",
        f"stages    {' -> '.join(stages)}",
    ]
    for name, model in models.items():
        overview = parameter_overview.get_parameter_overview(nnx.to_pure_dict(model.parameters), include_stats=False)
        size = f"{EXAMPLE_VOCABULARY.users - 1:,} users and {EXAMPLE_VOCABULARY.items - 1:,} items"
        lines += [f"\n{name}, for a log of {size}:", overview, *features[name].expected_collisions(EXAMPLE_VOCABULARY)]
    return "\n".join([*lines, *_costs(config, parallel)]) + "\n"


def _costs(config: RunConfig, parallel: DataParallel) -> list[str]:
    """A table a stage, a line a policy of rematerialisation."""
    costs: list[tuple[Program, StepCost]] = []
    to_compile = programs(config)
    with progress_bar(len(to_compile), "compile", unit="program") as bar:
        for program in to_compile:
            costs.append((program, step_cost(program, EXAMPLE_VOCABULARY, parallel)))
            bar.update()
    lines = []
    for stage, of_stage in itertools.groupby(costs, key=lambda pair: pair[0].stage):
        rows = list(of_stage)
        batch, length = ExampleBatches(rows[0][0].config, EXAMPLE_VOCABULARY, parallel.size).shape
        devices = f"{parallel.size} x {parallel.devices[0].device_kind}"
        lines += [
            f"\n{stage}, a training step of {batch} timelines of {length} events, on each device ({devices}):",
            f"{'rematerialisation':<28}{'GFLOP':>10}" + "".join(f"{name + ', MiB':>16}" for name in COLUMNS),
        ]
        for program, cost in rows:
            configured = " (configured)" if program.remat == program.config.model.encoder.remat else ""
            mebibytes = "".join(f"{getattr(cost, f'{name}_bytes') / 2**20:>16,.1f}" for name in COLUMNS)
            lines.append(f"{program.remat + configured:<28}{cost.flops / 1e9:>10,.1f}{mebibytes}")
    return lines
