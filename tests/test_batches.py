"""Windows and batches against plain loops over a small table."""

from unittest.mock import patch

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenrec_jax.data import row_blocks
from tenrec_jax.data.batches import (
    TimelineBatch,
    TimelineBatches,
    TimelineReader,
    TrainVocabulary,
)
from tenrec_jax.data.interactions import Interactions, Items, Users, offsets_of
from tenrec_jax.data.protocols import Part, per_user_order
from tenrec_jax.data.unknown import UnknownRates
from tenrec_jax.errors import UserError


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
    for user, start, stop, score_from in zip(*windows, strict=True):
        rows = visible[start:stop]
        assert (table.user_R[rows] == user).all()
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
        timeline, score, row, _ = reader.read(windows, np.array([[window]]), np.zeros((1, 1), int), max_length)
        assert row[score].size
        for place in np.flatnonzero(score[0]):
            counted.append(row[0, place])
            user = table.rows_of(int(table.user_R[row[0, place]]))
            before = [r for r in range(user.start, row[0, place]) if part_R[r] == Part.TRAIN]
            seen = row[0, :place][timeline.events.mask[0, :place]].tolist()
            assert seen == before[len(before) - len(seen) :]
            # What a window leaves out, it has no room for: the stride's rows stand before the last one.
            shown = [r for r in range(user.start, row[0, place]) if part_R[r] in (Part.TRAIN, Part.TEST)]
            assert len(seen) == len(before) or place >= min(len(shown), max_length - stride)
        assert not timeline.events.action[~timeline.events.mask].any()
        assert not timeline.events.mask[0][scored[row[0]] & (timeline.events.item[0] > 0)].any()
        np.testing.assert_array_equal(timeline.events.item[0, score[0]], table.item_R[row[score]])
    assert sorted(counted) == np.flatnonzero(scored).tolist()


def owners(batch: TimelineBatch) -> np.ndarray:
    """Whose slot each is: the place in its row of the last timeline that begins at or before it, [B, T]."""
    slot_T = np.arange(batch.row.shape[1])
    return (batch.timeline.start[:, None] <= slot_T[:, None]).sum(-1) - 1


@settings(max_examples=30, deadline=None)
@given(lengths=lengths_of_users, seed=st.integers(0, 100), multiple=st.sampled_from([1, 2, 4]), extra=st.booleans())
def test_an_epoch_of_batches_holds_every_training_row_once_and_equals_the_table(
    lengths: list[int], seed: int, multiple: int, extra: bool
) -> None:
    table = table_of(lengths)
    reader = reader_of(table)
    windows = reader.windows(16, 16)
    if not len(windows.start):
        return
    batches = TimelineBatches(reader, windows, events_per_batch=64, multiple=multiple, seed=seed, next_event=extra)
    seen, found = [], []
    for step in range(batches.steps_per_epoch):
        timeline, score, row, window = batch = batches(step)
        events, users = timeline.events, np.take_along_axis(timeline.profile.user, owners(batch), axis=1)
        assert len(events.item) % multiple == 0
        np.testing.assert_array_equal(score, events.mask)
        np.testing.assert_array_equal(events.item[score], table.item_R[row[score]])
        np.testing.assert_array_equal(events.category[score], table.items.category[table.item_R[row[score]]])
        np.testing.assert_array_equal(events.action[score], table.labels_RA[row[score]])
        np.testing.assert_array_equal(users[score], table.user_R[row[score]])
        assert not events.item[~events.mask].any()
        assert not events.action[~events.mask].any()
        seen += list(row[score])
        for b, u in zip(*np.nonzero(window >= 0), strict=True):
            found.append(window[b, u])
            begin, number = timeline.start[b, u], windows.events[window[b, u]]
            expected = reader_rows(table)[windows.start[window[b, u]] : windows.stop[window[b, u]]]
            np.testing.assert_array_equal(row[b, begin : begin + number], expected)
            free = events.item.shape[1] if u + 1 == window.shape[1] else timeline.start[b, u + 1]
            assert begin + number + extra <= free
            assert not events.mask[b, begin + number : free].any()
    assert sorted(seen) == list(reader_rows(table))
    assert sorted(found) == list(range(len(windows.start)))


def reader_rows(table: Interactions) -> np.ndarray:
    return per_user_order(table).rows(Part.TRAIN)


def reader_of(table: Interactions) -> TimelineReader:
    """Of the training rows."""
    split = per_user_order(table)
    return TimelineReader(table, TrainVocabulary.of(table, split), split.rows(Part.TRAIN), split.part_R == Part.TRAIN)


def batches_of(seed: int, unknown: float = 0.0, **options: object) -> TimelineBatches:
    """`unknown`: the probability that a user, or an item, is made unknown."""
    table = table_of([30, 7, 25, 40, 3, 18] * 4)
    reader, rates = reader_of(table), UnknownRates(unknown, np.full(table.num_items + 1, unknown))
    options = {"events_per_batch": 64} | options
    return TimelineBatches(reader, reader.windows(16, 16), seed=seed, unknown=rates if unknown else None, **options)


