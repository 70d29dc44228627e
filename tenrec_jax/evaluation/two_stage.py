"""Both stages together, as they serve: candidates from the index, ordered by ranker and co-visits, against what the user clicked next.

What is clicked next hangs on what the logging system showed. Retrieval learns both; the ranker learns the probability of a click on what
is shown, and nothing of what would be. Where showing decides more than liking, its order finds fewer of the next clicks than
retrieval's, and that says little of which order people would like better: only an experiment with people would.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from flax import nnx
from tqdm import tqdm

from tenrec_jax.co_visits import CoVisits, counted
from tenrec_jax.data.batches import TimelineReader, TrainVocabulary, Windows
from tenrec_jax.data.interactions import Interactions
from tenrec_jax.evaluation.evaluator import RetrievalEvaluator, TargetRanks
from tenrec_jax.evaluation.statistics import bootstrap_means
from tenrec_jax.models.compiled import probabilities_after
from tenrec_jax.order import DECAYS, Order, Signals, fit_order, fused
from tenrec_jax.requests import ActionValues
from tenrec_jax.retrieval.index import ItemIndex
from tenrec_jax.timeline import Events, Profile

T = TypeVar("T")

LENGTH, USERS = 20, 10_000
# The order of candidates is fitted on so many users at most; without a ranker with so many draws each.
FIT_USERS, FIT_DRAWS = 5000, 200
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


class SecondStage(NamedTuple):
    """What orders the candidates of the evaluator's users.

    Attributes:
        evaluator: whose users these are, with what they have seen.
        ranker, co_visits: None where there is none.
        order: the powers of what they say, and the co-visits' decay.
        retrieval_weight: of `Rules`.
    """

    evaluator: RetrievalEvaluator
    ranker: CandidateRanker | None
    co_visits: CoVisits | None
    order: Order
    retrieval_weight: float

    def signals(
        self, user: int, item_C: np.ndarray, retrieval_C: np.ndarray, block: int, decays: Sequence[float]
    ) -> list[Signals]:
        """What is known of these dense items for a dense user, with co-visits of each decay; `block` is the ranker's."""
        worth_C = None if self.ranker is None else self.ranker.worth(user, item_C, block)
        seen = self.evaluator.history(user)
        return [Signals(retrieval_C, worth_C, *counted(self.co_visits, *seen, item_C, decay)) for decay in decays]

    def scores(self, user: int, item_C: np.ndarray, retrieval_C: np.ndarray, block: int) -> np.ndarray:
        """What orders them, [C]."""
        (known,) = self.signals(user, item_C, retrieval_C, block, [self.order.decay])
        return fused(self.order, known, self.retrieval_weight)


@dataclass(frozen=True)
class _Outcome:
    """Of one user: the shares of targets among the candidates and in the list of each way, and the milliseconds of each stage."""

    shares: dict[str, float]
    milliseconds: dict[str, float]


def fitted_order(
    second: SecondStage, query_UD: np.ndarray, vectors_ND: np.ndarray, index: ItemIndex, candidates: int, seed: int
) -> Order:
    """The order under which the evaluator's users' next clicks are most probable; see `fit_order`.

    With a ranker it is fitted on what it orders, the candidates. Without one it orders the whole catalogue as well (`ranks_of_both`): to a
    user's candidates come what was clicked beside them, and `FIT_DRAWS` uniform draws, which stand for the rest.

    Args:
        second: the second stage, whose own order does not matter.
        query_UD: the users' queries. vectors_ND: of items 1..N.
        index: of the first stage.
        candidates: K, handed from one to the other.
        seed: of the draws.
    """
    evaluator, random = second.evaluator, np.random.default_rng((seed, 5))
    signals, clicked, log_count = {decay: list[Signals]() for decay in DECAYS}, list[np.ndarray](), list[np.ndarray]()
    for number in tqdm(_spaced(len(evaluator.users), FIT_USERS), desc="order of candidates", leave=False, delay=1):
        user, query_1D = int(evaluator.users[number]), query_UD[number : number + 1]
        seen, target_T = evaluator.excluded_items(user), evaluator.target_items(user)
        item_C = index.search_unseen(query_1D, seen, candidates).items_C
        log_count_C = np.zeros(len(item_C))
        if second.ranker is None:
            item_C, log_count_C = _with_draws(item_C, target_T, seen, index.item_ids_N, random)
        elif not np.isin(target_T, item_C).any():
            continue  # spares the ranker what would tell nothing
        known = second.signals(user, item_C, vectors_ND[item_C - 1] @ query_1D[0], candidates, DECAYS)
        for decay, each in zip(DECAYS, known, strict=True):
            signals[decay].append(each)
        clicked.append(np.isin(item_C, target_T))
        log_count.append(log_count_C)
    return fit_order(signals, clicked, log_count)


