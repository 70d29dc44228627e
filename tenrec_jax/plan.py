"""What a run would do, told without doing it."""

import dataclasses
import json

from clu import parameter_overview
from flax import nnx

from tenrec_jax import artifact
from tenrec_jax.config import STAGES, RunConfig
from tenrec_jax.models.features import Vocabulary

# The size of the tables is the log's, which is not read here.
EXAMPLE_VOCABULARY = Vocabulary(users=10_001, items=100_001, genders=3, ages=8, categories=3, actions=4)


def describe(config: RunConfig) -> str:
    """The configuration, the stages and both models' parameter tables, at an example size of the log."""
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
    return "\n".join(lines) + "\n"
