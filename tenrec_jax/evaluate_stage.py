"""The stages of a run that evaluate, `validate` and, once, `evaluate` on the test part; what `eval/` holds afterwards.

val.json  test.json                                  metrics with intervals, baselines beside them
val_predictions.parquet  predictions.parquet         from which they can be computed again (`evaluation.predictions`)
val_recommendations.parquet  recommendations.parquet
test_opened.json                                     when the test part was read, before it was
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tenrec_jax.artifact import Model
from tenrec_jax.co_visits import CoVisits
from tenrec_jax.config import RunConfig
from tenrec_jax.data.protocols import Part
from tenrec_jax.evaluation.details import curves, slices
from tenrec_jax.evaluation.evaluator import RetrievalEvaluator
from tenrec_jax.evaluation.opening import record_opening
from tenrec_jax.evaluation.oracle import oracle_scorer
from tenrec_jax.evaluation.predictions import Origin, write_predictions, write_recommendations
from tenrec_jax.evaluation.results import reachable_gain, scorer_results
from tenrec_jax.evaluation.scorers import BOTH, LIST_LENGTH, MODEL, POPULARITY, Scorer, baseline_scorers
from tenrec_jax.evaluation.statistics import bootstrap_means
from tenrec_jax.evaluation.two_stage import (
    RANK_ALL_ITEMS,
    CandidateRanker,
    SecondStage,
    ranks_of_both,
    two_stage_results,
)
from tenrec_jax.files import write_json
from tenrec_jax.order import Order
from tenrec_jax.retrieval.index import IndexConfig, ItemIndex, build_index, recall_against_exact
from tenrec_jax.run_data import RunData
from tenrec_jax.training.loop_clock import peak_memory

logger = logging.getLogger(__name__)

INDEX_DEPTH, INDEX_QUERIES = 100, 1000
DETAILS = "test_details.json"
RESULTS = {Part.VALIDATION: "val.json", Part.TEST: "test.json"}
PREFIXES = {Part.VALIDATION: "val_", Part.TEST: ""}
# How the run chose: no choice looks at a test row.
SELECTION = {
    "retrieval": "the epoch of the best NDCG@10 on validation clicks",
    "index": "the cheapest setting that reaches the recall on queries of validation users",
    "ranking": "the epoch of the best mean of click AUC and GAUC on validation rows",
    "order": "with co-visits: the powers under which validation users' next clicks are most probable",
}


@dataclass(frozen=True, eq=False)
class Models:
    """What a run has made: ranker and co-visits are None where there are none; `vectors_ND` are those of items 1..N."""

    two_tower: Model
    ranker: Model | None
    co_visits: CoVisits | None
    order: Order
    vectors_ND: np.ndarray
    index: ItemIndex

    @property
    def second_stage_alone(self) -> bool:
        """Whether candidates are ordered without a ranker, which takes no time: then the whole catalogue can be."""
        return self.ranker is None and self.co_visits is not None


def evaluate(
    config: RunConfig,
    workdir: Path,
    data: RunData,
    models: Models,
    part: Part,
    seconds: Mapping[str, float],
    truth: Path | None,
    changes: Sequence[Mapping[str, Any]],
) -> None:
    """Evaluate a part and write its files.

    Args:
        config: of the run.
        workdir: whose `eval/` is written.
        data: the run's.
        models: the run's.
        part: VALIDATION, or TEST, which is written down before it is read.
        seconds: of the stages so far.
        truth: file of the true probabilities, where the log is a synthetic twin.
        changes: of configuration, data or code while the run went on.
    """
    opened = record_opening(workdir) if part == Part.TEST else None
    results = _Evaluation(config, workdir, data, models, part).results(truth)
    results |= {"selection": SELECTION, "seconds": dict(seconds), "changes_while_running": list(changes)}
    write_json(workdir / "eval" / RESULTS[part], results | ({"test_opened": opened} if opened else {}))


def provenance_of(config: RunConfig, data: RunData) -> dict[str, Any]:
    """What results say first of all: of which data, split and seed they are."""
    split = data.split
    return {
        "protocol": split.protocol,
        "seed": config.seed,
        "data_sha256": data.table.sha256,
        "split_sha256": split.sha256,
        "split_seed": split.seed,
        "is_synthetic": not config.data.path,
    }


def origin_of(config: RunConfig, data: RunData, part: Part) -> Origin:
    """What the predictions on a part are of."""
    return Origin(
        part=part.name.lower(),
        protocol=data.split.protocol,
        data_sha256=data.table.sha256,
        split_sha256=data.split.sha256,
        exclude_seen=config.evaluation.exclude_seen,
        catalogue=data.table.num_items,
        actions=data.table.actions,
    )


def second_stage(
    config: RunConfig, data: RunData, models: Models, part: Part, evaluator: RetrievalEvaluator
) -> SecondStage:
    """What orders candidates for a part's users, who have seen the parts before it."""
    ranker, serving = None, config.serving
    if models.ranker is not None:
        features = config.ranking.model.features
        ranker = CandidateRanker(
            *models.ranker,
            data.table,
            data.model_ids(features),
            np.flatnonzero(data.split.context_of(Part(part - 1))),
            max_length=features.max_length,
            action_values=serving.rules.action_values,
        )
    return SecondStage(evaluator, ranker, models.co_visits, models.order, serving.rules.retrieval_weight)


