"""Ranking on exposures with true negatives, to be held against the rivals of the ranker.

The rivals stand in `experiments/baselines`; `tune.py` there gives each of them the same tuning. The log is a synthetic
twin of Tenrec's QB-video of 2 million rows; `--config.data.kind` and `--config.data.path` name a real one.

Command:   python experiments/launch.py --config=experiments/configs/ranking.py
Hardware:  2 CPU cores, 4 GiB of memory
Time:      27 minutes, while other work took much of the machine
Expected:  the ranker's click AUC of .825 and GAUC of .757 above item rate and user rate (.80 and .71 together), intervals apart; AUC of
           share .77 and follow .75; experiments/RESULTS.md has more
"""

from ml_collections import ConfigDict

from tenrec_jax.config import default_config, to_config_dict


def get_config() -> ConfigDict:
    config = to_config_dict(default_config())
    config.name = "ranking"
    config.data.twin_rows = 2_000_000
    for stage in (config.retrieval, config.ranking):
        # What is shown next to what tells what an item is about, long before its clicks do.
        stage.model.features.item_start = "neighbours"
        stage.train.optimizer.table_learning_rate = 0.02
        stage.model.features.dropout = 0.1
        stage.model.encoder.dropout = 0.1
        stage.train.epochs = 2
    config.retrieval.model.item_bias = True
    ranking = config.ranking
    # Who clicks often and what is clicked often are told apart, and shrunk as far as the rows ask for: rates of rare actions are mostly
    # chance, and a rate is the lower the pickier the users were.
    ranking.bias_start = "effects"
    ranking.co_visits = 200
    ranking.pairwise_weight = 1.0
    # Whether a user likes a category is told by the user's own rates in it, and by little else.
    ranking.model.crosses.layers = 2
    ranking.train.optimizer.learning_rate = 6e-3
    # A second epoch teaches more only where ids move slowly: fast ones learn the first by heart.
    ranking.train.optimizer.table_learning_rate = 2e-3
    ranking.train.average_decay = 0.99
    return config
