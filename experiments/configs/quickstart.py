"""Quick start: a synthetic twin of Tenrec's QB-video, both stages, evaluation and report.

Command:   python experiments/launch.py
Hardware:  2 CPU cores, 4 GiB of memory; under 4 minutes.
Expected:  the ranker's click AUC and GAUC above item rate and user rate, retrieval's recall@10 several times popularity's.
"""

from ml_collections import ConfigDict

from tenrec_jax.config import default_config, to_config_dict


def get_config() -> ConfigDict:
    config = to_config_dict(default_config())
    config.name = "quickstart"
    return config
