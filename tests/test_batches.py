"""Windows and batches against plain loops over a small table."""

from itertools import combinations
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenrec_jax.data import row_blocks
from tenrec_jax.data.batches import (
    TimelineBatches,
    TimelineReader,
    TrainVocabulary,
    Windows,
    bucket_lengths,
    fitted_bucket_lengths,
)
from tenrec_jax.data.interactions import Interactions, Items, Users, offsets_of
from tenrec_jax.data.protocols import Part, per_user_order


def table_of(lengths: list[int], items: int = 50, seed: int = 0) -> Interactions:
    random = np.random.default_rng(seed)
    user_R = np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32)
    item_R = random.integers(1, items + 1, len(user_R)).astype(np.int32)

    def dictionary(size: int) -> np.ndarray:
        return np.concatenate([[-1], 100 + np.arange(size)])

    def feature(size: int, high: int) -> np.ndarray:
        return np.concatenate([[0], random.integers(0, high, size)]).astype(np.int32)

    return Interactions(
        kind="qb_video",
        actions=("click", "like"),
        has_exposures=True,
        user_R=user_R,
        item_R=item_R,
        labels_RA=random.integers(0, 2, (len(user_R), 2)).astype(np.int8),
        offsets=offsets_of(user_R, len(lengths)),
        users=Users(dictionary(len(lengths)), feature(len(lengths), 3), feature(len(lengths), 8)),
        items=Items(dictionary(items), feature(items, 3)),
        sha256="",
    )


lengths_of_users = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of_users, max_length=st.integers(1, 20), stride=st.integers(1, 20), part=st.sampled_from(Part))
def test_every_scored_row_counts_in_exactly_one_window_with_its_latest_context(
    lengths: list[int], max_length: int, stride: int, part: Part
) -> None:
    table = table_of(lengths)
    split, stride = per_user_order(table), min(stride, max_length)
    visible = np.flatnonzero((split.part_R >= Part.TRAIN) & (split.part_R <= part))
    reader = TimelineReader(table, TrainVocabulary.of(table, split), visible, split.part_R == part)
    windows = reader.windows(max_length, stride)
    counted = []
    for start, stop, score_from in zip(*windows, strict=True):
        rows = visible[start:stop]
        assert len(set(table.user_R[rows])) == 1
        assert stop - start <= max_length
        assert rows[0] == table.offsets[table.user_R[rows[0]]] or stop - start == max_length
        counted += list(visible[score_from:stop])
    assert sorted(counted) == list(split.rows(part))


@settings(max_examples=80, deadline=None)
@given(
    lengths=lengths_of_users,
    max_length=st.integers(1, 20),
    stride=st.integers(1, 20),
    seed=st.integers(0, 1000),
    block=st.integers(1, 60),
)
def test_held_out_rows_see_the_training_rows_before_them_and_never_each_other(
    lengths: list[int], max_length: int, stride: int, seed: int, block: int
) -> None:
    table, stride = table_of(lengths), min(stride, max_length)
    part_R = np.random.default_rng(seed).integers(0, 4, table.num_rows)
    scored, visible = part_R == Part.TEST, np.flatnonzero((part_R == Part.TEST) | (part_R == Part.TRAIN))
    vocabulary = TrainVocabulary(np.arange(table.num_users + 1), np.arange(table.num_items + 1))
    reader = TimelineReader(table, vocabulary, visible.astype(np.int32), scored, scored_seen=False)
    with patch.object(row_blocks, "BLOCK_ROWS", block):
        windows = reader.windows(max_length, stride)
    counted = []
    for window in range(len(windows.start)):
        one = Windows(*(field[window : window + 1] for field in windows))
        timeline, score, row = reader.read(one, reader.users_of(one), max_length)
        assert row[score].size
        for place in np.flatnonzero(score[0]):
            counted.append(row[0, place])
            user = table.rows_of(int(table.user_R[row[0, place]]))
            before = [r for r in range(user.start, row[0, place]) if part_R[r] == Part.TRAIN]
            seen = row[0, :place][timeline.mask[0, :place]].tolist()
            assert seen == before[len(before) - len(seen) :]
            # What a window leaves out, it has no room for: the stride's rows stand before the last one.
            shown = [r for r in range(user.start, row[0, place]) if part_R[r] in (Part.TRAIN, Part.TEST)]
            assert len(seen) == len(before) or place >= min(len(shown), max_length - stride)
        assert not timeline.action[~timeline.mask].any()
        assert not timeline.mask[0][scored[row[0]] & (timeline.item[0] > 0)].any()
        np.testing.assert_array_equal(timeline.item[0, score[0]], table.item_R[row[score]])
    assert sorted(counted) == np.flatnonzero(scored).tolist()


