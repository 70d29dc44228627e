"""A config of a run of both stages that takes seconds once it is compiled, on the log of --config.data.path."""

import dataclasses

from ml_collections import ConfigDict

from tenrec_jax.config import default_config, to_config_dict


def get_config() -> ConfigDict:
    """Width 8, one layer, dropout; eight evaluations of each stage, and so eight checkpoints."""
    config = default_config()

    def shrunk(stage):
        encoder = dataclasses.replace(stage.model.encoder, num_layers=1, width=8, num_heads=2, hidden=8)
        features = dataclasses.replace(stage.model.features, max_length=16)
        model = dataclasses.replace(stage.model, features=features, encoder=encoder)
        train = dataclasses.replace(stage.train, epochs=8, patience=0)
        return dataclasses.replace(stage, model=model, train=train, events_per_batch=96)

    return to_config_dict(
        dataclasses.replace(
            config,
            name="both_stages",
            retrieval=dataclasses.replace(shrunk(config.retrieval), negatives=16),
            ranking=shrunk(config.ranking),
            evaluation=dataclasses.replace(config.evaluation, resamples=50),
        )
    )