@pytest.mark.parametrize("any_order", [False, True])
def test_the_batches_of_all_processes_together_are_the_global_batch(any_order: bool) -> None:
    batches = batches_of(3, 0.2, multiple=4, any_order=any_order)
    for step in range(batches.steps_per_epoch + 3):
        whole = batches(step)
        for processes in (1, 2, 4):
            parts = [batches(step, index, processes) for index in range(processes)]
            assert len({len(part.row) for part in parts}) == 1
            for joined, expected in zip(
                jax.tree.leaves(jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)),
                jax.tree.leaves(whole),
                strict=True,
            ):
                assert joined.tobytes() == expected.tobytes()
                assert joined.dtype == expected.dtype


def test_a_batch_that_processes_cannot_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be divided by 3"):
        batches_of(0, multiple=4)(0, 0, 3)


def test_padding_and_filling_rows_are_counted_apart() -> None:
    batches = batches_of(0)
    slots = events = filled = 0
    for step in range(batches.steps_per_epoch):
        mask = batches(step).timeline.events.mask
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
        jax.tree.map(np.testing.assert_array_equal, one(step), backwards[step])
    first = [one(step).row.tobytes() for step in range(one.steps_per_epoch)]
    assert first != [one(step + one.steps_per_epoch).row.tobytes() for step in range(one.steps_per_epoch)]
    assert first != [batches_of(4)(step).row.tobytes() for step in range(one.steps_per_epoch)]


def test_items_and_users_with_their_features_are_hidden_as_often_as_said() -> None:
    plain, hidden = batches_of(0), batches_of(0, unknown=0.3)
    hidden_items = total = 0
    for step in range(30):
        before, after = plain(step).timeline, hidden(step).timeline
        hidden_items += int(((after.events.item == 0) & before.events.mask).sum())
        total += int(before.events.mask.sum())
        forgotten = (after.profile.user == 0) & (before.profile.user != 0)
        assert not after.profile.gender[forgotten].any()
        assert not after.profile.age[forgotten].any()
    assert 0.25 < hidden_items / total < 0.35


def test_items_without_training_rows_are_read_as_unknown() -> None:
    table = table_of([10, 10], items=200)
    split = per_user_order(table)
    vocabulary = TrainVocabulary.of(table, split)
    trained = set(table.item_R[split.rows(Part.TRAIN)].tolist())
    for item in range(1, 201):
        assert vocabulary.item[item] == (item if item in trained else 0)


def test_padding_stays_below_15_percent_on_lengths_like_the_ctr_files() -> None:
    # Log-normal exposures with median 82 and 90 % below 265; training windows of up to 512 events.
    normal = np.random.default_rng(0).standard_normal(300)
    table = table_of((np.clip(82 * np.exp(normal * np.log(265 / 82) / 1.2816), 1, 5995)).astype(int).tolist())
    reader = reader_of(table)
    for longest in (512, 128, 50):
        batches = TimelineBatches(reader, reader.windows(longest, longest), events_per_batch=4096, seed=0)
        masks = [batches(step).timeline.events.mask for step in range(batches.steps_per_epoch)]
        # The last batch of so small a log is filled up; the others are the rule.
        assert 1 - np.mean(masks[:-1]) < 0.15
        assert {mask.shape for mask in masks} == {masks[0].shape}


def test_any_order_permutes_whole_events_within_their_timeline() -> None:
    table = table_of([30, 7, 25, 3, 3, 2])
    reader = reader_of(table)
    windows = reader.windows(16, 16)
    options = {"events_per_batch": 64, "seed": 5}
    plain, permuted = (
        TimelineBatches(reader, windows, **options),
        TimelineBatches(reader, windows, **options, any_order=True),
    )
    moved = 0
    for step in range(plain.steps_per_epoch):
        before, (timeline, score, row, window) = plain(step), permuted(step)
        moved += int((before.row != row).sum())
        owner_BT = owners(before)
        for b in range(len(row)):
            for u in np.unique(owner_BT[b]):
                mine = owner_BT[b] == u
                assert sorted(before.row[b][mine]) == sorted(row[b][mine])
        events = timeline.events
        np.testing.assert_array_equal(events.mask, before.timeline.events.mask)
        np.testing.assert_array_equal(score, events.mask)
        np.testing.assert_array_equal(window, before.window)
        np.testing.assert_array_equal(events.item[score], table.item_R[row[score]])
        np.testing.assert_array_equal(events.category[score], table.items.category[table.item_R[row[score]]])
        np.testing.assert_array_equal(events.action[score], table.labels_RA[row[score]])
    assert moved > 10


@pytest.mark.parametrize(("column", "value"), [("item_R", 51), ("item_R", -1), ("labels_RA", 2), ("labels_RA", -1)])
def test_an_impossible_id_or_label_is_found_on_the_host_and_its_row_named(column: str, value: int) -> None:
    table = table_of([12, 9])
    split = per_user_order(table)
    row = int(split.rows(Part.TRAIN)[3])
    reader = TimelineReader(table, TrainVocabulary.of(table, split), np.arange(21), np.ones(21, bool))
    windows = reader.windows(12, 12)
    getattr(table, column)[row] = value
    with pytest.raises(UserError, match=rf"Row {row} of the table holds item .*items are 1 to 50, labels 0 or 1"):
        reader.read(windows, np.array([[0]]), np.array([[0]]), 12)
    with pytest.raises(UserError, match=f"Row {row} of the table"):
        TrainVocabulary.of(table, split)