@settings(max_examples=30, deadline=None)
@given(lengths=lengths_of_users, seed=st.integers(0, 100), multiple=st.sampled_from([1, 2, 4]))
def test_an_epoch_of_batches_holds_every_training_row_once_and_equals_the_table(
    lengths: list[int], seed: int, multiple: int
) -> None:
    table = table_of(lengths)
    split = per_user_order(table)
    vocabulary = TrainVocabulary.of(table, split)
    reader = TimelineReader(table, vocabulary, split.rows(Part.TRAIN), split.part_R == Part.TRAIN)
    windows = reader.windows(16, 16)
    if not len(windows.start):
        return
    batches = TimelineBatches(reader, windows, buckets=(4, 8, 16), events_per_batch=32, multiple=multiple, seed=seed)
    seen = []
    for step in range(batches.steps_per_epoch):
        timeline, score, row = batches(step)
        assert timeline.item.shape[0] % multiple == 0
        np.testing.assert_array_equal(score, timeline.mask)
        np.testing.assert_array_equal(timeline.item[score], table.item_R[row[score]])
        np.testing.assert_array_equal(timeline.action[score], table.labels_RA[row[score]])
        np.testing.assert_array_equal(np.where(score, timeline.user[:, None], 0)[score], table.user_R[row[score]])
        assert not timeline.item[~timeline.mask].any()
        assert not timeline.action[~timeline.mask].any()
        seen += list(row[score])
    assert sorted(seen) == list(split.rows(Part.TRAIN))


def reader_of(table: Interactions) -> TimelineReader:
    """Of the training rows."""
    split = per_user_order(table)
    return TimelineReader(table, TrainVocabulary.of(table, split), split.rows(Part.TRAIN), split.part_R == Part.TRAIN)


def batches_of(seed: int, unknown_rate: float = 0.0, **options: object) -> TimelineBatches:
    reader = reader_of(table_of([30, 7, 25, 40, 3, 18] * 4))
    options = {"buckets": (8, 16), "events_per_batch": 64} | options
    return TimelineBatches(reader, reader.windows(16, 16), seed=seed, unknown_rate=unknown_rate, **options)


@pytest.mark.parametrize("any_order", [False, True])
def test_the_batches_of_all_processes_together_are_the_global_batch(any_order: bool) -> None:
    batches = batches_of(3, 0.2, multiple=4, any_order=any_order)
    for step in range(batches.steps_per_epoch + 3):
        whole = batches(step)
        for processes in (1, 2, 4):
            parts = [batches(step, index, processes) for index in range(processes)]
            assert len({len(part.row) for part in parts}) == 1
            for field in ("score", "row"):
                joined = np.concatenate([getattr(part, field) for part in parts])
                assert joined.tobytes() == getattr(whole, field).tobytes()
            for field, expected in zip(whole.timeline._fields, whole.timeline, strict=True):
                joined = np.concatenate([getattr(part.timeline, field) for part in parts])
                assert joined.tobytes() == expected.tobytes()
                assert joined.dtype == expected.dtype


def test_a_batch_that_processes_cannot_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be divided by 3"):
        batches_of(0, multiple=4)(0, 0, 3)


def test_padding_and_filling_rows_are_counted_apart() -> None:
    batches = batches_of(0)
    slots = events = filled = 0
    for step in range(batches.steps_per_epoch):
        mask = batches(step).timeline.mask
        filled += mask.size
        slots += int(mask.any(1).sum()) * mask.shape[1]
        events += int(mask.sum())
    assert batches.padding.within == pytest.approx(1 - events / slots)
    assert batches.padding.filling == pytest.approx(1 - slots / filled)


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    one, other = batches_of(3, 0.2), batches_of(3, 0.2)
    steps = range(2 * one.steps_per_epoch)
    backwards = {step: other(step) for step in reversed(steps)}
    for step in steps:
        for a, b in zip(one(step).timeline, backwards[step].timeline, strict=True):
            np.testing.assert_array_equal(a, b)
    first = [one(step).row.tobytes() for step in range(one.steps_per_epoch)]
    assert first != [one(step + one.steps_per_epoch).row.tobytes() for step in range(one.steps_per_epoch)]
    assert first != [batches_of(4)(step).row.tobytes() for step in range(one.steps_per_epoch)]


