"""QB-video with the hyperparameters of the original PyTorch system.

Width 512, 1,024 hidden, 12 layers of 8 heads, L2-normalised pools, sinusoidal positions, 127 negatives; batches of 8,192 events in
ranking and 1,024 in retrieval, with activations computed again in the ranker's backward pass. What it learns from differs: the ranker
from every logged exposure with its real labels, not from 127 uniform items marked as not clicked; those negatives are retrieval's.

Command:   python experiments/launch.py --config=experiments/configs/original.py
Hardware:  one GPU
Time:      not known, never trained
Expected:  not known. Neither the licensed file nor a GPU was at hand: of this, only `--dry_run` has been run. It says that the ranker's
           step takes 2.3 GiB at 100,000 items, and 13.9 GiB where activations are kept. The original's AUC of .93 is no target: it is
           taken over 127 uniform items for each row, where item frequency alone reaches as much.
"""

from ml_collections import ConfigDict

from tenrec_jax.config import default_config, to_config_dict


def get_config() -> ConfigDict:
    config = to_config_dict(default_config())
    config.name = "original"
    config.data.kind = "qb_video"
    config.data.path = "data/tenrec/QB-video.csv"
    for stage in (config.retrieval, config.ranking):
        stage.model.features.positions = "sinusoidal"
        stage.model.encoder.width = 512
        stage.model.encoder.hidden = 1024
        stage.model.encoder.num_heads = 8
        stage.model.encoder.normalize = True
        stage.model.encoder.recency_bias = False
        stage.model.features.dropout = 0.1
        stage.model.encoder.dropout = 0.1
    config.retrieval.model.similarity = "cosine"
    config.retrieval.negatives = 127
    config.retrieval.events_per_batch = 1024
    config.ranking.model.encoder.num_layers = 12
    config.ranking.model.encoder.activation = "gelu"
    config.ranking.model.encoder.unroll = False
    config.ranking.model.encoder.remat = "nothing_saveable"
    config.ranking.events_per_batch = 8192
    return config
