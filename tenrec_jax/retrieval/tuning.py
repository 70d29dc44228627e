"""Settings of ScaNN chosen by measuring, with the curve that was seen."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tenrec_jax.errors import UserError

_REORDER_PER_HIT = (2, 3, 4, 6, 8, 16, 32, 64)
# Time of one centroid and of one exact score over that of one quantised score, as measured at dimension 64.
_CENTROID_COST, _REORDER_COST = 6, 50


class UnreachableRecallError(UserError):
    """No setting of ScaNN finds as much as it should."""


@dataclass(frozen=True)
class Trial:
    """One setting and what it did on the tuning queries.

    Attributes:
        num_leaves, leaves_to_search: partitions of the tree and those read per query; 0 for exact search.
        reorder: approximate hits scored again exactly; 0 for exact search.
        recall: share of the k best that were found.
        cost: estimate of the work per query, in quantised scores; it alone decides between settings that reach the recall.
        queries_per_second: as measured once; it is told and decides nothing, since it differs from time to time.
    """

    num_leaves: int
    leaves_to_search: int
    reorder: int
    recall: float
    cost: float
    queries_per_second: float


@dataclass(frozen=True)
class Tuning:
    """A choice of settings.

    Attributes:
        target_recall, k: the recall@k that was to be reached.
        queries, items: how many there were.
        chosen: the cheapest trial that reached it.
        trials: all settings that were tried, in the order in which they were.
    """

    target_recall: float
    k: int
    queries: int
    items: int
    chosen: Trial
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """Numbers and lists alone."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Tuning":
        """What `to_json` gave."""
        trials = tuple(Trial(**trial) for trial in content["trials"])
        return cls(**content | {"chosen": Trial(**content["chosen"]), "trials": trials})


def search_cost(items: int, num_leaves: int, leaves_to_search: int, reorder: int) -> float:
    """Work per query in quantised scores: every centroid, the items of the leaves read, and the exact scores."""
    return _CENTROID_COST * num_leaves + items * leaves_to_search / num_leaves + _REORDER_COST * reorder


def leaf_steps(fewest: int, num_leaves: int) -> list[int]:
    """Numbers of leaves to try, in steps of a sixth, from `fewest` to all."""
    leaves = [min(max(1, fewest), num_leaves)]
    while leaves[-1] < num_leaves:
        leaves.append(min(num_leaves, leaves[-1] + max(1, leaves[-1] // 6)))
    return leaves


def reorder_steps(k: int, items: int) -> list[int]:
    """Numbers of hits to score again, ascending."""
    return sorted({min(items, k * times) for times in _REORDER_PER_HIT})


def sweep(
    measure: Callable[[int, int], Trial],
    cost: Callable[[int, int], float],
    leaves: Sequence[int],
    reorders: Sequence[int],
    target_recall: float,
) -> Iterator[Trial]:
    """Trials of one tree: with each `reorder`, leaves from few to many until the recall is reached.

    A `reorder` that does not reach it even with all leaves is not followed, nor are settings that cost no less than one
    that reached it. Which trials there are depends on their recalls alone.
    """
    cheapest = float("inf")
    for reorder in reorders:
        if cost(leaves[0], reorder) >= cheapest:
            return
        most = measure(leaves[-1], reorder)
        yield most
        if most.recall < target_recall:
            continue
        cheapest = min(cheapest, most.cost)
        for few in leaves[:-1]:
            if cost(few, reorder) >= cheapest:
                break
            trial = measure(few, reorder)
            yield trial
            if trial.recall >= target_recall:
                cheapest = trial.cost
                break


def cheapest_reaching(trials: Sequence[Trial], target_recall: float, k: int) -> Trial:
    """The choice: least cost, then highest recall.

    Raises:
        UnreachableRecallError: no trial reaches the recall; the message tells how near they came.
    """
    reached = [trial for trial in trials if trial.recall >= target_recall]
    if not reached:
        best = max(trials, key=lambda trial: trial.recall)
        raise UnreachableRecallError(
            f"ScaNN does not reach recall@{k} of {target_recall:g} on the tuning queries: {best.recall:.4f} with "
            f"{best.leaves_to_search} of {best.num_leaves} leaves and {best.reorder} hits reordered. "
            "Set index.target_recall lower, or index.kind to exact."
        )
    return min(reached, key=lambda trial: (trial.cost, -trial.recall))
