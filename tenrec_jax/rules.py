"""The rules between what the models say and the list that is shown: small functions from candidates to candidates.

Each keeps candidates in the order of the list, best first, and tells what it removed from the part that is shown, or moved in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tenrec_jax.order import Order, Signals, fused
from tenrec_jax.requests import ActionValues, Move, RuleEffect
from tenrec_jax.retrieval.hits import Floats, Ids

SEEN, BLOCKED, DIVERSITY, CATEGORY_CAP, EXPLORATION = "seen", "blocked", "diversity", "category_cap", "exploration"


class Candidates(NamedTuple):
    """Candidates in order.

    Shapes: item [C], dense ids; category [C], 0 where missing; retrieval [C], inner products of query and item; probability [C, A], A = 0
    where there is no ranker; co_visits and clicks [C], zeros where there are none; subjects [C], ones there; score [C], what orders them;
    explored [C], True where chance chose them.
    """

    item_C: Ids
    category_C: Ids
    retrieval_C: Floats
    probability_CA: Floats
    co_visits_C: Floats
    clicks_C: Ids
    subjects_C: Floats
    score_C: Floats
    explored_C: np.ndarray

    def at(self, places: np.ndarray) -> "Candidates":
        """Those at these places, in this order."""
        return Candidates(*(field[places] for field in self))


class Ruled(NamedTuple):
    """Candidates after a rule: dense ids of those it removed [R], and moves (item, place before, place after), places from 1."""

    candidates: Candidates
    removed_R: Sequence[int] = ()
    moved: Sequence[tuple[int, int, int]] = ()

    def effect(self, rule: str, raw_item: np.ndarray) -> RuleEffect:
        """In raw ids."""
        ids = raw_item[np.asarray([*self.removed_R, *(item for item, *_ in self.moved)], int)].tolist()
        moves = (Move(raw, *move[1:]) for raw, move in zip(ids[len(self.removed_R) :], self.moved, strict=True))
        return RuleEffect(rule, tuple(ids[: len(self.removed_R)]), tuple(moves))


def by_worth(
    candidates: Candidates, order: Order, values: ActionValues, actions: tuple[str, ...], weight: float
) -> Candidates:
    """Put candidates in the order of `order.fused`. Ties keep retrieval's order."""
    worth_C = None
    if candidates.probability_CA.shape[1]:
        worth_C = candidates.probability_CA @ np.asarray(values.of(actions), np.float32)
    counts = candidates.co_visits_C, candidates.clicks_C, candidates.subjects_C
    score_C = fused(order, Signals(candidates.retrieval_C, worth_C, *counts), weight)
    return candidates._replace(score_C=score_C).at(np.argsort(-score_C, kind="stable"))


def diversified(candidates: Candidates, share: float, k: int) -> Ruled:
    """Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998) for the first k, an item being similar to those of its category.

    The next item is the one with the largest `(1 - share) * relevance - share * similarity`: relevance is the score, scaled to 0..1 over
    the candidates; similarity is 1 where an item of the same category was taken, else 0. Items without a category are like no other.
    """
    score_C, size = candidates.score_C, len(candidates.score_C)
    spread = np.ptp(score_C) if size else 0.0
    value_C = (1 - share) * ((score_C - score_C.min()) / spread if spread else np.zeros(size))
    left_C, similar_C = np.ones(size, bool), np.zeros(size, bool)
    order: list[int] = []
    for _ in range(min(k, size)):
        place = int(np.argmax(np.where(left_C, value_C - share * similar_C, -np.inf)))
        order.append(place)
        left_C[place] = False
        if candidates.category_C[place]:
            similar_C |= candidates.category_C == candidates.category_C[place]
    after = candidates.at(np.concatenate([order, np.flatnonzero(left_C)]).astype(int))
    moved = [(int(candidates.item_C[old]), old + 1, new + 1) for new, old in enumerate(order) if new != old]
    return Ruled(after, moved=moved)


def capped(candidates: Candidates, most: int, k: int) -> Ruled:
    """Leave out items of a category of which `most` stand before them. Items without a category are not counted."""
    before: dict[int, int] = {}
    over_C = np.zeros(len(candidates.item_C), bool)
    for place, category in enumerate(candidates.category_C.tolist()):
        before[category] = before.get(category, 0) + 1
        over_C[place] = category and before[category] > most
    kept = np.flatnonzero(~over_C)
    end = kept[k - 1] if len(kept) >= k else len(over_C)
    return Ruled(candidates.at(kept), candidates.item_C[:end][over_C[:end]].tolist())


def explored(candidates: Candidates, rate: float, most: int, k: int, random: np.random.Generator) -> Ruled:
    """Give each of the first k places, with probability `rate`, to a candidate drawn uniformly from those behind the first k.

    Where `most` is not 0, no category gets more than that many places: what would break this is not drawn.
    """
    order, rest = list(range(min(k, len(candidates.item_C)))), list(range(k, len(candidates.item_C)))
    category = candidates.category_C.tolist()
    moved, removed = [], []
    for place in np.flatnonzero(random.random(len(order)) < rate).tolist():
        shown = [category[other] for at, other in enumerate(order) if at != place]
        free = [each for each in rest if not (most and category[each] and shown.count(category[each]) >= most)]
        if not free:
            continue
        drawn = free[int(random.integers(len(free)))]
        rest.remove(drawn)
        removed.append(int(candidates.item_C[order[place]]))
        moved.append((int(candidates.item_C[drawn]), drawn + 1, place + 1))
        order[place] = drawn
    after = candidates.at(np.asarray(order + rest, int))
    after.explored_C[[place - 1 for *_, place in moved]] = True
    return Ruled(after, removed, moved)
