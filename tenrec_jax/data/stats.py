"""What a table holds, in numbers: sizes, actions, distributions, repeats and the parts of a split.

Rows are read in blocks, so that memory grows with users and items and not with rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.data.protocols import Part, Split

BLOCK_ROWS = 1 << 20
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class JointCell:
    """One combination of labels, 0 or 1 in the order of the table's actions, and its rows."""

    labels: tuple[int, ...]
    rows: int
    share: float


@dataclass(frozen=True)
class Distribution:
    """A count for each user or item that has rows: the mean, and quantiles by their level (linear interpolation)."""

    number: int
    mean: float
    quantiles: dict[str, float]


@dataclass(frozen=True)
class Concentration:
    """How unevenly rows are spread over items that have rows.

    Attributes:
        gini: Gini coefficient of the rows by item, 0 if all have as many.
        top_1_percent: share of the rows on the floor(n / 100) items, at least one, that have most.
        top_item: share of the rows on the first item.
        lorenz: share of the rows on the most popular items, by the share of the items.
    """

    gini: float
    top_1_percent: float
    top_item: float
    lorenz: dict[str, float]


@dataclass(frozen=True)
class Repeats:
    """Rows of a pair of user and item beyond its first, by what they repeat; shares are of all rows.

    Attributes:
        pairs: rows whose user and item stood on an earlier row.
        same_labels: rows that equal an earlier row in user, item and all labels.
        click_contradictions: rows beyond the first of pairs that have rows with and without a click. The manifest's
            `contradicting_pairs` is another number: it counts pairs, and those whose rows differ in any action.
        duplicates: rows that equal an earlier row in every column of the source, as counted when it was ingested.
    """

    pairs: int
    same_labels: int
    click_contradictions: int
    duplicates: int
    pairs_share: float
    same_labels_share: float
    click_contradictions_share: float
    duplicates_share: float


@dataclass(frozen=True)
class PartStats:
    """One part of a split.

    Attributes:
        rates: share of the rows with each action.
        unseen_rows: share of the rows whose item is on no training row.
        unseen_items: share of the part's distinct items that are on no training row.
        shared_users, shared_items: share of the part's distinct users and items that training rows show too.
        rows_of_shared_users: share of the rows of such users.
    """

    part: str
    rows: int
    users: int
    items: int
    rates: dict[str, float]
    unseen_rows: float
    unseen_items: float
    shared_users: float
    shared_items: float
    rows_of_shared_users: float


@dataclass(frozen=True)
class TableStats:
    """Everything that `table_stats` counts. `rows_per_user` and `rows_per_item` are of users and items with rows."""

    kind: str
    sha256: str
    rows: int
    users: int
    items: int
    actions: tuple[str, ...]
    rates: dict[str, float]
    joint: tuple[JointCell, ...]
    rows_per_user: Distribution
    clicks_per_user: Distribution
    rows_per_item: Distribution
    concentration: Concentration
    repeats: Repeats
    protocol: str
    parts: tuple[PartStats, ...]


def table_stats(table: Interactions, split: Split, *, duplicates: int) -> TableStats:
    """Counts a table in two passes over its rows.

    Args:
        table: the interactions, memory-mapped or not.
        split: parts of the same table.
        duplicates: `duplicate_rows` of the table's manifest.
    """
    item_rows_N1 = np.zeros(table.num_items + 1, np.int64)
    clicks_U1 = np.zeros(table.num_users + 1, np.int64)
    joint = np.zeros(2 ** len(table.actions), np.int64)
    bits_A = 2 ** np.arange(len(table.actions))[::-1]
    pairs = same_labels = both_clicks = 0
    click = table.actions.index("click")
    for rows in blocks_of_users(table):
        item, user = table.item_R[rows], table.user_R[rows]
        labels = np.asarray(table.labels_RA[rows])
        code = labels @ bits_A
        item_rows_N1 += np.bincount(item, minlength=len(item_rows_N1))
        clicks_U1 += np.bincount(user[labels[:, click] == 1], minlength=len(clicks_U1))
        joint += np.bincount(code, minlength=len(joint))
        repeated = _repeats(user, item, code, labels[:, click])
        pairs, same_labels, both_clicks = pairs + repeated[0], same_labels + repeated[1], both_clicks + repeated[2]
    rows_U = np.diff(table.offsets)[1:]
    repeats = (pairs, same_labels, both_clicks, duplicates)
    return TableStats(
        kind=table.kind,
        sha256=table.sha256,
        rows=table.num_rows,
        users=table.num_users,
        items=table.num_items,
        actions=table.actions,
        rates=_rates(joint, table.actions),
        joint=_joint(joint, len(table.actions)),
        rows_per_user=distribution(rows_U[rows_U > 0]),
        clicks_per_user=distribution(clicks_U1[1:][rows_U > 0]),
        rows_per_item=distribution(item_rows_N1[item_rows_N1 > 0]),
        concentration=concentration(item_rows_N1[item_rows_N1 > 0]),
        repeats=Repeats(*repeats, *(number / table.num_rows for number in repeats)),
        protocol=split.protocol,
        parts=part_stats(table, split),
    )


