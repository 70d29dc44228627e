"""Timelines cut into windows and gathered into batches. `batch(step)` is a pure function of its arguments: there is no iterator state."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.data.protocols import Part, Split
from tenrec_jax.data.row_blocks import place_in_block, row_blocks, user_blocks
from tenrec_jax.timeline import Timeline

MAX_PADDING, MAX_BUCKETS = 0.15, 12


class TimelineBatch(NamedTuple):
    """Timelines of one padded length. `score` [B, T] marks the events that count; `row` [B, T] their rows in the table."""

    timeline: Timeline
    score: np.ndarray
    row: np.ndarray


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
        """The vocabulary of the rows that `split` trains on."""
        vocabulary = cls(np.zeros(table.num_users + 1, np.int32), np.zeros(table.num_items + 1, np.int32))
        for rows in row_blocks(table.num_rows):
            trained = split.part_R[rows] == Part.TRAIN
            for known, ids in ((vocabulary.user, table.user_R[rows]), (vocabulary.item, table.item_R[rows])):
                known[ids[trained]] = ids[trained]
        return vocabulary


class Windows(NamedTuple):
    """Stretches of the visible rows, each of one user: positions [start, stop), of which [score_from, stop) count."""

    start: np.ndarray
    stop: np.ndarray
    score_from: np.ndarray


class Padding(NamedTuple):
    """Shares of an epoch's slots: in rows with events, those without one; and of all slots, those in filling rows of last batches."""

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
        windows = [Windows(*np.zeros((3, 0), np.int64))]
        for users, positions in user_blocks(self.offsets):
            place = np.flatnonzero(self._scored[self._visible[positions]]) + positions.start
            low, high = np.searchsorted(place, self.offsets[users]), np.searchsorted(place, self.offsets[1:][users])
            user = np.flatnonzero(low < high)
            first, end, begin = place[low[user]], place[high[user] - 1] + 1, self.offsets[users][user]
            number = -(-(end - first) // stride)
            nth_from_end = place_in_block(np.concatenate([[0], np.cumsum(number)]))
            stop = np.repeat(end, number) - nth_from_end * stride
            start = np.maximum(np.repeat(begin, number), stop - max_length)
            score_from = np.maximum(np.repeat(first, number), stop - stride)
            counts = np.searchsorted(place, score_from) < np.searchsorted(place, stop)
            windows.append(Windows(start[counts], stop[counts], score_from[counts]))
        return Windows(*(np.concatenate(field) for field in zip(*windows, strict=True)))

    def histories(self, users: np.ndarray, max_length: int) -> Windows:
        """The last `max_length` visible events of each user, none of which counts; a user without events gives an empty window."""
        stop = self.offsets[users + 1]
        return Windows(np.maximum(self.offsets[users], stop - max_length), stop, stop)

    def read(self, windows: Windows, users: np.ndarray, length: int) -> TimelineBatch:
        """Gather windows, padded to `length`. `users` are their dense user ids (0 for an empty row)."""
        table, position_BT = self._table, windows.start[:, None] + np.arange(length)
        shown_BT = position_BT < windows.stop[:, None]
        row_BT = np.where(shown_BT, self._visible[np.where(shown_BT, position_BT, 0)] if len(self._visible) else 0, 0)
        scored_BT = shown_BT & self._scored[row_BT] if self._scored is not None else np.zeros_like(shown_BT)
        mask_BT = shown_BT if self._scored_seen else shown_BT & ~scored_BT
        item_BT = np.where(shown_BT, table.item_R[row_BT], 0)
        timeline = Timeline(
            user=self._vocabulary.user[users],
            gender=table.users.gender[users],
            age=table.users.age[users],
            item=self._vocabulary.item[item_BT],
            category=table.items.category[item_BT],
            action=np.where(mask_BT[..., None], table.labels_RA[row_BT], 0).astype(np.int8),
            mask=mask_BT,
        )
        return TimelineBatch(timeline, scored_BT & (position_BT >= windows.score_from[:, None]), row_BT)

    def users_of(self, windows: Windows) -> np.ndarray:
        """Dense user id of each non-empty window."""
        return self._table.user_R[self._visible[windows.start]]


class TimelineBatches:
    """Batches of windows, bucketed by length, in an order that depends on (seed, epoch) alone.

    A batch holds about `events_per_batch` events whatever its bucket; the last batch of a bucket is filled up with empty rows. Each of
    several processes asks for its own stretch of a step's rows; together they are the batch that one process gets.

    Args:
        reader: the timelines.
        windows: what to draw.
        buckets: padded lengths, ascending; the last holds the longest window.
        events_per_batch: events in a batch, padding counted.
        multiple: batch sizes are multiples of it (the number of devices of all processes).
        seed: of the order; None keeps the order of the table (evaluation).
        unknown_rate: share of items and of users that a batch makes unknown, which trains what new ones will meet.
        any_order: permute the events of each timeline anew in every batch. Where a user's order means little, this shows each event after
            many different histories (permutation language modelling: Yang et al., 2019).
    """

    def __init__(
        self,
        reader: TimelineReader,
        windows: Windows,
        *,
        buckets: Sequence[int],
        events_per_batch: int,
        multiple: int = 1,
        seed: int | None = None,
        unknown_rate: float = 0.0,
        any_order: bool = False,
    ) -> None:
        self._reader, self._windows, self._seed = reader, windows, seed
        self._unknown_rate, self._any_order = unknown_rate, any_order
        self._buckets = np.asarray(buckets)
        self._bucket_W = np.searchsorted(self._buckets, windows.stop - windows.start)
        self._sizes = _batch_sizes(buckets, events_per_batch, multiple)
        self._members = np.bincount(self._bucket_W, minlength=len(buckets))
        self._batches = -(-self._members // self._sizes)
        self.steps_per_epoch = int(self._batches.sum())
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    @property
    def padding(self) -> Padding:
        """What the batches of an epoch hold beside events."""
        events = int((self._windows.stop - self._windows.start).sum())
        slots, filled = int(self._members @ self._buckets), int((self._batches * self._sizes) @ self._buckets)
        return Padding(1 - events / slots, 1 - slots / filled)

    def __call__(self, step: int, process_index: int = 0, process_count: int = 1) -> TimelineBatch:
        """The batch of `step`, counted from 0 over all epochs, or one process's stretch of its rows.

        Raises:
            ValueError: the batch cannot be divided by the number of processes; `multiple` has to be a multiple of it.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        bucket, chosen = self._plan(epoch)[place]
        size, length = int(self._sizes[bucket]), int(self._buckets[bucket])
        if size % process_count:
            raise ValueError(f"{size} rows cannot be divided by {process_count} processes")
        share = size // process_count
        rows = slice(process_index * share, (process_index + 1) * share)
        chosen = chosen[rows]
        windows = Windows(*(field[chosen] for field in self._windows))
        padding = (0, share - len(chosen))
        users = np.pad(self._reader.users_of(windows), padding)
        batch = self._reader.read(Windows(*(np.pad(field, padding) for field in windows)), users, length)
        if self._any_order:
            # Drawn for the whole batch, whatever part of it is wanted.
            place_BT = np.random.default_rng((self._seed or 0, step, 3)).random((size, length))[rows]
            batch = _permuted(batch, place_BT)
        if self._unknown_rate:
            generator = np.random.default_rng((self._seed or 0, step, 1))
            forget_BT = generator.random((size, length))[rows] < self._unknown_rate
            batch = _forgetting(batch, forget_BT, generator.random(size)[rows] < self._unknown_rate)
        return batch

    def _make_plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        generator = None if self._seed is None else np.random.default_rng((self._seed, epoch, 0))
        plan = []
        for bucket, size in enumerate(self._sizes):
            members = np.flatnonzero(self._bucket_W == bucket)
            if generator is not None:
                members = generator.permutation(members)
            plan += [(bucket, members[i : i + size]) for i in range(0, len(members), size)]
        return plan if generator is None else [plan[i] for i in generator.permutation(len(plan))]


def _permuted(batch: TimelineBatch, place_BT: np.ndarray) -> TimelineBatch:
    """The events of each timeline in the order of `place_BT`, padding at the end."""
    timeline = batch.timeline
    order_BT = np.argsort(np.where(timeline.mask, place_BT, 2.0), axis=1)

    def permute(x_BT: np.ndarray) -> np.ndarray:
        return np.take_along_axis(x_BT, order_BT, axis=1)

    action_BTA = np.take_along_axis(timeline.action, order_BT[..., None], axis=1)
    events = {name: permute(getattr(timeline, name)) for name in ("item", "category", "mask")}
    return TimelineBatch(timeline._replace(action=action_BTA, **events), permute(batch.score), permute(batch.row))


def _forgetting(batch: TimelineBatch, forget_BT: np.ndarray, forget_B: np.ndarray) -> TimelineBatch:
    """The batch with some items and some users, with all that is known of them, made unknown."""
    timeline = batch.timeline
    return batch._replace(
        timeline=timeline._replace(
            item=np.where(forget_BT, 0, timeline.item),
            user=np.where(forget_B, 0, timeline.user),
            gender=np.where(forget_B, 0, timeline.gender),
            age=np.where(forget_B, 0, timeline.age),
        )
    )


def bucket_lengths(max_length: int, smallest: int = 32) -> tuple[int, ...]:
    """Padded lengths for unknown data: powers of two up to `max_length`. Each costs one compilation."""
    return (*(smallest << i for i in range(32) if smallest << i < max_length), max_length)


def fitted_bucket_lengths(
    lengths: np.ndarray, events_per_batch: int, multiple: int = 1, max_padding: float = MAX_PADDING
) -> tuple[int, ...]:
    """Padded lengths for known data: the fewest that keep padding below `max_padding`, since each costs a compilation.

    For each number of buckets, dynamic programming over the places to cut finds those with the least padding. A further bucket is not
    made where it only trades padding for filling rows, as on logs of a few batches, nor beyond `MAX_BUCKETS`. Very long windows have
    their lengths rounded up to a 512th of the longest.

    Args:
        lengths: of the windows, at least 1, [W].
        events_per_batch, multiple: of the batches, see `TimelineBatches`.
        max_padding: share of the slots in rows with events that hold none.
    """
    longest = int(lengths.max())
    step = -(-longest // 512)
    ends, windows = np.unique(np.minimum(-(-lengths // step) * step, longest), return_counts=True)
    before = np.concatenate([[0], np.cumsum(windows)])
    # slots[i, j]: of one bucket for the windows of ends i..j.
    slots = np.where(np.tri(len(ends), dtype=bool).T, ends * (before[1:] - before[:-1, None]), np.inf)
    best, cuts = slots[0], list[np.ndarray]()
    chosen = (longest,)
    while 1 - lengths.sum() / best[-1] > max_padding and len(chosen) < min(MAX_BUCKETS, len(ends)):
        # The last of the buckets begins at end i; the others hold the ends before it.
        total = np.concatenate([[np.inf], best[:-1]])[:, None] + slots
        cuts.append(total.argmin(0))
        best = total.min(0)
        further = tuple(ends[_last_ends(cuts)].tolist())
        if _all_slots(lengths, further, events_per_batch, multiple) >= _all_slots(
            lengths, chosen, events_per_batch, multiple
        ):
            break
        chosen = further
    return chosen


def _last_ends(cuts: list[np.ndarray]) -> list[int]:
    """The last end of each bucket, going back from the last one through where each begins."""
    places = [len(cuts[0]) - 1]
    for cut in reversed(cuts):
        places.append(int(cut[places[-1]]) - 1)
    return places[::-1]


def _all_slots(lengths: np.ndarray, buckets: Sequence[int], events_per_batch: int, multiple: int) -> int:
    """Slots of an epoch's batches, filling rows counted."""
    members = np.bincount(np.searchsorted(buckets, lengths), minlength=len(buckets))
    sizes = _batch_sizes(buckets, events_per_batch, multiple)
    return int((-(-members // sizes) * sizes) @ np.asarray(buckets))


def _batch_sizes(buckets: Sequence[int], events_per_batch: int, multiple: int) -> np.ndarray:
    return np.maximum(1, events_per_batch // (np.asarray(buckets) * multiple)) * multiple
