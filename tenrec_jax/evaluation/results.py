"""What `eval/val.json` and `eval/test.json` hold: every metric with its interval, the baselines beside it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.evaluation.baselines import TrainCounts, item_rate, popularity_scores, user_rate
from tenrec_jax.evaluation.evaluator import RetrievalEvaluator, TargetRanks
from tenrec_jax.evaluation.statistics import bootstrap_binary, bootstrap_mean
from tenrec_jax.evaluation.user_metrics import retrieval_metrics


def retrieval_results(ranks: TargetRanks, *, seed: int, resamples: int) -> dict[str, Any]:
    """Retrieval metrics with 95 % intervals."""
    users, values = retrieval_metrics(ranks.user, ranks.item, ranks.places)
    return {
        name: bootstrap_mean(value_U, np.ones(len(users)), seed=seed, resamples=resamples).to_json()
        for name, value_U in values.items()
    }


def ranking_results(
    table: Interactions, rows: np.ndarray, probability_RA: np.ndarray, *, seed: int, resamples: int
) -> dict[str, Any]:
    """Metrics of each action on the given rows with 95 % intervals."""
    results = {}
    for column, action in enumerate(table.actions):
        estimates = bootstrap_binary(
            table.labels_RA[rows, column],
            probability_RA[rows, column],
            table.user_R[rows],
            seed=seed,
            resamples=resamples,
        )
        names = ("auc", "gauc", "log_loss", "ece", "pcoc")
        results[action] = {name: getattr(estimates, name).to_json() for name in names}
        results[action] |= {"gauc_coverage": estimates.gauc_coverage, "rows": estimates.rows, "users": estimates.users}
        results[action]["positives"] = int(table.labels_RA[rows, column].sum())
    return results


def baseline_results(
    table: Interactions,
    counts: TrainCounts,
    evaluator: RetrievalEvaluator,
    ranking_rows: np.ndarray | None,
    *,
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    """Popularity for retrieval and, where exposures are logged, popularity, item rate and user rate for ranking."""
    popularity_N1 = popularity_scores(counts)
    ranks = evaluator.rank(lambda users: np.broadcast_to(popularity_N1[1:], (len(users), table.num_items)))
    results: dict[str, Any] = {
        "popularity": {"retrieval": retrieval_results(ranks, seed=seed, resamples=resamples)},
    }
    if ranking_rows is None:
        return results
    item, user = table.item_R[ranking_rows], table.user_R[ranking_rows]
    scorers: dict[str, Callable[[str], np.ndarray]] = {
        # Clicks over the most clicked item's: only its order means anything.
        "popularity": lambda action: (popularity_N1 / popularity_N1.max())[item],
        "item_rate": lambda action: item_rate(counts, action)[item],
        "user_rate": lambda action: user_rate(counts, action)[user],
    }
    for name, scorer in scorers.items():
        score_RA = np.full(table.labels_RA.shape, np.nan)
        score_RA[ranking_rows] = np.stack([scorer(action) for action in table.actions], axis=1)
        metrics = ranking_results(table, ranking_rows, score_RA, seed=seed, resamples=resamples)
        order_alone: Sequence[str] = ("log_loss", "ece", "pcoc") if name == "popularity" else ()
        results.setdefault(name, {})["ranking"] = {
            action: {metric: value for metric, value in entry.items() if metric not in order_alone}
            for action, entry in metrics.items()
        }
    return results
