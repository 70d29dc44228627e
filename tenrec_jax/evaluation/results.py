"""What `eval/val.json` and `eval/test.json` hold of each scorer: every metric with its interval."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.evaluation.evaluator import TargetRanks
from tenrec_jax.evaluation.metrics import coverage, gini, novelty
from tenrec_jax.evaluation.sampled import NEGATIVES, sampled_metrics
from tenrec_jax.evaluation.scorers import Scorer
from tenrec_jax.evaluation.statistics import bootstrap_binary, bootstrap_means
from tenrec_jax.evaluation.user_metrics import retrieval_metrics

SAMPLED = f"retrieval_1+{NEGATIVES}"
BINARY_METRICS = ("auc", "gauc", "log_loss", "ece", "pcoc")
OF_ORDER = ("auc", "gauc")


def scorer_results(
    scorer: Scorer, table: Interactions, rows: np.ndarray, exposures_N1: np.ndarray, *, seed: int, resamples: int
) -> dict[str, Any]:
    """What is known of one scorer: "retrieval" and "lists" where it retrieves, "ranking" where it ranks.

    Where every user has one target, "retrieval_1+99" has the metrics among that target and 99 others; see `evaluation.sampled`.

    Args:
        scorer: the model or a baseline.
        table: the log.
        rows: of the part that is evaluated.
        exposures_N1: training rows of each item, for the novelty of lists.
        seed, resamples: of the bootstrap.
    """
    results: dict[str, Any] = {}
    if scorer.ranks is not None:
        results["retrieval"] = retrieval_results(scorer.ranks, seed=seed, resamples=resamples)
        if len(np.unique(scorer.ranks.user)) == len(scorer.ranks.user):
            results[SAMPLED] = sampled_results(scorer.ranks, seed=seed, resamples=resamples)
        results["lists"] = list_results(scorer.ranks.lists_UK, exposures_N1)
    if scorer.score is not None:
        ranking = ranking_results(table, rows, scorer.score(rows), seed=seed, resamples=resamples)
        if not scorer.is_probability:
            kept = {*next(iter(ranking.values()))} - set(BINARY_METRICS) | set(OF_ORDER)
            ranking = {action: {key: entry[key] for key in entry if key in kept} for action, entry in ranking.items()}
        results["ranking"] = ranking
    return results


def retrieval_results(ranks: TargetRanks, *, seed: int, resamples: int) -> dict[str, Any]:
    """Retrieval metrics with 95 % intervals."""
    _, values = retrieval_metrics(ranks.user, ranks.item, ranks.places)
    estimates = bootstrap_means(values, seed=seed, resamples=resamples)
    return {name: estimate.to_json() for name, estimate in estimates.items()}


def sampled_results(ranks: TargetRanks, *, seed: int, resamples: int) -> dict[str, Any]:
    """Metrics among the target and sampled negatives with 95 % intervals; of users with one target each."""
    values = sampled_metrics(ranks.places, ranks.candidates)
    estimates = bootstrap_means(values, seed=seed, resamples=resamples)
    return {name: estimate.to_json() for name, estimate in estimates.items()}


def list_results(lists_UK: np.ndarray, exposures_N1: np.ndarray) -> dict[str, Any]:
    """What the lists of all evaluated users hold; see `metrics.coverage`, `metrics.novelty` and `metrics.gini`."""
    num_items = len(exposures_N1) - 1
    return {
        "k": lists_UK.shape[1],
        "users": len(lists_UK),
        "coverage": coverage(lists_UK, num_items),
        "novelty_bits": novelty(lists_UK, exposures_N1),
        "gini": gini(lists_UK, num_items),
    }


def ranking_results(
    table: Interactions, rows: np.ndarray, score_RA: np.ndarray, *, seed: int, resamples: int
) -> dict[str, Any]:
    """Metrics of each action on the given rows, of which `score_RA` has a line each, with 95 % intervals."""
    results = {}
    for column, action in enumerate(table.actions):
        label_R = table.labels_RA[rows, column]
        estimates = bootstrap_binary(label_R, score_RA[:, column], table.user_R[rows], seed=seed, resamples=resamples)
        results[action] = {name: getattr(estimates, name).to_json() for name in BINARY_METRICS}
        results[action] |= {"gauc_coverage": estimates.gauc_coverage, "rows": estimates.rows, "users": estimates.users}
        results[action]["positives"] = int(label_R.sum())
    return results


def reachable_gain(
    ranking: Mapping[str, Any], popularity: Mapping[str, Any], oracle: Mapping[str, Any]
) -> dict[str, dict[str, float | None]]:
    """(model - popularity) / (oracle - popularity) of AUC and GAUC of each action: the share of the gain over popularity that the true
    probabilities leave to be had. None where one of the three is not defined, or the oracle is not above popularity.
    """
    shares: dict[str, dict[str, float | None]] = {}
    for action, metrics in ranking.items():
        shares[action] = {}
        for metric in OF_ORDER:
            model, floor, ceiling = (
                entry[action][metric]["value"] for entry in ({action: metrics}, popularity, oracle)
            )
            defined = None not in (model, floor, ceiling) and ceiling > floor
            shares[action][metric] = (model - floor) / (ceiling - floor) if defined else None
    return shares
