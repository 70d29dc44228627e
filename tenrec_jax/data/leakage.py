"""What a log gives away: columns that know the label, histories that hold the target or the future, structure that predicts.

A column alone is measured by the AUC of its value, or of its value's click rate in other folds. The threshold for an
alarm is .8 by default: on Tenrec's true exposures sound models with every honest feature reach a click AUC of .76 to .80, so a
single column at .8 knows what a model cannot. Columns that are known only after the exposure are flagged whatever their AUC.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tenrec_jax.data.arrow import as_numpy
from tenrec_jax.data.columns import FOLDS, ValueCounts, count_values, values_of
from tenrec_jax.data.interactions import Interactions, read_events
from tenrec_jax.data.manifest import read_manifest
from tenrec_jax.data.schema import Column, Role, custom_kind, kind_named
from tenrec_jax.data.stats import blocks_of_users, ratio

DEFAULT_ALARM = 0.8
COUNTED_BY_VALUE = (Role.POST_EXPOSURE, Role.TIME)
SHOWN_VALUES = 50
HISTORY_BLOCK_ROWS = 1 << 17  # each has arrays of ten columns


@dataclass(frozen=True)
class ColumnLeak:
    """What one column alone says about the click.

    Attributes:
        name, role: of the column, or of a feature made from the rows' structure (role "structure").
        values: number of distinct values.
        auc: the larger of the AUC and one less it, of `reading`; NaN where only one label occurs.
        reading: "value", or "rate": the click rate of the same value in other folds.
        flagged: whether it must not be an input.
        reason: why; empty if not flagged.
    """

    name: str
    role: str
    values: int
    auc: float
    reading: str
    flagged: bool
    reason: str


@dataclass(frozen=True)
class Marginal:
    """A side feature's values with their shares of the rows; at most the 50 most frequent, the rest in `other`."""

    column: str
    shares: dict[str, float]
    other: float


@dataclass(frozen=True)
class HistoryLeak:
    """What the history columns give away; shares are of all rows.

    Attributes:
        target_in_history: rows whose own item stands in their history.
        future: rows whose history holds an item that the user clicks later and has not clicked before.
        logged: share of the history's entries that the user clicks somewhere in the log: only these can be dated.
        static_users: share of the users whose history is the same on all rows.
        filled_first_rows: share of the users whose very first row has a history. The log shows nothing before it: these
            clicks were deleted from the log, lie before it, or are still to come.
        lengths: share of the rows by the number of filled columns.
    """

    target_in_history: float
    future: float
    logged: float
    static_users: float
    filled_first_rows: float
    lengths: dict[str, float]


@dataclass(frozen=True)
class Leakage:
    """The leakage report of a table; `history` is None where there are no history columns."""

    alarm: float
    columns: tuple[ColumnLeak, ...]
    history: HistoryLeak | None
    marginals: tuple[Marginal, ...]

    @property
    def flagged(self) -> tuple[str, ...]:
        """Names of the flagged columns."""
        return tuple(column.name for column in self.columns if column.flagged)


def find_leaks(table: Interactions, directory: Path, *, alarm: float = DEFAULT_ALARM) -> Leakage:
    """Measures every column of a table that could be a feature.

    Args:
        table: the table in `directory`, opened.
        directory: where its events are.
        alarm: AUC from which a column alone is flagged, in (0.5, 1].
    """
    leaks, marginals, mapping = [], [], read_manifest(directory).columns
    kind = custom_kind(mapping) if mapping else kind_named(table.kind)
    for column in kind.columns:
        if column.role is Role.ACTION:
            continue
        counts = _count_column(table, directory, column)
        leaks.append(_leak(column.name, column.role.value, counts, alarm, by_value=column.role in COUNTED_BY_VALUE))
        if column.role in (Role.USER_FEATURE, Role.ITEM_FEATURE, Role.POST_EXPOSURE):
            marginals.append(_marginal(column, counts))
    leaks += [_leak(name, "structure", counts, alarm, by_value=True) for name, counts in _structure(table)]
    history = kind.with_role(Role.HISTORY)
    found = None
    if history:
        found, lengths = _history(table, directory, history)
        leaks.append(_leak("length of history", "structure", lengths, alarm, by_value=True))
    return Leakage(alarm, tuple(leaks), found, tuple(marginals))


