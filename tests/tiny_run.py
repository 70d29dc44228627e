"""A config of a run that takes seconds once it is compiled, on the log of --config.data.path."""

import dataclasses

from ml_collections import ConfigDict

from tenrec_jax.config import default_config, to_config_dict


def get_config() -> ConfigDict:
    """Width 8, one layer, eight evaluations of retrieval; no ranking. Dropout is on."""
    config = default_config()
    encoder = dataclasses.replace(config.retrieval.model.encoder, num_layers=1, width=8, num_heads=2, hidden=8)
    features = dataclasses.replace(config.retrieval.model.features, max_length=16, init_scale=0.5)
    model = dataclasses.replace(config.retrieval.model, features=features, encoder=encoder)
    retrieval = dataclasses.replace(
        config.retrieval,
        model=model,
        train=dataclasses.replace(config.retrieval.train, epochs=8, patience=0),
        events_per_batch=96,
        negatives=16,
    )
    return to_config_dict(
        dataclasses.replace(
            config,
            name="tiny",
            retrieval=retrieval,
            ranking=dataclasses.replace(config.ranking, enabled=False),
            evaluation=dataclasses.replace(config.evaluation, resamples=50),
        )
    )