def _with_draws(
    item_C: np.ndarray, target_T: np.ndarray, seen: np.ndarray, item_ids_N: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates, the targets beside them that can be found, and draws from all other items; and log of how many each stands for."""
    known_C = np.union1d(item_C, np.setdiff1d(np.intersect1d(target_T, item_ids_N), seen))
    apart = np.union1d(known_C, np.intersect1d(seen, item_ids_N))
    drawn_M = np.setdiff1d(random.choice(item_ids_N, FIT_DRAWS), apart)
    rest = np.log((len(item_ids_N) - len(apart)) / len(drawn_M)) if len(drawn_M) else 0.0
    items = np.concatenate([known_C, drawn_M]).astype(np.int32)
    return items, np.repeat([0.0, rest], [len(known_C), len(drawn_M)])


def two_stage_results(
    second: SecondStage,
    query_UD: np.ndarray,
    index: ItemIndex,
    *,
    candidates: int,
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    """Recall of the users' next clicks: among the candidates, and in the first `LENGTH` of the pair and of each stage alone.

    The pair cannot find what is not among the candidates; "gain" is what it adds to retrieval's recall, paired by user. With a ranker at
    most `USERS` users, evenly spaced; milliseconds are medians over them, of one user at a time. The ranker alone orders the whole index,
    for `RANK_ALL_USERS` of them; it is left out (None) where there is none, and above `RANK_ALL_ITEMS` items.

    Args:
        second: the second stage, with the users and their targets.
        query_UD: the users' queries.
        index: of the first stage.
        candidates: K, handed from one to the other.
        seed, resamples: of the bootstrap.
    """
    evaluator, users = second.evaluator, len(second.evaluator.users)
    outcomes, alone = [], []
    for number in _spaced(users, USERS if second.ranker is not None else users):
        outcomes.append(
            _outcome(second, index, int(evaluator.users[number]), query_UD[number : number + 1], candidates)
        )
    if second.ranker is not None and index.size <= RANK_ALL_ITEMS:
        for number in _spaced(users, RANK_ALL_USERS):
            alone.append(_share_of_ranker(second.ranker, evaluator, index, int(evaluator.users[number])))

    shares = {name: np.array([outcome.shares[name] for outcome in outcomes]) for name in outcomes[0].shares}
    shares["gain"] = shares["pair"] - shares["retrieval"]
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
        "order": asdict(second.order),
        "milliseconds": {
            name: float(np.median([o.milliseconds[name] for o in outcomes])) for name in outcomes[0].milliseconds
        },
    }


def ranks_of_both(
    second: SecondStage, query_UD: np.ndarray, vectors_ND: np.ndarray, *, list_length: int
) -> TargetRanks:
    """Ranks over the full catalogue by the score that orders candidates, of a second stage without a ranker.

    Args:
        second: the second stage, with the users and their targets.
        query_UD: the users' queries. vectors_ND: of items 1..N.
        list_length: K of the lists of recommended items.
    """
    evaluator, item_N = second.evaluator, np.arange(1, len(vectors_ND) + 1, dtype=np.int32)

    def scores(users: np.ndarray) -> np.ndarray:
        retrieval_BN = query_UD[np.searchsorted(evaluator.users, users)] @ vectors_ND.T
        rows = zip(users.tolist(), retrieval_BN, strict=True)
        return np.stack([second.scores(user, item_N, retrieval_N, len(item_N)) for user, retrieval_N in rows])

    return evaluator.rank(scores, list_length=list_length)


def _outcome(second: SecondStage, index: ItemIndex, user: int, query_1D: np.ndarray, candidates: int) -> _Outcome:
    """What becomes of a user's targets from the index to the list."""
    targets, seen = second.evaluator.target_items(user), second.evaluator.excluded_items(user)
    hits, retrieval_ms = _timed(lambda: index.search_unseen(query_1D, seen, candidates))
    score_C, item_C, _ = hits
    fused_C, ranking_ms = _timed(lambda: second.scores(user, item_C, score_C, candidates))
    lists = {"candidates": item_C, "pair": _best(item_C, fused_C), "retrieval": item_C[:LENGTH]}
    shares = {name: float(np.isin(targets, listed).mean()) for name, listed in lists.items()}
    return _Outcome(shares, {"retrieval": retrieval_ms, "ranking": ranking_ms})


def _share_of_ranker(ranker: CandidateRanker, evaluator: RetrievalEvaluator, index: ItemIndex, user: int) -> float:
    """The share of a user's targets in the list of the ranker alone."""
    item_N = np.setdiff1d(index.item_ids_N, evaluator.excluded_items(user))
    worth_N = ranker.worth(user, item_N, min(_BLOCK, index.size))
    return float(np.isin(evaluator.target_items(user), _best(item_N, worth_N)).mean())


def _spaced(size: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, min(most, size)).astype(int))


def _best(item_C: np.ndarray, worth_C: np.ndarray) -> np.ndarray:
    return item_C[np.argsort(-worth_C, kind="stable")][:LENGTH]


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    result = work()
    return result, 1e3 * (time.perf_counter() - began)