def _count_column(table: Interactions, directory: Path, column: Column) -> ValueCounts:
    if column.role is Role.USER:
        # A user's rows must be in several folds, or his rate is known to none.
        return count_values(_of_table(table, table.user_R), table, fold_of=_folds_of_rows)
    if column.role is Role.ITEM:
        return count_values(_of_table(table, table.item_R), table)
    return count_values(_of_events(directory, column), table)


def _of_table(table: Interactions, column_R: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for rows in blocks_of_users(table):
        yield rows, column_R[rows]


def _of_events(directory: Path, column: Column) -> Iterator[tuple[slice, np.ndarray]]:
    start = 0
    for batch in read_events(directory, [column.name]):
        yield slice(start, start + batch.num_rows), values_of(batch.column(column.name))
        start += batch.num_rows


def _folds_of_rows(rows: slice) -> np.ndarray:
    return np.arange(rows.start, rows.stop) % FOLDS


def _leak(name: str, role: str, counts: ValueCounts, alarm: float, *, by_value: bool) -> ColumnLeak:
    """Of the readings that make sense, the one that tells more."""
    readings = {"rate": counts.by_rate()} | ({"value": counts.by_value()} if by_value else {})
    strength = {reading: max(area, 1 - area) for reading, area in readings.items() if not np.isnan(area)}
    reading = max(strength, key=strength.__getitem__) if strength else "rate"
    found = strength.get(reading, float("nan"))
    if role == Role.POST_EXPOSURE.value:
        reason = f"known only after the exposure, so never an input; alone it reaches an AUC of {found:.3f}"
    elif found >= alarm:
        reason = f"alone it reaches an AUC of {found:.3f}, the alarm is {alarm:g}"
    else:
        reason = ""
    return ColumnLeak(name, role, len(counts.value_V), found, reading, bool(reason), reason)


def _marginal(column: Column, counts: ValueCounts) -> Marginal:
    rows_V = counts.rows_VF2.sum(axis=(1, 2))
    shown = np.sort(np.argsort(-rows_V, kind="stable")[:SHOWN_VALUES])
    names = [_name(value) for value in counts.value_V[shown].tolist()]
    total = int(rows_V.sum())
    shares = {name: ratio(int(rows), total) for name, rows in zip(names, rows_V[shown], strict=True)}
    return Marginal(column.name, shares, ratio(total - int(rows_V[shown].sum()), total))


def _name(value: float | str) -> str:
    """A value as text; NaN and the empty text are what `values_of` makes of a missing one."""
    if isinstance(value, str):
        return value or "missing"
    return "missing" if value != value else f"{value:g}" if isinstance(value, float) else str(value)


def _structure(table: Interactions) -> Iterator[tuple[str, ValueCounts]]:
    """Features that only the arrangement of the rows tells: how far a row is from either end of the user's block."""

    def blocks(from_end: bool) -> Iterator[tuple[slice, np.ndarray]]:
        for rows in blocks_of_users(table):
            row, user = np.arange(rows.start, rows.stop), table.user_R[rows]
            yield rows, table.offsets[user + 1] - row - 1 if from_end else row - table.offsets[user]

    def sizes() -> Iterator[tuple[slice, np.ndarray]]:
        for rows in blocks_of_users(table):
            user = table.user_R[rows]
            yield rows, table.offsets[user + 1] - table.offsets[user]

    yield "position in the user's block", count_values(blocks(from_end=False), table)
    yield "rows to the end of the user's block", count_values(blocks(from_end=True), table)
    yield "rows of the user", count_values(sizes(), table)


def _history(table: Interactions, directory: Path, columns: tuple[Column, ...]) -> tuple[HistoryLeak, ValueCounts]:
    target = future = entries = logged = static = filled = 0
    names = [column.name for column in columns]
    lengths: list[tuple[slice, np.ndarray]] = []
    batches = read_events(directory, names)
    for rows, table_rows in _aligned(batches, list(blocks_of_users(table, HISTORY_BLOCK_ROWS))):
        raw_RS = np.stack([as_numpy(table_rows.column(name)) for name in names], axis=1)
        item_R, user_R = np.asarray(table.item_R[rows]), np.asarray(table.user_R[rows])
        present_RS = raw_RS != 0
        lengths.append((rows, present_RS.sum(axis=1).astype(np.int8)))
        dense_RS = np.where(present_RS, table.dense_item(raw_RS), 0)
        target += int((present_RS & (raw_RS == np.asarray(table.items.raw_id)[item_R][:, None])).any(axis=1).sum())
        clicked_R = np.asarray(table.labels_RA[rows, table.actions.index("click")]) == 1
        first_RS = _first_click(user_R, item_R, clicked_R, dense_RS)
        known_RS = first_RS >= 0
        entries, logged = entries + int(present_RS.sum()), logged + int(known_RS.sum())
        future += int((known_RS & (first_RS > np.arange(len(user_R))[:, None])).any(axis=1).sum())
        begins = np.flatnonzero(np.concatenate([[True], user_R[1:] != user_R[:-1]]))
        size = np.diff(begins, append=len(user_R))
        same_R = (raw_RS == np.repeat(raw_RS[begins], size, axis=0)).all(axis=1)
        static += int(np.logical_and.reduceat(same_R, begins).sum())
        filled += int(present_RS[begins].any(axis=1).sum())
    counts = count_values(iter(lengths), table)
    share = counts.rows_VF2.sum(axis=(1, 2)) / table.num_rows
    users = int((np.diff(table.offsets) > 0).sum())
    found = HistoryLeak(
        target_in_history=ratio(target, table.num_rows),
        future=ratio(future, table.num_rows),
        logged=ratio(logged, entries),
        static_users=ratio(static, users),
        filled_first_rows=ratio(filled, users),
        lengths=dict(zip(map(str, counts.value_V.tolist()), share.tolist(), strict=True)),
    )
    return found, counts


def _first_click(
    user_R: np.ndarray, item_R: np.ndarray, clicked_R: NDArray[np.bool_], item_RS: np.ndarray
) -> NDArray[np.int64]:
    """The row, within these rows, of the user's first click on each item of his history; -1 for none or no item."""
    clicks = np.flatnonzero(clicked_R)
    key_C = user_R[clicks].astype(np.int64) << 32 | item_R[clicks]
    key_C, first = np.unique(key_C, return_index=True)
    if not len(key_C):
        return np.full(item_RS.shape, -1, np.int64)
    wanted_RS = user_R.astype(np.int64)[:, None] << 32 | item_RS
    place_RS = np.minimum(np.searchsorted(key_C, wanted_RS), len(key_C) - 1)
    found_RS = (key_C[place_RS] == wanted_RS) & (item_RS > 0)
    return np.where(found_RS, clicks[first[place_RS]], -1)


def _aligned(batches: Iterator[pa.RecordBatch], slices: list[slice]) -> Iterator[tuple[slice, pa.Table]]:
    """The batches cut again where the slices, which follow one another, end."""
    waiting: list[pa.RecordBatch] = []
    have = 0
    for rows in slices:
        size = rows.stop - rows.start
        while have < size:
            batch = next(batches)
            waiting.append(batch)
            have += batch.num_rows
        whole = pa.Table.from_batches(waiting)
        yield rows, whole.slice(0, size)
        rest = whole.slice(size)
        waiting, have = rest.to_batches(), rest.num_rows
