"""What is evaluated: the model, and the baselines that stand beside it, all in one form."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.evaluation.baselines import (
    TrainCounts,
    item_rate,
    item_user_rate,
    popularity_scores,
    recency_scorer,
    recent_clicks,
    user_rate,
)
from tenrec_jax.evaluation.evaluator import RetrievalEvaluator, TargetRanks

MODEL, BOTH, POPULARITY, RECENCY, ORACLE = "model", "both_stages", "popularity", "recency", "oracle"
LIST_LENGTH = 20

ScoreRows = Callable[[np.ndarray], NDArray[np.float32]]


class Scorer(NamedTuple):
    """One way to order items and to predict actions.

    Attributes:
        name: `MODEL`, `BOTH`, `ORACLE` or a baseline's name.
        ranks: of the clicked targets over the full catalogue, with the lists of recommended items; None where it retrieves nothing.
        score: from row numbers [r] of the table to a score for each action, float32 [r, A]; None where it ranks nothing. What the metrics
            say is said of these float32, which `predictions` keeps.
        is_probability: whether the scores are probabilities; if not only their order means anything.
    """

    name: str
    ranks: TargetRanks | None
    score: ScoreRows | None
    is_probability: bool = True


def baseline_scorers(
    table: Interactions, train_rows: np.ndarray, counts: TrainCounts, evaluator: RetrievalEvaluator, *, ranking: bool
) -> Iterator[Scorer]:
    """The baselines, all counted in the training rows: popularity and recency retrieve; where exposures are logged (`ranking`),
    popularity, item rate, user rate and both together rank.
    """
    popularity_N1 = popularity_scores(counts)
    popular = evaluator.rank(
        lambda users: np.broadcast_to(popularity_N1[1:], (len(users), table.num_items)), list_length=LIST_LENGTH
    )
    # Clicks over the most clicked item's: only its order means anything.
    share_N1 = popularity_N1 / popularity_N1.max()

    def by_popularity(rows: np.ndarray) -> NDArray[np.float32]:
        share_r = share_N1[table.item_R[rows]].astype(np.float32)
        return np.repeat(share_r[:, None], len(table.actions), axis=1)

    yield Scorer(POPULARITY, popular, by_popularity if ranking else None, is_probability=False)
    recency = recency_scorer(table, train_rows, recent_clicks(table, train_rows))
    yield Scorer(RECENCY, evaluator.rank(recency, list_length=LIST_LENGTH), None)
    if not ranking:
        return
    item_N1A, user_U1A, global_A = (
        np.stack([rate(counts, action) for action in table.actions], axis=-1)
        for rate in (item_rate, user_rate, lambda counts, action: user_rate(counts, action)[0])
    )
    yield Scorer("item_rate", None, lambda rows: item_N1A[table.item_R[rows]].astype(np.float32))
    yield Scorer("user_rate", None, lambda rows: user_U1A[table.user_R[rows]].astype(np.float32))
    yield Scorer(
        "item_user_rate",
        None,
        lambda rows: item_user_rate(item_N1A[table.item_R[rows]], user_U1A[table.user_R[rows]], global_A).astype(
            np.float32
        ),
    )
