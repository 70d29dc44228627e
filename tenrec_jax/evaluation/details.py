"""What lies behind the numbers of a part: ROC and reliability curves of each action, and metrics by kind of user and item."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.evaluation.baselines import TrainCounts, popularity_scores
from tenrec_jax.evaluation.evaluator import TargetRanks
from tenrec_jax.evaluation.metrics import calibration, equal_mass_bins, select_rows
from tenrec_jax.evaluation.places import Places
from tenrec_jax.evaluation.statistics import bootstrap_binary, bootstrap_means
from tenrec_jax.evaluation.user_metrics import retrieval_metrics

HISTORY_EDGES = (0, 1, 10, 30, 100, 300)  # rows of the user in training, from which each group begins
SHOWN = ("recall@20", "ndcg@20")
_POINTS = 101

Floats = NDArray[np.float64]


def roc_curve(labels: NDArray, scores: NDArray, *, points: int = _POINTS) -> tuple[Floats, Floats]:
    """False and true positive rates, from (0, 0) to (1, 1), at about `points` of the distinct scores, spread evenly along the curve.

    Empty where one of the classes is absent. The curve through the corners of all distinct scores encloses the AUC; one through fewer of
    them lies close to it.
    """
    positive, scores, _ = select_rows(labels, scores)
    if not 0 < np.count_nonzero(positive) < len(positive):
        return np.zeros(0), np.zeros(0)
    order = np.argsort(-scores, kind="stable")
    last_of_score = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    true = np.append(0, np.cumsum(positive[order])[last_of_score])
    false = np.append(0, 1 + last_of_score) - true
    true_rate, false_rate = true / true[-1], false / false[-1]
    way = true_rate + false_rate
    kept = np.unique(np.searchsorted(way, np.linspace(0, way[-1], points)))
    return false_rate[kept], true_rate[kept]


def curves(table: Interactions, rows: NDArray, score_RA: NDArray) -> dict[str, Any]:
    """By action: "roc" with "false" and "true" rates, and "reliability" with "predicted", "observed" and "rows" by bin."""
    found: dict[str, Any] = {}
    for column, action in enumerate(table.actions):
        label_R, score_R = table.labels_RA[rows, column], score_RA[:, column]
        false, true = roc_curve(label_R, score_R)
        bins = calibration(label_R, score_R)
        reliability = {"predicted": bins.predicted, "observed": bins.observed, "rows": bins.rows}
        found[action] = {
            "roc": {"false": false.tolist(), "true": true.tolist()},
            "reliability": {name: values.tolist() for name, values in reliability.items()},
        }
    return found


def slices(
    table: Interactions,
    counts: TrainCounts,
    rows: NDArray,
    click_R: NDArray | None,
    ranks: TargetRanks,
    *,
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    """Metrics of the model by the user's training rows (0 are new users) and by the item's training clicks.

    Args:
        table: the log.
        counts: of the training rows.
        rows: of the part.
        click_R: predicted probability of a click on each, or None without a ranker.
        ranks: of the clicked targets.
        seed, resamples: of the bootstrap.

    Returns:
        By kind and group: rows and targets, and the estimates "auc", "gauc" and "log_loss" of the click and `SHOWN` of retrieval.
    """
    bootstrap = {"seed": seed, "resamples": resamples}
    groups: dict[str, Any] = {}
    for kind, name, of_rows, of_targets in _groups(table, counts, rows, ranks):
        entry: dict[str, Any] = {"rows": int(of_rows.sum()), "targets": int(of_targets.sum())}
        if click_R is not None and of_rows.any():
            chosen = rows[of_rows]
            found = bootstrap_binary(table.labels_RA[chosen, 0], click_R[of_rows], table.user_R[chosen], **bootstrap)
            entry |= {metric: getattr(found, metric).to_json() for metric in ("auc", "gauc", "log_loss")}
        if of_targets.any():
            places = Places(*(side[of_targets] for side in ranks.places))
            _, values = retrieval_metrics(ranks.user[of_targets], ranks.item[of_targets], places)
            estimates = bootstrap_means({metric: values[metric] for metric in SHOWN}, **bootstrap)
            entry |= {metric: estimate.to_json() for metric, estimate in estimates.items()}
        groups.setdefault(kind, {})[name] = entry
    return groups


def _groups(
    table: Interactions, counts: TrainCounts, rows: NDArray, ranks: TargetRanks
) -> Iterator[tuple[str, str, NDArray[np.bool_], NDArray[np.bool_]]]:
    """Kind and name of each group with its rows and its targets."""
    length_U1 = counts.user_exposures_U1
    group_U1 = np.searchsorted(HISTORY_EDGES, length_U1, side="right") - 1
    for number, low in enumerate(HISTORY_EDGES):
        high = HISTORY_EDGES[number + 1] - 1 if number + 1 < len(HISTORY_EDGES) else None
        name = "0 (new users)" if not low else f"{low} and more" if high is None else f"{low} to {high}"
        of_rows, of_targets = group_U1[table.user_R[rows]] == number, group_U1[ranks.user] == number
        if of_rows.any():
            yield "training rows of the user", name, of_rows, of_targets
    clicks_N1 = popularity_scores(counts)
    # Tenths of the rows, not of the items: most items have next to no rows. Items with as many clicks stay together.
    tenth_R = equal_mass_bins(clicks_N1[table.item_R[rows]], 10)
    item_tenth = np.zeros(table.num_items + 1, np.int64)
    item_tenth[table.item_R[rows]] = tenth_R
    for number in np.unique(tenth_R):
        of_rows, of_targets = tenth_R == number, item_tenth[ranks.item] == number
        clicks = clicks_N1[table.item_R[rows[of_rows]]]
        name = f"{number + 1}: {clicks.min():.0f} to {clicks.max():.0f}"
        yield "training clicks of the item, by tenth of the rows", name, of_rows, of_targets
