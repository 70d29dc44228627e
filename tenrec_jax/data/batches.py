"""Timelines cut into windows and gathered into batches. `batch(step)` is a pure function of its arguments: there is no iterator state."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tenrec_jax.data.interactions import Interactions
from tenrec_jax.data.protocols import Part, Split
from tenrec_jax.timeline import Timeline


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
        rows = split.rows(Part.TRAIN)

        def known(ids: np.ndarray, size: int) -> np.ndarray:
            vocabulary = np.zeros(size, np.int32)
            vocabulary[ids] = ids
            return vocabulary

        return cls(known(table.user_R[rows], table.num_users + 1), known(table.item_R[rows], table.num_items + 1))


class Windows(NamedTuple):
    """Stretches of the visible rows, each of one user: positions [start, stop), of which [score_from, stop) count."""

    start: np.ndarray
    stop: np.ndarray
    score_from: np.ndarray


class TimelineReader:
    """Reads timelines of the rows that a stage may see.

    Args:
        table: the log.
        vocabulary: ids known from training rows.
        visible: rows that may appear, ascending; a user's visible rows are that user's timeline.
    """

    def __init__(self, table: Interactions, vocabulary: TrainVocabulary, visible: np.ndarray) -> None:
        self._table, self._vocabulary, self._visible = table, vocabulary, visible
        self.offsets = np.searchsorted(visible, table.offsets)  # a user's stretch of `visible`

    def windows(self, scored: np.ndarray, max_length: int, stride: int) -> Windows:
        """Cut timelines so that every row in `scored` counts in exactly one window, with up to `max_length` events in sight.

        Args:
            scored: bool [R]; in a user's timeline the scored rows stand at the end.
            max_length: events in a window.
            stride: events that count in a window, at most; the rest of the window is context.
        """
        stop_U = self.offsets[1:]
        counted = np.concatenate([[0], np.cumsum(scored[self._visible])])
        scored_U = counted[stop_U] - counted[self.offsets[:-1]]
        windows_U = -(-scored_U // stride)
        user = np.repeat(np.arange(len(stop_U)), windows_U)
        nth_from_end = np.arange(len(user)) - np.repeat(np.cumsum(windows_U) - windows_U, windows_U)
        stop = stop_U[user] - nth_from_end * stride
        return Windows(
            np.maximum(self.offsets[:-1][user], stop - max_length),
            stop,
            np.maximum(stop_U[user] - scored_U[user], stop - stride),
        )

    def histories(self, users: np.ndarray, max_length: int) -> Windows:
        """The last `max_length` visible events of each user, none of which counts; a user without events gives an empty window."""
        stop = self.offsets[users + 1]
        return Windows(np.maximum(self.offsets[users], stop - max_length), stop, stop)

    def read(self, windows: Windows, users: np.ndarray, length: int) -> TimelineBatch:
        """Gather windows, padded to `length`. `users` are their dense user ids (0 for an empty row)."""
        table, position_BT = self._table, windows.start[:, None] + np.arange(length)
        mask_BT = position_BT < windows.stop[:, None]
        row_BT = np.where(mask_BT, self._visible[np.where(mask_BT, position_BT, 0)] if len(self._visible) else 0, 0)
        item_BT = np.where(mask_BT, table.item_R[row_BT], 0)
        timeline = Timeline(
            user=self._vocabulary.user[users],
            gender=table.users.gender[users],
            age=table.users.age[users],
            item=self._vocabulary.item[item_BT],
            category=table.items.category[item_BT],
            action=np.where(mask_BT[..., None], table.labels_RA[row_BT], 0).astype(np.int8),
            mask=mask_BT,
        )
        return TimelineBatch(timeline, mask_BT & (position_BT >= windows.score_from[:, None]), row_BT)

    def users_of(self, windows: Windows) -> np.ndarray:
        """Dense user id of each non-empty window."""
        return self._table.user_R[self._visible[windows.start]]


class TimelineBatches:
    """Batches of windows, bucketed by length, in an order that depends on (seed, epoch) alone.

    A batch holds about `events_per_batch` events whatever its bucket; the last batch of a bucket is filled up with empty rows.

    Args:
        reader: the timelines.
        windows: what to draw.
        buckets: padded lengths, ascending; the last holds the longest window.
        events_per_batch: events in a batch, padding counted.
        multiple: batch sizes are multiples of it (the number of devices).
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
        self._sizes = [max(1, events_per_batch // (length * multiple)) * multiple for length in buckets]
        members = np.bincount(self._bucket_W, minlength=len(buckets))
        self.steps_per_epoch = int(sum(-(-count // size) for count, size in zip(members, self._sizes, strict=True)))
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    def __call__(self, step: int) -> TimelineBatch:
        """The batch of `step`, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        bucket, chosen = self._plan(epoch)[place]
        padding = self._sizes[bucket] - len(chosen)
        windows = Windows(*(np.pad(field[chosen], (0, padding)) for field in self._windows))
        users = np.pad(self._reader.users_of(Windows(*(field[chosen] for field in self._windows))), (0, padding))
        batch = self._reader.read(windows, users, int(self._buckets[bucket]))
        if self._any_order:
            batch = self._permuted(batch, step)
        return self._forget_some(batch, step) if self._unknown_rate else batch

    def _make_plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        generator = None if self._seed is None else np.random.default_rng((self._seed, epoch, 0))
        plan = []
        for bucket, size in enumerate(self._sizes):
            members = np.flatnonzero(self._bucket_W == bucket)
            if generator is not None:
                members = generator.permutation(members)
            plan += [(bucket, members[i : i + size]) for i in range(0, len(members), size)]
        return plan if generator is None else [plan[i] for i in generator.permutation(len(plan))]

    def _permuted(self, batch: TimelineBatch, step: int) -> TimelineBatch:
        timeline = batch.timeline
        place_BT = np.random.default_rng((self._seed or 0, step, 3)).random(timeline.mask.shape)
        order_BT = np.argsort(np.where(timeline.mask, place_BT, 2.0), axis=1)

        def permute(x_BT: np.ndarray) -> np.ndarray:
            return np.take_along_axis(x_BT, order_BT, axis=1)

        action_BTA = np.take_along_axis(timeline.action, order_BT[..., None], axis=1)
        events = {name: permute(getattr(timeline, name)) for name in ("item", "category", "mask")}
        return TimelineBatch(timeline._replace(action=action_BTA, **events), permute(batch.score), permute(batch.row))

    def _forget_some(self, batch: TimelineBatch, step: int) -> TimelineBatch:
        generator = np.random.default_rng((self._seed or 0, step, 1))
        timeline = batch.timeline
        forget_BT = generator.random(timeline.item.shape) < self._unknown_rate
        forget_B = generator.random(timeline.user.shape) < self._unknown_rate
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


def fitted_bucket_lengths(lengths: np.ndarray) -> tuple[int, ...]:
    """Padded lengths for known data: half of the windows fit the first, 80 % the second, 95 % the third, all the last."""
    quantiles = np.quantile(lengths, (0.5, 0.8, 0.95, 1.0), method="higher")
    return tuple(sorted({int(min(-(-length // 8) * 8, lengths.max())) for length in quantiles}))
