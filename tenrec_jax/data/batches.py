"""Timelines cut into windows and packed into batches. `batch(step)` is a pure function of its arguments: there is no iterator state."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.data.packing import pack
from tenrec_jax.data.protocols import Part, Split
from tenrec_jax.data.row_blocks import place_in_block, process_rows, row_blocks, user_blocks
from tenrec_jax.data.unknown import UnknownRates
from tenrec_jax.errors import UserError
from tenrec_jax.timeline import Events, Profile, Timeline


class TimelineBatch(NamedTuple):
    """Packed timelines.

    Attributes:
        timeline: T slots a row, up to U windows in it.
        score: the events that count, bool [B, T].
        row: their rows in the table, [B, T].
        window: number of the window at each place, -1 where there is none, [B, U].
    """

    timeline: Timeline
    score: np.ndarray
    row: np.ndarray
    window: np.ndarray


@dataclass(frozen=True)
class TrainVocabulary:
    """Ids that training rows mention; every other id is the unknown one, 0.

    Attributes:
        user: int32 [U + 1], the id itself or 0. item: int32 [N + 1], likewise.
    """

    user: np.ndarray
    item: np.ndarray

    @classmethod
    def of(cls, table: Interactions, split: Split) -> "TrainVocabulary":
        """The vocabulary of the rows that `split` trains on.

        Raises:
            UserError: a row names an item that the table does not have, or a label that is neither 0 nor 1.
        """
        vocabulary = cls(np.zeros(table.num_users + 1, np.int32), np.zeros(table.num_items + 1, np.int32))
        for rows in row_blocks(table.num_rows):
            trained = split.part_R[rows] == Part.TRAIN
            _refuse_impossible(table, np.arange(rows.start, rows.stop), table.item_R[rows], table.labels_RA[rows])
            for known, ids in ((vocabulary.user, table.user_R[rows]), (vocabulary.item, table.item_R[rows])):
                known[ids[trained]] = ids[trained]
        return vocabulary


class Windows(NamedTuple):
    """Stretches of the visible rows, each of one dense user: positions [start, stop), of which [score_from, stop) count."""

    user: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    score_from: np.ndarray

    @property
    def events(self) -> np.ndarray:
        """Number of events in each."""
        return self.stop - self.start


class Padding(NamedTuple):
    """Shares of an epoch's slots: in packed rows, those without an event; and of all slots, those in the rows that fill the last batch."""

    within: float
    filling: float


