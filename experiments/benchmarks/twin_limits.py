"""How near to the true probabilities of a synthetic twin anything can come that learns from its rows.

    python experiments/benchmarks/twin_limits.py --run runs/ranking

The true probabilities know what no log tells: how each item and each user is disposed. Here a scorer knows all that is planted but one
kind of disposition, and of that one what the rows tell, by Bayes' rule with the true prior. No ranker can be expected above it:

    click                 the items' biases are the most probable ones given all training rows; users, tastes, matches and recency exact
    like, share, follow   the users' propensities to the three are known from all rows before the one that is scored; clicks, matches and
                          intercepts exactly

Between the best simple baseline and the true probabilities, the table says how much of the way the run's ranker goes, and how much of it
this scorer does. The twin is played again, by the same seed; the run has to hold its rows as they were written.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, logsumexp
from tqdm import tqdm

from tenrec_jax.config import RunConfig, from_mapping
from tenrec_jax.data.interactions import Interactions
from tenrec_jax.data.protocols import Part, Split
from tenrec_jax.data.synthetic import Chunk, play_twin
from tenrec_jax.data.twin_model import SHARED_PROPENSITY
from tenrec_jax.data.twin_play import ACTION_MATCH
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.results import scorer_results
from tenrec_jax.evaluation.scorers import Scorer
from tenrec_jax.evaluation.tables import aligned, interval
from tenrec_jax.files import read_json
from tenrec_jax.run_data import RunData

Floats = NDArray[np.float64]

# Standard deviations of a propensity that its grid covers on each side, and the grid's step; nodes of what the three have in common.
SPREAD, STEP, NODES = 5.0, 0.04, 33
NEWTON_STEPS = 30
METRICS = (("click", "gauc"), ("like", "auc"), ("share", "auc"), ("follow", "auc"))


class Planted(NamedTuple):
    """What is planted, for R rows of N items.

    Attributes:
        item_R: the items' places in the catalogue. click_R: the true logits of clicks. match_R: matches of taste and item.
        bias_N: of the items. expected_N: what their popularity tells of it. variance: what it does not.
        spread_RA: standard deviations of the users' propensities to like, share and follow. action_RA2: the intercepts of these, without
            and with a click.
    """

    item_R: NDArray[np.int64]
    click_R: Floats
    match_R: Floats
    bias_N: Floats
    expected_N: Floats
    variance: float
    spread_RA: Floats
    action_RA2: Floats


def main(arguments: Sequence[str]) -> int:
    """Print the table.

    Returns:
        The exit code: 0 done, 2 wrong use or bad input.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="workdir of a finished run on a synthetic twin")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(arguments)
    try:
        results = limits(options.run)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(text(results) + "\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def limits(run: Path) -> list[dict[str, Any]]:
    """A line for each of `METRICS`: the baseline, the ranker, the limit, the true probabilities, and shares of the gap.

    Raises:
        UserError: the run is unfinished, has no ranker, or is not of a twin as it was written.
    """
    config, test = from_mapping(_read(run / "config.json")), _read(run / "eval" / "test.json")
    if "oracle" not in test:
        raise UserError(
            f"{run}/eval/test.json has no true probabilities: it is no run of a ranker on a synthetic twin."
        )
    data = RunData(config, run / "table", 1)
    table, rows = data.table, data.split.rows(Part.TEST)
    planted = plant(config, table)
    limit_RA = np.zeros(table.labels_RA.shape, np.float32)
    limit_RA[rows, 0] = known_users(planted, table, data.split.rows(Part.TRAIN), rows)
    limit_RA[rows, 1:] = known_clicks(planted, table, data.split, rows)
    found = scorer_results(
        Scorer("limit", None, lambda rows: limit_RA[rows]),
        table,
        rows,
        data.counts.item_exposures_N1,
        seed=config.seed,
        resamples=config.evaluation.resamples,
    )["ranking"]
    return [_line(action, metric, test, found) for action, metric in METRICS]


def _line(action: str, metric: str, test: Mapping[str, Any], limit: Mapping[str, Any]) -> dict[str, Any]:
    baselines = [
        b["ranking"][action][metric]
        for b in test["baselines"].values()
        if metric in b.get("ranking", {}).get(action, {})
    ]
    baseline = max(baselines, key=lambda found: found["value"])
    truth, ranker = test["oracle"]["ranking"][action][metric], test["ranking"][action][metric]

    def closed(value: float) -> float:
        return (value - baseline["value"]) / (truth["value"] - baseline["value"])

    known = limit[action][metric]
    return {
        "metric": f"{action} {metric}",
        "baseline": baseline,
        "ranker": ranker,
        "limit": known,
        "truth": truth,
        "closed_by_ranker": closed(ranker["value"]),
        "closed_by_limit": closed(known["value"]),
    }


def text(results: Sequence[Mapping[str, Any]]) -> str:
    """The table for a console."""
    header = [
        "",
        "best simple baseline",
        "ranker",
        "limit",
        "true probabilities",
        "ranker's part of the way",
        "limit's",
    ]
    columns = ("baseline", "ranker", "limit", "truth")
    lines = [
        [
            line["metric"],
            *(interval(line[name]) for name in columns),
            f"{line['closed_by_ranker']:.0%}",
            f"{line['closed_by_limit']:.0%}",
        ]
        for line in results
    ]
    return "\n".join(aligned([header, *lines]))


def plant(config: RunConfig, table: Interactions) -> Planted:
    """What is planted in a run's twin, played again.

    Raises:
        UserError: the table does not hold the twin's rows as they were written.
    """
    twin = play_twin(config.data.kind, config.data.twin_rows, config.data.twin_seed)
    chunks = list(tqdm(twin.chunks, desc="playing the twin", unit="chunk", leave=False))
    labels_RA = np.concatenate([chunk.labels_RA for chunk in chunks])
    item_R = np.concatenate([chunk.item_R for chunk in chunks])
    # Both number items by themselves: each number here has one there.
    pairs = len(np.unique(item_R * (table.num_items + 1) + table.item_R)) if len(item_R) == table.num_rows else 0
    if pairs != table.num_items or not np.array_equal(labels_RA, table.labels_RA):
        raise UserError(
            "The run's table does not hold the rows of its twin as they were written: keep duplicates, and all rows."
        )
    bias_N, share_N = twin.catalogue.bias_N.astype(np.float64), np.diff(twin.catalogue.edge_N)
    slope, intercept = np.polyfit(np.log(share_N), bias_N, 1)
    expected_N = intercept + slope * np.log(share_N)
    return Planted(
        item_R,
        logit(np.concatenate([chunk.truth_RA[:, 0] for chunk in chunks]).astype(np.float64)),
        np.concatenate([chunk.match_R for chunk in chunks]),
        bias_N,
        expected_N,
        float((bias_N - expected_N).var()),
        _of_crowds(chunks, [np.array(crowd.propensity) for crowd in twin.recipe.crowds]),
        _of_crowds(chunks, [solved.action_A2 for solved in twin.intercepts]),
    )


def _of_crowds(chunks: Sequence[Chunk], values: Sequence[Floats]) -> Floats:
    """The crowds' values, for each row."""
    return np.concatenate([np.repeat(values[chunk.crowd][None], len(chunk.item_R), axis=0) for chunk in chunks])


def known_users(planted: Planted, table: Interactions, train: NDArray[np.int64], rows: NDArray[np.int64]) -> Floats:
    """P(click) of rows, with the most probable bias of each item given the training rows, and all else exactly."""
    item_T, label_T = planted.item_R[train], table.labels_RA[train, 0]
    others_R = planted.click_R - planted.bias_N[planted.item_R]
    bias_N, items = planted.expected_N.copy(), len(planted.bias_N)
    for _ in range(NEWTON_STEPS):
        p_T = expit(others_R[train] + bias_N[item_T])
        slope_N = np.bincount(item_T, label_T - p_T, items) - (bias_N - planted.expected_N) / planted.variance
        bias_N += slope_N / (np.bincount(item_T, p_T * (1 - p_T), items) + 1 / planted.variance)
    return expit(others_R[rows] + bias_N[planted.item_R[rows]])


def known_clicks(planted: Planted, table: Interactions, split: Split, rows: NDArray[np.int64]) -> Floats:
    """P(action) [r, A] of like, share and follow of rows, in the order of `rows`, each given the labels of the user's rows before it."""
    result_RA = np.zeros((table.num_rows, len(ACTION_MATCH)))
    for user in tqdm(np.unique(table.user_R[rows]), desc="users' propensities", unit="user", leave=False):
        first, last = np.searchsorted(table.user_R, [user, user + 1])
        block = slice(first, last)
        scored_T = split.part_R[block] == Part.TEST
        offset_TA2 = planted.action_RA2[block] + (ACTION_MATCH * planted.match_R[block, None])[..., None]
        labels_TA, click_T = table.labels_RA[block, 1:], table.labels_RA[block, 0]
        expected_TA = expected_actions(
            planted.spread_RA[first], offset_TA2, labels_TA, click_T, expit(planted.click_R[block]), scored_T
        )
        result_RA[np.flatnonzero(scored_T) + first] = expected_TA
    return result_RA[rows]


def expected_actions(
    spread_A: Floats,
    offset_TA2: Floats,
    label_TA: NDArray[np.integer],
    click_T: NDArray[np.integer],
    rate_T: Floats,
    scored_T: NDArray[np.bool_],
) -> Floats:
    """P(action) [s, A] of a user's scored rows, each given the labels of all rows before it.

    The propensities are `spread_a (sqrt(c) f + sqrt(1 - c) e_a)` with standard normals f and e_a: given f they are independent, so that
    each has a grid of its own, and f nodes of Gauss and Hermite.

    Args:
        spread_A: standard deviation of each propensity.
        offset_TA2: the rest of the logits of each action, without and with a click.
        label_TA: of the actions. click_T: of the click. rate_T: the probability of the click.
        scored_T: the rows.
    """
    node_F, weight_F = np.polynomial.hermite_e.hermegauss(NODES)
    grid_G = np.arange(-SPREAD, SPREAD + STEP / 2, STEP)
    own = (grid_G - np.sqrt(SHARED_PROPENSITY) * node_F[:, None]) / np.sqrt(1 - SHARED_PROPENSITY)
    prior_FG = np.exp(-(own**2) / 2)
    prior_FG /= prior_FG.sum(axis=1, keepdims=True)
    evidence, expected = [], []
    for spread, offset_T2, label_T in zip(spread_A, offset_TA2.swapaxes(0, 1), label_TA.T, strict=True):
        shown_T = np.where(click_T, offset_T2[:, 1], offset_T2[:, 0])
        logit_TG = shown_T[:, None] + spread * grid_G
        log_p_TG = np.where(label_T[:, None], logit_TG, 0.0) - np.logaddexp(0.0, logit_TG)
        before_SG = (np.cumsum(log_p_TG, axis=0) - log_p_TG)[scored_T]
        most_S1 = before_SG.max(axis=1, keepdims=True)
        likelihood_SG = np.exp(before_SG - most_S1)
        rate_S1 = rate_T[scored_T, None]
        with_click, without = (expit(offset_T2[scored_T, k, None] + spread * grid_G) for k in (1, 0))
        p_SG = rate_S1 * with_click + (1 - rate_S1) * without
        evidence.append(likelihood_SG @ prior_FG.T)
        expected.append((likelihood_SG * p_SG) @ prior_FG.T)
    with np.errstate(divide="ignore"):
        log_evidence_ASF = np.log(np.stack(evidence))
    posterior_SF = np.log(weight_F) + log_evidence_ASF.sum(axis=0)
    posterior_SF = np.exp(posterior_SF - logsumexp(posterior_SF, axis=1, keepdims=True))
    given_ASF = np.stack(expected) / np.maximum(np.stack(evidence), np.finfo(float).tiny)
    return (posterior_SF * given_ASF).sum(axis=-1).T


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing: the run is not finished. Run its command first.")
    return read_json(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