def blocks_of_users(table: Interactions, rows: int = BLOCK_ROWS) -> Iterator[slice]:
    """Slices of the rows that hold whole users, about `rows` rows each (more where one user has more)."""
    start = 0
    while start < table.num_rows:
        # The first block border at or behind start + rows.
        end = int(table.offsets[np.searchsorted(table.offsets, min(start + rows, table.num_rows))])
        yield slice(start, end)
        start = end


def distribution(counts: Counts) -> Distribution:
    """Mean and quantiles of counts; NaN where there are none."""
    if not len(counts):
        return Distribution(0, float("nan"), {str(level): float("nan") for level in QUANTILES})
    values = np.quantile(counts, QUANTILES).tolist()
    return Distribution(len(counts), float(counts.mean()), dict(zip(map(str, QUANTILES), values, strict=True)))


def concentration(counts: Counts) -> Concentration:
    """Gini coefficient and shares of the largest, of counts of at least 1."""
    rising = np.sort(counts).astype(np.float64)
    number, total = len(rising), rising.sum()
    # G = sum_i (2 i - n - 1) x_i / (n sum x), x rising, i from 1.
    gini = float((2 * np.arange(1, number + 1) - number - 1) @ rising / (number * total))
    share = np.cumsum(rising[::-1]) / total
    levels = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
    lorenz = {str(level): float(share[max(int(number * level), 1) - 1]) for level in levels}
    return Concentration(gini, lorenz["0.01"], float(share[0]), lorenz)


def part_stats(table: Interactions, split: Split) -> tuple[PartStats, ...]:
    """Sizes, rates and overlap with the training part, of training, validation and test."""
    shape_N, shape_U = table.num_items + 1, table.num_users + 1
    names = (Part.TRAIN, Part.VALIDATION, Part.TEST)
    items_PN = {part: np.zeros(shape_N, np.int64) for part in names}
    users_PU = {part: np.zeros(shape_U, np.int64) for part in names}
    actions_PA = {part: np.zeros(len(table.actions), np.int64) for part in names}
    for start in range(0, table.num_rows, BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        item, user, labels, part_R = table.item_R[rows], table.user_R[rows], table.labels_RA[rows], split.part_R[rows]
        for part in names:
            here = part_R == part
            items_PN[part] += np.bincount(item[here], minlength=shape_N)
            users_PU[part] += np.bincount(user[here], minlength=shape_U)
            actions_PA[part] += labels[here].sum(axis=0, dtype=np.int64)
    seen_N, seen_U = items_PN[Part.TRAIN] > 0, users_PU[Part.TRAIN] > 0
    return tuple(
        _part(part.name.lower(), table.actions, items_PN[part], users_PU[part], actions_PA[part], seen_N, seen_U)
        for part in names
    )


def _part(
    name: str,
    actions: tuple[str, ...],
    item_rows_N: Counts,
    user_rows_U: Counts,
    acted_A: Counts,
    seen_N: NDArray[np.bool_],
    seen_U: NDArray[np.bool_],
) -> PartStats:
    rows, items, users = int(item_rows_N.sum()), item_rows_N > 0, user_rows_U > 0
    return PartStats(
        part=name,
        rows=rows,
        users=int(users.sum()),
        items=int(items.sum()),
        rates={action: ratio(int(acted), rows) for action, acted in zip(actions, acted_A, strict=True)},
        unseen_rows=ratio(int(item_rows_N[~seen_N].sum()), rows),
        unseen_items=ratio(int((items & ~seen_N).sum()), int(items.sum())),
        shared_users=ratio(int((users & seen_U).sum()), int(users.sum())),
        shared_items=ratio(int((items & seen_N).sum()), int(items.sum())),
        rows_of_shared_users=ratio(int(user_rows_U[seen_U].sum()), rows),
    )


def ratio(part: int, whole: int) -> float:
    """part / whole, NaN where the whole is 0."""
    return part / whole if whole else float("nan")


def _rates(joint: Counts, actions: tuple[str, ...]) -> dict[str, float]:
    code = np.arange(len(joint))
    bits = {action: code >> (len(actions) - 1 - place) & 1 for place, action in enumerate(actions)}
    return {action: ratio(int(joint[bit == 1].sum()), int(joint.sum())) for action, bit in bits.items()}


def _joint(joint: Counts, width: int) -> tuple[JointCell, ...]:
    return tuple(
        JointCell(tuple(map(int, format(code, f"0{width}b"))), int(rows), ratio(int(rows), int(joint.sum())))
        for code, rows in enumerate(joint)
    )


def _repeats(user: np.ndarray, item: np.ndarray, code: np.ndarray, click: np.ndarray) -> tuple[int, int, int]:
    """Rows beyond the first of a pair, of a pair with equal labels, and of pairs with and without a click."""
    pair = user.astype(np.int64) << 32 | item
    order = np.lexsort((code, pair))
    pair, code, click = pair[order], code[order], click[order]
    new_pair = np.concatenate([[True], pair[1:] != pair[:-1]])
    new_outcome = new_pair | np.concatenate([[True], code[1:] != code[:-1]])
    first = np.flatnonzero(new_pair)
    size, clicked = np.diff(first, append=len(pair)), np.add.reduceat(click, first, dtype=np.int64)
    both = (clicked > 0) & (clicked < size)
    return len(pair) - len(first), len(pair) - int(new_outcome.sum()), int((size[both] - 1).sum())
