"""Both stages together, as they serve: candidates from the index, ordered by the ranker, against what the user clicked next."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from tenrec_jax.data.batches import TimelineReader, TrainVocabulary, Windows
from tenrec_jax.data.interactions import Interactions
from tenrec_jax.evaluation.evaluator import RetrievalEvaluator
from tenrec_jax.evaluation.statistics import bootstrap_mean
from tenrec_jax.retrieval.index import ItemIndex
from tenrec_jax.timeline import Events, Profile

LENGTH, USERS, RANK_ALL_ITEMS = 20, 100, 20_000


class CandidateRanker:
    """Expected worth of candidates to a user, one user at a time, as a server asks for it.

    Args:
        model, parameters: the ranker, taken apart.
        table: the log. vocabulary: ids that the ranker knows. visible: rows that it may read of a user, ascending.
        max_length: events that it reads.
        action_values: worth of each action.
        block: candidates in a call; more are ranked in several.
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
        action_values: Sequence[float],
        block: int,
    ) -> None:
        self._model, self._parameters, self._table, self._vocabulary = model, parameters, table, vocabulary
        self._reader, self._max_length, self._block = TimelineReader(table, vocabulary, visible), max_length, block
        self._values_A = np.asarray(action_values[: len(table.actions)])

    def worth(self, user: int, item_C: np.ndarray) -> np.ndarray:
        """Expected worth [C] of these dense items to a dense user."""
        windows = self._reader.histories(np.array([user]), self._max_length)
        profile, events = self._read(windows)
        worth = [np.zeros(0)]
        for start in range(0, len(item_C), self._block):
            item_1C = np.pad(item_C[start : start + self._block], (0, max(0, start + self._block - len(item_C))))[None]
            known_1C, category_1C = self._vocabulary.item[item_1C], self._table.items.category[item_1C]
            found = _probabilities(self._model, self._parameters, profile, events, known_1C, category_1C)
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
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    """Recall of the users' next clicks: among the candidates, and in the first `LENGTH` of the pair and of each stage alone.

    The ranker alone orders the whole index; that is left out (None) above `RANK_ALL_ITEMS` items. The pair cannot find what is not among
    the candidates. At most `USERS` users, evenly spaced; milliseconds are medians over them, of one user at a time.

    Args:
        evaluator: whose users and targets these are.
        query_UD: their queries.
        index: of the first stage.
        ranker: the second stage.
        candidates: K, handed from one to the other.
        seed, resamples: of the bootstrap.
    """
    chosen = np.unique(np.linspace(0, len(evaluator.users) - 1, min(USERS, len(evaluator.users))).astype(int))
    ranks_all = index.size <= RANK_ALL_ITEMS
    outcomes = []
    for number in chosen:
        user = int(evaluator.users[number])
        seen = evaluator.seen_items(user) if evaluator.exclude_seen else np.zeros(0, np.int32)
        targets = evaluator.target_items(user)
        outcomes.append(
            _outcome(user, targets, seen, query_UD[number : number + 1], index, ranker, candidates, ranks_all)
        )
    one_U = np.ones(len(outcomes))
    recalls = {
        name: bootstrap_mean(np.array([o.shares[name] for o in outcomes]), one_U, seed=seed, resamples=resamples)
        for name in outcomes[0].shares
    }
    times = outcomes[0].milliseconds
    return {
        "k": LENGTH,
        "users": len(outcomes),
        "items": index.size,
        "candidates": candidates,
        "recall": {"ranker": None} | {name: estimate.to_json() for name, estimate in recalls.items()},
        "milliseconds": {name: float(np.median([o.milliseconds[name] for o in outcomes])) for name in times},
    }


def _outcome(
    user: int,
    targets: np.ndarray,
    seen: np.ndarray,
    query_1D: np.ndarray,
    index: ItemIndex,
    ranker: CandidateRanker,
    candidates: int,
    ranks_all: bool,
) -> _Outcome:
    def search() -> np.ndarray:
        found = index.search(query_1D, min(candidates + len(seen), index.size)).items_BK[0]
        return found[(found > 0) & ~np.isin(found, seen)][:candidates]

    item_C, retrieval_ms = _timed(search)
    worth_C, ranking_ms = _timed(lambda: ranker.worth(user, item_C))
    shares = {
        "candidates": np.isin(targets, item_C).mean(),
        "pair": np.isin(targets, item_C[np.argsort(-worth_C, kind="stable")][:LENGTH]).mean(),
        "retrieval": np.isin(targets, item_C[:LENGTH]).mean(),
    }
    if ranks_all:
        everything = np.setdiff1d(index.item_ids_N, seen)
        order = np.argsort(-ranker.worth(user, everything), kind="stable")
        shares["ranker"] = np.isin(targets, everything[order][:LENGTH]).mean()
    return _Outcome(shares, {"retrieval": retrieval_ms, "ranking": ranking_ms})


def _timed(work: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    began = time.perf_counter()
    result = work()
    return result, 1e3 * (time.perf_counter() - began)


@jax.jit(static_argnums=0)
def _probabilities(
    model: nnx.GraphDef, parameters: Any, profile: Profile, events: Events, item_BC: jax.Array, category_BC: jax.Array
) -> jax.Array:
    return jax.nn.sigmoid(nnx.merge(model, parameters).score_after(profile, events, item_BC, category_BC))