class TimelineReader:
    """Reads timelines of the rows that a stage may see.

    Opening costs a bisection a user, `windows` one pass over `scored` in blocks; `visible` is kept, so give it in int32 where that holds
    the row numbers. The rows themselves are read batch by batch.

    Args:
        table: the log.
        vocabulary: ids known from training rows.
        visible: rows that may appear, ascending; a user's visible rows are that user's timeline.
        scored: the rows to be predicted, bool [R]; None if there are none.
        scored_seen: whether the events after a scored one may read it. If not, it is masked and its actions are left out: every scored
            row is predicted from the others before it, and none is in the context of another.
    """

    def __init__(
        self,
        table: Interactions,
        vocabulary: TrainVocabulary,
        visible: np.ndarray,
        scored: np.ndarray | None = None,
        *,
        scored_seen: bool = True,
    ) -> None:
        self._table, self._vocabulary, self._visible = table, vocabulary, visible
        self._scored, self._scored_seen = scored, scored_seen
        # A user's stretch of `visible`; searching for another type of integer would copy it.
        self.offsets = np.searchsorted(visible, np.asarray(table.offsets, visible.dtype))

    def windows(self, max_length: int, stride: int) -> Windows:
        """Cut timelines so that every scored row counts in exactly one window, with up to `max_length` events in sight.

        A user's windows go back from the last scored row in steps of `stride`; those without a scored row are left out.

        Args:
            max_length: events in a window.
            stride: the last events of a window, of which the scored ones count; the rest is context.
        """
        if self._scored is None:
            raise ValueError("the reader has no scored rows")
        windows = [Windows(*np.zeros((4, 0), np.int64))]
        for users, positions in user_blocks(self.offsets):
            place = np.flatnonzero(self._scored[self._visible[positions]]) + positions.start
            low, high = np.searchsorted(place, self.offsets[users]), np.searchsorted(place, self.offsets[1:][users])
            user = np.flatnonzero(low < high)  # places in the stretch of users
            first, end, begin = place[low[user]], place[high[user] - 1] + 1, self.offsets[users][user]
            number = -(-(end - first) // stride)
            nth_from_end = place_in_block(np.concatenate([[0], np.cumsum(number)]))
            stop = np.repeat(end, number) - nth_from_end * stride
            start = np.maximum(np.repeat(begin, number), stop - max_length)
            score_from = np.maximum(np.repeat(first, number), stop - stride)
            counts = np.searchsorted(place, score_from) < np.searchsorted(place, stop)
            dense = np.repeat(user + users.start, number)
            windows.append(Windows(*(field[counts] for field in (dense, start, stop, score_from))))
        return Windows(*(np.concatenate(field) for field in zip(*windows, strict=True)))

    def histories(self, users: np.ndarray, max_length: int) -> Windows:
        """The last `max_length` visible events of each user, none of which counts; a user without events gives an empty window."""
        stop = self.offsets[users + 1]
        return Windows(users, np.maximum(self.offsets[users], stop - max_length), stop, stop)

    def read(self, windows: Windows, window_BU: np.ndarray, start_BU: np.ndarray, length: int) -> TimelineBatch:
        """Gather windows into rows of `length` slots.

        Args:
            windows: all windows.
            window_BU: numbers of those of each row; -1 where there are fewer.
            start_BU: first slot of each; `length` where there are fewer.

        Raises:
            UserError: a row of the table names an item that it does not have, or a label that is neither 0 nor 1.
        """
        table, vocabulary = self._table, self._vocabulary
        windows_BU = Windows(*(np.where(window_BU >= 0, field[window_BU], 0) for field in windows))
        events_P = windows_BU.events.reshape(-1)
        slot = np.repeat((start_BU + length * np.arange(len(start_BU))[:, None]).reshape(-1), events_P)
        within = place_in_block(np.concatenate([[0], np.cumsum(events_P)]))
        position = np.repeat(windows_BU.start.reshape(-1), events_P) + within
        shown_BT, scored_BT, counts_BT = np.zeros((3, len(start_BU), length), bool)
        row_BT = np.zeros((len(start_BU), length), self._visible.dtype)
        shown_BT.flat[slot + within] = True
        row_BT.flat[slot + within] = self._visible[position]
        if self._scored is not None:
            scored_BT = shown_BT & self._scored[row_BT]
            counts_BT.flat[slot + within] = position >= np.repeat(windows_BU.score_from.reshape(-1), events_P)
        mask_BT = shown_BT if self._scored_seen else shown_BT & ~scored_BT
        item_BT = np.where(shown_BT, table.item_R[row_BT], 0)
        action_BTA = table.labels_RA[row_BT]
        _refuse_impossible(table, row_BT, item_BT, action_BTA)
        user_BU = windows_BU.user
        timeline = Timeline(
            Profile(vocabulary.user[user_BU], table.users.gender[user_BU], table.users.age[user_BU]),
            start_BU,
            Events(
                item=vocabulary.item[item_BT],
                category=table.items.category[item_BT],
                action=np.where(mask_BT[..., None], action_BTA, 0).astype(np.int8),
                mask=mask_BT,
            ),
        )
        return TimelineBatch(timeline, scored_BT & counts_BT, row_BT, window_BU)


class TimelineBatches:
    """Batches of packed windows, in an order that depends on (seed, epoch) alone.

    All batches have one shape: rows of T slots, as many as hold about `events_per_batch` events; the last batch is filled up with empty
    rows. Which lengths stand together in a row is fixed, which windows of those lengths and in which batch is drawn anew every epoch.
    Each of several processes asks for its own stretch of a step's rows; together they are the batch that one process gets.

    Args:
        reader: the timelines.
        windows: what to draw.
        events_per_batch: slots of a batch.
        multiple: the number of rows is a multiple of it (the number of devices of all processes).
        seed: of the order; None draws nothing (evaluation).
        unknown: how often a batch makes items and users unknown; None never does.
        any_order: permute the events of each timeline anew in every batch. Where a user's order means little, this shows each event after
            many different histories (permutation language modelling: Yang et al., 2019).
        next_event: give each window one more slot, for the event after its last one, so that a model answers for it too.
    """

    def __init__(
        self,
        reader: TimelineReader,
        windows: Windows,
        *,
        events_per_batch: int,
        multiple: int = 1,
        seed: int | None = None,
        unknown: UnknownRates | None = None,
        any_order: bool = False,
        next_event: bool = False,
    ) -> None:
        self._reader, self._seed = reader, seed
        self._unknown, self._any_order = unknown, any_order
        self.windows = windows
        self._slots_W = windows.events + next_event
        self._packs = pack(self._slots_W, events_per_batch // multiple)
        # Rounded to powers of two, so that evaluations of several parts share their compiled functions.
        rows = max(1, events_per_batch // (self._packs.row_length * multiple))
        self._rows = min(rows, _power_of_two(-(-self._packs.rows // multiple))) * multiple
        self._places = min(_power_of_two(self._packs.places), self._packs.row_length)
        self.steps_per_epoch = -(-self._packs.rows // self._rows)
        # The places of each length in turn: windows of that length go there.
        self._by_length = np.argsort(self._packs.length, kind="stable").astype(np.int32)
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    @property
    def rows(self) -> int:
        """Rows of a batch, of all processes."""
        return self._rows

    @property
    def padding(self) -> Padding:
        """What the batches of an epoch hold beside events."""
        return Padding(self._packs.padding, 1 - self._packs.rows / (self.steps_per_epoch * self._rows))

    def __call__(self, step: int, process_index: int = 0, process_count: int = 1) -> TimelineBatch:
        """The batch of `step`, counted from 0 over all epochs, or one process's stretch of its rows.

        Raises:
            ValueError: the batch cannot be divided by the number of processes; `multiple` has to be a multiple of it.
        """
        rows, shape = process_rows(self._rows, process_index, process_count), (self._rows, self._packs.row_length)
        epoch, place = divmod(step, self.steps_per_epoch)
        window_P, row_R = self._plan(epoch)
        batch_R = row_R[place * self._rows : (place + 1) * self._rows]
        window_BU, start_BU = self._placed(window_P, batch_R[rows], rows.stop - rows.start)
        batch = self._reader.read(self.windows, window_BU, start_BU, self._packs.row_length)
        # Drawn for the whole batch, whatever part of it is wanted.
        if self._any_order:
            batch = _permuted(batch, np.random.default_rng((self._seed or 0, step, 3)).random(shape)[rows])
        if self._unknown is not None:
            generator = np.random.default_rng((self._seed or 0, step, 1))
            forget_BT = generator.random(shape)[rows] < self._unknown.item_N1[batch.timeline.events.item]
            forget_BU = generator.random((self._rows, self._places))[rows] < self._unknown.user
            batch = _forgetting(batch, forget_BT, forget_BU)
        return batch

    def _placed(self, window_P: np.ndarray, row_B: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The window at each place of some packed rows, and its first slot; filled up to `size` rows."""
        packs = self._packs
        window_BU = np.full((size, self._places), -1, np.int64)
        start_BU = np.full((size, self._places), packs.row_length, np.int32)
        start_BU[:, 0] = 0
        offset_B, number_B = packs.offset[row_B], packs.offset[row_B + 1] - packs.offset[row_B]
        is_place = np.arange(self._places) < number_B[:, None]
        place = (offset_B[:, None] + np.arange(self._places))[is_place]
        window_BU[: len(row_B)][is_place], start_BU[: len(row_B)][is_place] = window_P[place], packs.start[place]
        return window_BU, start_BU

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The window at every place, [P], and the order of the packed rows, [R]."""
        window_P, row_R = np.arange(len(self._slots_W), dtype=np.int32), np.arange(self._packs.rows)
        if self._seed is not None:
            generator = np.random.default_rng((self._seed, epoch, 0))
            window_P, row_R = generator.permutation(window_P), generator.permutation(row_R)
        placed = np.empty_like(window_P)
        placed[self._by_length] = window_P[np.argsort(self._slots_W[window_P], kind="stable")]
        return placed, row_R


def _refuse_impossible(table: Interactions, row: np.ndarray, item: np.ndarray, action_A: np.ndarray) -> None:
    """Look here, on the host: on a device an id beyond its table reads another row, or none, and nobody is told.

    Args:
        row, item: of some events, arrays of one shape. action_A: their labels, one dimension more.
    """
    bad = (item < 0) | (item > table.num_items) | ((action_A != 0) & (action_A != 1)).any(-1)
    if bad.any():
        place = tuple(np.argwhere(bad)[0])
        raise UserError(
            f"Row {row[place]} of the table holds item {item[place]} and labels {action_A[place].tolist()}; items are 1 to "
            f"{table.num_items}, labels 0 or 1. The table is damaged: check it with tenrec-jax verify, or ingest the log again."
        )


def _power_of_two(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def _permuted(batch: TimelineBatch, place_BT: np.ndarray) -> TimelineBatch:
    """The events of each timeline in the order of `place_BT`."""
    start_BU, events = batch.timeline.start, batch.timeline.events
    first_BT = np.zeros((len(start_BU), place_BT.shape[1] + 1), np.int32)
    np.put_along_axis(first_BT, start_BU, 1, axis=1)
    segment_BT = np.cumsum(first_BT[:, :-1], axis=1)
    order_BT = np.argsort(segment_BT + np.where(events.mask, place_BT, 1.0), axis=1, kind="stable")

    def permute(x_BT: np.ndarray) -> np.ndarray:
        return np.take_along_axis(x_BT, order_BT.reshape(*order_BT.shape, *(1,) * (x_BT.ndim - 2)), axis=1)

    timeline = batch.timeline._replace(events=Events(*map(permute, events)))
    return batch._replace(timeline=timeline, score=permute(batch.score), row=permute(batch.row))


def _forgetting(batch: TimelineBatch, forget_BT: np.ndarray, forget_BU: np.ndarray) -> TimelineBatch:
    """The batch with some items and some users, with all that is known of them, made unknown."""
    timeline = batch.timeline
    events = timeline.events._replace(item=np.where(forget_BT, 0, timeline.events.item))
    profile = Profile(*(np.where(forget_BU, 0, field) for field in timeline.profile))
    return batch._replace(timeline=timeline._replace(events=events, profile=profile))
