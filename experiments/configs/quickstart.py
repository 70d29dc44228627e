"""Quick start: a synthetic twin of Tenrec's QB-video, both stages, evaluation and report.

Command:   python experiments/launch.py
Hardware:  2 CPU cores, 4 GiB of memory
Time:      3 to 4 minutes
Expected:  the ranker's click AUC above item rate and user rate, intervals apart, its GAUC .02 above item rate's, and retrieval's
           recall@10 above popularity; the tables in README.md are what was measured.
"""

from ml_collections import ConfigDict

from tenrec_jax.config import default_config, to_config_dict


def get_config() -> ConfigDict:
    config = to_config_dict(default_config())
    config.name = "quickstart"
    config.data.twin_rows = 150_000
    for stage in (config.retrieval, config.ranking):
        stage.events_per_batch = 2048
        stage.train.epochs = 6
        stage.train.optimizer.learning_rate = 2e-3
        # So small a log is soon learned by heart: start the items from who was shown what, and move them slowly.
        stage.model.features.item_start = "spectral"
        stage.train.optimizer.table_learning_rate = 2e-4
    config.retrieval.model.item_bias = True
    ranking = config.ranking
    ranking.train.epochs = 4
    # Of an item with a few rows, who saw it matters as much as who clicked; and frequent actions tell of rare ones.
    ranking.bias_start = "effects"
    ranking.model.crosses.layers = 2
    ranking.co_visits = 200
    ranking.pairwise_weight = 1.0
    ranking.train.average_decay = 0.98
    return config
