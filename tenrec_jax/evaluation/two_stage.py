"""Both stages together, as they serve: candidates from the index, ordered by the ranker, against what the user clicked next.

What is clicked next hangs on what the logging system showed. Retrieval learns both; the ranker learns the probability of a click on what
is shown, and nothing of what would be. Where showing decides more than liking, its order finds fewer of the next clicks than
retrieval's, and that says little of which order people would like better: only an experiment with people would.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from flax import nnx

from tenrec_jax.data.batches import TimelineReader, TrainVocabulary, Windows
from tenrec_jax.data.interactions import Interactions
from tenrec_jax.evaluation.evaluator import RetrievalEvaluator
from tenrec_jax.evaluation.statistics import bootstrap_means
from tenrec_jax.models.compiled import probabilities_after
from tenrec_jax.requests import ActionValues
from tenrec_jax.retrieval.index import ItemIndex
from tenrec_jax.rules import fused
from tenrec_jax.timeline import Events, Profile

T = TypeVar("T")

LENGTH, USERS = 20, 500
# The ranker alone over the whole catalogue takes seconds a user: fewer users, and no large catalogue.
RANK_ALL_USERS, RANK_ALL_ITEMS, _BLOCK = 50, 20_000, 4096


class CandidateRanker:
    """Expected worth of candidates to a user, one user at a time, as a server asks for it.

    Args:
        model, parameters: the ranker, taken apart.
        table: the log. vocabulary: ids that the ranker knows. visible: rows that it may read of a user, ascending.
        max_length: events that it reads.
        action_values: worth of each action.
    """

    def __init__(
        self,
        model: nnx.GraphDef,
        parameters: Any,
        table: Interactions,
        vocabulary: TrainVocabulary,
        visible: np.ndarray,
        *,
        max_length: int,
        action_values: ActionValues,
    ) -> None:
        self._model, self._parameters, self._table, self._vocabulary = model, parameters, table, vocabulary
        self._reader, self._max_length = TimelineReader(table, vocabulary, visible), max_length
        self._values_A = np.asarray(action_values.of(table.actions))

    def worth(self, user: int, item_C: np.ndarray, block: int) -> np.ndarray:
        """Expected worth [C] of these dense items to a dense user, so many in a call; each block size is compiled once."""
        windows = self._reader.histories(np.array([user]), self._max_length)
        profile, events = self._read(windows)
        worth = [np.zeros(0)]
        for start in range(0, len(item_C), block):
            item_1C = np.pad(item_C[start : start + block], (0, max(0, start + block - len(item_C))))[None]
            known_1C, category_1C = self._vocabulary.item[item_1C], self._table.items.category[item_1C]
            found = probabilities_after(self._model, self._parameters, profile, events, known_1C, category_1C)
            worth.append(np.asarray(found)[0] @ self._values_A)
        return np.concatenate(worth)[: len(item_C)]

    def _read(self, windows: Windows) -> tuple[Profile, Events]:
        place = np.zeros((1, 1), np.int64)
        timeline = self._reader.read(windows, place, place.astype(np.int32), self._max_length).timeline
        return Profile(*(field[:, 0] for field in timeline.profile)), timeline.events


@dataclass(frozen=True)
class _Outcome:
    """Of one user: the shares of targets among the candidates and in the list of each way, and the milliseconds of each stage."""

    shares: dict[str, float]
    milliseconds: dict[str, float]


def two_stage_results(
    evaluator: RetrievalEvaluator,
    query_UD: np.ndarray,
    index: ItemIndex,
    ranker: CandidateRanker,
    *,
    candidates: int,
    retrieval_weight: float,
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    """Recall of the users' next clicks: among the candidates, and in the first `LENGTH` of the pair and of each stage alone.

    The pair cannot find what is not among the candidates. At most `USERS` users, evenly spaced; milliseconds are medians over them, of one
    user at a time. The ranker alone orders the whole index, for `RANK_ALL_USERS` of them; it is left out (None) above `RANK_ALL_ITEMS`
    items.

    Args:
        evaluator: whose users and targets these are.
        query_UD: their queries.
        index: of the first stage.
        ranker: the second stage.
        candidates: K, handed from one to the other.
        retrieval_weight: of `rules.fused`, by which the pair orders.
        seed, resamples: of the bootstrap.
    """
    pair = _Pair(index, ranker, candidates, retrieval_weight)
    outcomes, alone = [], []
    for number in _spaced(len(evaluator.users), USERS):
        user, query_1D = int(evaluator.users[number]), query_UD[number : number + 1]
        outcomes.append(pair.outcome(user, evaluator.target_items(user), evaluator.excluded_items(user), query_1D))
    if index.size <= RANK_ALL_ITEMS:
        for number in _spaced(len(evaluator.users), RANK_ALL_USERS):
            user = int(evaluator.users[number])
            alone.append(pair.share_of_ranker(user, evaluator.target_items(user), evaluator.excluded_items(user)))

    shares = {name: np.array([outcome.shares[name] for outcome in outcomes]) for name in outcomes[0].shares}
    bootstrap = {"seed": seed, "resamples": resamples}
    recall = bootstrap_means(shares, **bootstrap) | (
        bootstrap_means({"ranker": np.array(alone)}, **bootstrap) if alone else {}
    )
    return {
        "k": LENGTH,
        "users": len(outcomes),
        "ranker_users": len(alone),
        "items": index.size,
        "candidates": candidates,
        "recall": {"ranker": None} | {name: estimate.to_json() for name, estimate in recall.items()},
        "milliseconds": {
            name: float(np.median([o.milliseconds[name] for o in outcomes])) for name in outcomes[0].milliseconds
        },
    }


class _Pair:
    """Index and ranker, asked for one user at a time."""

    def __init__(self, index: ItemIndex, ranker: CandidateRanker, candidates: int, retrieval_weight: float) -> None:
        self._index, self._ranker, self._candidates, self._weight = index, ranker, candidates, retrieval_weight

    def outcome(self, user: int, targets: np.ndarray, seen: np.ndarray, query_1D: np.ndarray) -> _Outcome:
        """What becomes of a user's targets from the index to the list."""
        hits, retrieval_ms = _timed(lambda: self._index.search_unseen(query_1D, seen, self._candidates))
        score_C, item_C, _ = hits
        worth_C, ranking_ms = _timed(lambda: self._ranker.worth(user, item_C, self._candidates))
        pair = _best(item_C, fused(worth_C, score_C, self._weight))
        lists = {"candidates": item_C, "pair": pair, "retrieval": item_C[:LENGTH]}
        shares = {name: float(np.isin(targets, listed).mean()) for name, listed in lists.items()}
        return _Outcome(shares, {"retrieval": retrieval_ms, "ranking": ranking_ms})

    def share_of_ranker(self, user: int, targets: np.ndarray, seen: np.ndarray) -> float:
        """The share of the targets in the list of the ranker alone."""
        item_N = np.setdiff1d(self._index.item_ids_N, seen)
        worth_N = self._ranker.worth(user, item_N, min(_BLOCK, self._index.size))
        return float(np.isin(targets, _best(item_N, worth_N)).mean())


def _spaced(size: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, min(most, size)).astype(int))


def _best(item_C: np.ndarray, worth_C: np.ndarray) -> np.ndarray:
    return item_C[np.argsort(-worth_C, kind="stable")][:LENGTH]


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    result = work()
    return result, 1e3 * (time.perf_counter() - began)