def test_unknown_rate_hides_that_share_of_items_and_of_users_with_their_features() -> None:
    plain, hidden = batches_of(0), batches_of(0, unknown_rate=0.3)
    hidden_items = total = 0
    for step in range(30):
        before, after = plain(step).timeline, hidden(step).timeline
        hidden_items += int(((after.item == 0) & before.mask).sum())
        total += int(before.mask.sum())
        forgotten = (after.user == 0) & (before.user != 0)
        assert not after.gender[forgotten].any()
        assert not after.age[forgotten].any()
    assert 0.25 < hidden_items / total < 0.35


def test_items_without_training_rows_are_read_as_unknown() -> None:
    table = table_of([10, 10], items=200)
    split = per_user_order(table)
    vocabulary = TrainVocabulary.of(table, split)
    trained = set(table.item_R[split.rows(Part.TRAIN)].tolist())
    for item in range(1, 201):
        assert vocabulary.item[item] == (item if item in trained else 0)


@pytest.mark.parametrize("max_length", [1, 32, 33, 50, 512])
def test_bucket_lengths_rise_and_end_with_the_longest(max_length: int) -> None:
    lengths = bucket_lengths(max_length)
    assert list(lengths) == sorted(set(lengths))
    assert lengths[-1] == max_length


def least_slots(lengths: list[int], number: int) -> int:
    """The fewest slots of windows in that many buckets, by trying every choice of lengths."""
    distinct = sorted(set(lengths))
    choices = combinations(distinct[:-1], min(number, len(distinct)) - 1)
    return min(
        sum(min(end for end in (*choice, distinct[-1]) if end >= length) for length in lengths) for choice in choices
    )


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.sampled_from([0.0, 0.05, 0.15, 0.5]))
def test_fitted_bucket_lengths_are_the_fewest_that_keep_padding_low_and_the_best_of_their_number(
    lengths: list[int], max_padding: float
) -> None:
    # One window a batch: there are no filling rows.
    buckets = fitted_bucket_lengths(np.asarray(lengths), 1, max_padding=max_padding)
    assert buckets[-1] == max(lengths)
    assert list(buckets) == sorted(set(buckets))
    slots = sum(min(end for end in buckets if end >= length) for length in lengths)
    assert slots == least_slots(lengths, len(buckets))
    assert 1 - sum(lengths) / slots <= max_padding or len(buckets) in (12, len(set(lengths)))
    if len(buckets) > 1:
        assert 1 - sum(lengths) / least_slots(lengths, len(buckets) - 1) > max_padding


def test_padding_stays_below_15_percent_on_lengths_like_the_ctr_files() -> None:
    # Log-normal exposures with median 82 and 90 % below 265; training windows of up to 512 events.
    normal = np.random.default_rng(0).standard_normal(20_000)
    events = np.clip(82 * np.exp(normal * np.log(265 / 82) / 1.2816), 1, 5995).astype(int) * 8 // 10
    for longest, most in ((512, 10), (128, 4)):
        lengths = np.concatenate(
            [[longest] * (n // longest) + [n % longest] * (n % longest > 0) for n in events.tolist()]
        ).astype(int)
        buckets = np.asarray(fitted_bucket_lengths(lengths, 4096))
        slots = buckets[np.searchsorted(buckets, lengths)].sum()
        assert 1 - lengths.sum() / slots <= 0.15
        assert len(buckets) <= most


def test_a_log_of_a_few_batches_gets_no_bucket_that_would_be_filling_rows() -> None:
    lengths = np.arange(1, 101)
    assert fitted_bucket_lengths(lengths, events_per_batch=20_000) == (100,)
    assert len(fitted_bucket_lengths(np.repeat(lengths, 1000), events_per_batch=20_000)) > 2


def test_any_order_permutes_whole_events_within_their_timeline() -> None:
    table = table_of([30, 7, 25])
    reader = reader_of(table)
    windows = reader.windows(16, 16)
    options = {"buckets": (8, 16), "events_per_batch": 64, "seed": 5}
    plain, permuted = (
        TimelineBatches(reader, windows, **options),
        TimelineBatches(reader, windows, **options, any_order=True),
    )
    moved = 0
    for step in range(plain.steps_per_epoch):
        before, (timeline, score, row) = plain(step), permuted(step)
        moved += int((before.row != row).sum())
        for rows_before, rows_after, real in zip(before.row, row, timeline.mask, strict=True):
            assert sorted(rows_before) == sorted(rows_after)
            assert list(real) == sorted(real, reverse=True)
        np.testing.assert_array_equal(timeline.item[score], table.item_R[row[score]])
        np.testing.assert_array_equal(timeline.action[score], table.labels_RA[row[score]])
        np.testing.assert_array_equal(timeline.mask.sum(1), before.timeline.mask.sum(1))
    assert moved > 10