class _Evaluation:
    """The evaluation of one part."""

    def __init__(self, config: RunConfig, workdir: Path, data: RunData, models: Models, part: Part) -> None:
        self._config, self._workdir, self._data, self._models, self._part = config, workdir, data, models, part
        self._bootstrap = {"seed": config.seed, "resamples": config.evaluation.resamples}
        self._rows = data.split.rows(part)
        self._speed: dict[str, float] = {}

    def results(self, truth: Path | None) -> dict[str, Any]:
        """The results as they are written to JSON; the predictions are written on the way."""
        config, data = self._config, self._data
        table, split = data.table, data.split
        evaluator = data.retrieval_evaluator(self._part, config.evaluation.max_users)
        logger.info("%s: %d users over %d items", self._part.name.lower(), len(evaluator.users), table.num_items)
        query_UD = evaluator.queries(*self._models.two_tower)
        model = self._model_scorer(evaluator, query_UD)
        train_rows, ranking = split.rows(Part.TRAIN), self._models.ranker is not None
        baselines = list(baseline_scorers(table, train_rows, data.counts, evaluator, ranking=ranking))
        oracle = oracle_scorer(truth, table) if truth is not None and ranking else None
        results: dict[str, Any] = provenance_of(config, data) | {
            "counts": {"users": len(evaluator.users), "rows": len(self._rows), "catalogue": table.num_items},
            "skipped": [oracle] if isinstance(oracle, str) else [],
        }
        results |= self._of(model)
        results["baselines"] = {scorer.name: self._of(scorer) for scorer in baselines}
        scorers = [model, *baselines]
        if self._models.second_stage_alone:
            second = second_stage(config, data, self._models, self._part, evaluator)
            ranks = ranks_of_both(second, query_UD, self._models.vectors_ND, list_length=LIST_LENGTH)
            scorers.append(Scorer(BOTH, ranks, None))
            results[BOTH] = self._of(scorers[-1])
        if isinstance(oracle, Scorer):
            results["oracle"] = self._of(oracle)
            popularity = results["baselines"][POPULARITY]["ranking"]
            results["reachable_gain"] = reachable_gain(results["ranking"], popularity, results["oracle"]["ranking"])
            scorers.append(oracle)
        results["index"] = self._index_results(evaluator, query_UD)
        if self._part == Part.TEST:
            results |= self._of_test_alone(model, evaluator, query_UD, results["skipped"])
        results["speed"] = {**self._speed, **peak_memory(jax.local_devices())}
        self._write_predictions(scorers, evaluator.users)
        return results

    def _model_scorer(self, evaluator: RetrievalEvaluator, query_UD: np.ndarray) -> Scorer:
        began = time.perf_counter()
        ranks = evaluator.rank_by(query_UD, self._models.vectors_ND, list_length=LIST_LENGTH)
        self._speed["retrieval_users_per_second"] = len(evaluator.users) / (time.perf_counter() - began)
        if self._models.ranker is None:
            return Scorer(MODEL, ranks, None)
        began = time.perf_counter()
        probability_RA = self._data.ranking_evaluator(self._part).run(*self._models.ranker)
        self._speed["ranking_rows_per_second"] = len(self._rows) / (time.perf_counter() - began)
        return Scorer(MODEL, ranks, lambda rows: probability_RA[rows])

    def _of_test_alone(
        self, model: Scorer, evaluator: RetrievalEvaluator, query_UD: np.ndarray, skipped: list[str]
    ) -> dict[str, Any]:
        """The funnel of both stages; details are written to a file of their own."""
        table, counts, ranks = self._data.table, self._data.counts, model.ranks
        score_RA = None if model.score is None else model.score(self._rows)
        click_R = None if score_RA is None else score_RA[:, 0]
        details: dict[str, Any] = {"curves": {} if score_RA is None else curves(table, self._rows, score_RA)}
        if ranks is not None:
            details["slices"] = slices(table, counts, self._rows, click_R, ranks, **self._bootstrap)
        write_json(self._workdir / "eval" / DETAILS, details)
        models = self._models
        if models.ranker is None and models.co_visits is None:
            skipped.append("both stages together: this run has no second stage")
            return {}
        if models.ranker is not None and models.index.size > RANK_ALL_ITEMS:
            skipped.append(f"the ranker over the whole catalogue: more than {RANK_ALL_ITEMS:,} items")
        found = two_stage_results(
            second_stage(self._config, self._data, models, self._part, evaluator),
            query_UD,
            models.index,
            candidates=self._config.serving.candidates,
            **self._bootstrap,
        )
        return {"two_stage": found}

    def _of(self, scorer: Scorer) -> dict[str, Any]:
        return scorer_results(
            scorer, self._data.table, self._rows, self._data.counts.item_exposures_N1, **self._bootstrap
        )

    def _write_predictions(self, scorers: list[Scorer], users: np.ndarray) -> None:
        table, folder, prefix = self._data.table, self._workdir / "eval", PREFIXES[self._part]
        origin = origin_of(self._config, self._data, self._part)
        write_predictions(folder / f"{prefix}predictions.parquet", origin, table, self._rows, scorers)
        ranks = scorers[0].ranks
        if ranks is not None:
            write_recommendations(folder / f"{prefix}recommendations.parquet", origin, table, users, ranks)

    def _index_results(self, evaluator: RetrievalEvaluator, query_UD: np.ndarray) -> dict[str, Any]:
        """What is lost by searching approximately: hits of exact search, and next clicks in the lists of the same users."""
        index, known = self._models.index, self._data.known_items
        exact = build_index(self._models.vectors_ND[known - 1], known, IndexConfig(kind="exact"))
        sample = np.linspace(0, len(query_UD) - 1, min(INDEX_QUERIES, len(query_UD))).astype(int)
        recall = recall_against_exact(index, exact, query_UD[sample], INDEX_DEPTH)
        shares: dict[str, list[float]] = {"with": [], "without": []}
        for number in sample:
            user = int(evaluator.users[number])
            targets, excluded = evaluator.target_items(user), evaluator.excluded_items(user)
            for name, searched in (("with", index), ("without", exact)):
                listed = searched.search_unseen(query_UD[number : number + 1], excluded, LIST_LENGTH).items_C
                shares[name].append(float(np.isin(targets, listed).mean()))
        estimates = bootstrap_means({name: np.array(share) for name, share in shares.items()}, **self._bootstrap)
        return {
            "kind": index.kind,
            "items": index.size,
            "queries": len(sample),
            f"recall@{INDEX_DEPTH}_vs_exact": recall,
            "next_clicks": {
                "k": LIST_LENGTH,
                "recall": {name: estimate.to_json() for name, estimate in estimates.items()},
            },
        }
