"""Tenrec itself: the licensed CSV files, placed by you in `data/tenrec/`.

Command:   python experiments/launch.py --config=experiments/configs/tenrec.py:qb_video
Hardware:  one GPU, memory for arrays over all rows
Time:      not known, never trained
Expected:  not known. Neither a licensed file nor a GPU was at hand: the format was proven on files that the synthetic twin writes, and of
           the models only `--dry_run` has been run. Sound models of the 1M file reach a click AUC of .76 to .80 on true exposures.
"""

from ml_collections import ConfigDict

from tenrec_jax.config import default_config, to_config_dict
from tenrec_jax.errors import UserError

FILES = {"qb_video": "QB-video.csv", "qk_video": "QK-video.csv", "ctr_1m": "ctr_data_1M.csv"}
VARIANTS = {
    "qb_video": "Tenrec's QB-video, 2.4 million rows.",
    "qk_video": "Tenrec's QK-video, 493 million rows.",
    "ctr_1m": "Tenrec's CTR file of a million users, 120 million rows.",
}


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
