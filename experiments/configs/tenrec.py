"""Tenrec itself: the licensed CSV files, placed by you in `data/tenrec/`.

Variants:  qb_video (2.4 million rows), qk_video (493 million), ctr_1m (120 million).

Command:   python experiments/launch.py --config=experiments/configs/tenrec.py:qb_video
Hardware:  one GPU for the 12-layer ranker. Splits and evaluation hold arrays over all rows in memory.
Expected:  not known. No licensed file was at hand when this was written; the format was proven on files that the synthetic twin writes.
"""

from ml_collections import ConfigDict

from tenrec_jax.config import default_config, to_config_dict
from tenrec_jax.errors import UserError

FILES = {"qb_video": "QB-video.csv", "qk_video": "QK-video.csv", "ctr_1m": "ctr_data_1M.csv"}


def get_config(variant: str = "qb_video") -> ConfigDict:
    if variant not in FILES:
        raise UserError(f"tenrec.py has no variant {variant!r}; choose one of {', '.join(FILES)}.")
    config = to_config_dict(default_config())
    config.name = f"tenrec_{variant}"
    config.data.kind = variant
    config.data.path = f"data/tenrec/{FILES[variant]}"
    for stage in (config.retrieval, config.ranking):
        stage.model.features.max_length = 512
        stage.model.encoder.width = 128
        stage.model.encoder.hidden = 256
        stage.events_per_batch = 32_768
    config.ranking.model.encoder.num_layers = 12
    config.ranking.model.encoder.unroll = False
    config.ranking.model.encoder.remat = "dots_saveable"
    return config
