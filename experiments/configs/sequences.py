"""Sequential recommendation from clicks alone: leave-one-out over the full catalogue.

The log is a text file, one user a line (`user item item ...`, in time order) or one event a line (`user item`).

Command:   python experiments/launch.py --config=experiments/configs/sequences.py --config.data.path=Beauty.txt
Hardware:  2 CPU cores
Time:      15 to 27 minutes for Amazon Beauty
Expected:  Amazon Beauty, test, items already seen excluded: recall@10 of .096 and NDCG@10 of .057 by retrieval, .102 and .062 by both
           stages; experiments/RESULTS.md has them beside what others published.

Such logs hold no exposures without a click, so there is no true negative to learn a click probability from: no ranker is trained. The
second stage orders retrieval's candidates by co-visits too: what stands behind what in the training timelines.
"""

from ml_collections import ConfigDict

from tenrec_jax.config import default_config, to_config_dict


def get_config() -> ConfigDict:
    config = to_config_dict(default_config())
    config.name = "sequences"
    config.data.kind = "sequences"
    config.data.protocol = "leave_one_out"
    config.ranking.enabled = False
    config.ranking.co_visits = 200
    stage = config.retrieval
    stage.model.similarity = "cosine"
    stage.model.temperature = 0.1
    stage.model.features.max_length = 50
    stage.model.features.user_id = False
    stage.model.features.actions = False
    stage.model.features.dropout = 0.65
    stage.model.encoder.num_layers = 1
    stage.model.encoder.width = 256
    stage.model.encoder.hidden = 512
    stage.model.encoder.activation = "gelu"
    stage.model.encoder.normalize = True
    stage.model.encoder.pool_residual = True
    stage.model.encoder.dropout = 0.1
    stage.events_per_batch = 2048
    stage.loss = "softmax"
    stage.label_smoothing = 0.2
    stage.unknown_rate = 0.0
    stage.selection_users = 0
    stage.train.epochs = 45
    stage.train.evaluate_every = 3
    stage.train.patience = 2
    stage.train.average_decay = 0.995
    stage.train.optimizer.learning_rate = 3e-3
    stage.train.optimizer.warmup_steps = 0
    stage.train.optimizer.schedule = "constant"
    stage.train.optimizer.clip_norm = 0.0
    stage.train.optimizer.tables.kind = "lazy_adam"
    stage.train.optimizer.table_learning_rate = 3e-3
    return config
