"""Windows and batches against plain loops over a small table."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenrec_jax.data.batches import (
    TimelineBatches,
    TimelineReader,
    TrainVocabulary,
    bucket_lengths,
    fitted_bucket_lengths,
)
from tenrec_jax.data.interactions import Interactions, Items, Users, offsets_of
from tenrec_jax.data.protocols import Part, per_user_order
from tenrec_jax.data.sampling import NegativeSampler


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
    windows = TimelineReader(table, TrainVocabulary.of(table, split), visible).windows(
        split.part_R == part, max_length, stride
    )
    counted = []
    for start, stop, score_from in zip(*windows, strict=True):
        rows = visible[start:stop]
        assert len(set(table.user_R[rows])) == 1
        assert stop - start <= max_length
        assert rows[0] == table.offsets[table.user_R[rows[0]]] or stop - start == max_length
        counted += list(visible[score_from:stop])
    assert sorted(counted) == list(split.rows(part))


@settings(max_examples=30, deadline=None)
@given(lengths=lengths_of_users, seed=st.integers(0, 100), multiple=st.sampled_from([1, 2, 4]))
def test_an_epoch_of_batches_holds_every_training_row_once_and_equals_the_table(
    lengths: list[int], seed: int, multiple: int
) -> None:
    table = table_of(lengths)
    split = per_user_order(table)
    vocabulary = TrainVocabulary.of(table, split)
    reader = TimelineReader(table, vocabulary, split.rows(Part.TRAIN))
    windows = reader.windows(split.part_R == Part.TRAIN, 16, 16)
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


def batches_of(seed: int, unknown_rate: float = 0.0) -> TimelineBatches:
    table = table_of([30, 7, 25, 40, 3, 18] * 4)
    split = per_user_order(table)
    reader = TimelineReader(table, TrainVocabulary.of(table, split), split.rows(Part.TRAIN))
    windows = reader.windows(split.part_R == Part.TRAIN, 16, 16)
    return TimelineBatches(reader, windows, buckets=(8, 16), events_per_batch=64, seed=seed, unknown_rate=unknown_rate)


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


def test_uniform_negatives_match_their_stated_probability() -> None:
    table = table_of([10, 10], items=30)
    sampler = NegativeSampler(TrainVocabulary.of(table, per_user_order(table)), count=2000, seed=1)
    drawn = np.concatenate([sampler.draw(step) for step in range(50)])
    expected = sampler.probability()
    assert expected.sum() == pytest.approx(1.0, abs=1e-6)
    share = np.bincount(drawn, minlength=31) / len(drawn)
    np.testing.assert_allclose(share, expected, atol=5 * np.sqrt(expected.max() / len(drawn)))
    np.testing.assert_array_equal(sampler.draw(7), sampler.draw(7))


@pytest.mark.parametrize("max_length", [1, 32, 33, 50, 512])
def test_bucket_lengths_rise_and_end_with_the_longest(max_length: int) -> None:
    lengths = bucket_lengths(max_length)
    assert list(lengths) == sorted(set(lengths))
    assert lengths[-1] == max_length


@given(st.lists(st.integers(1, 300), min_size=1, max_size=50))
def test_fitted_bucket_lengths_hold_every_window_with_at_most_four_lengths(lengths: list[int]) -> None:
    buckets = fitted_bucket_lengths(np.asarray(lengths))
    assert len(buckets) <= 4
    assert buckets[-1] == max(lengths)
    assert list(buckets) == sorted(set(buckets))


def test_any_order_permutes_whole_events_within_their_timeline() -> None:
    table = table_of([30, 7, 25])
    split = per_user_order(table)
    reader = TimelineReader(table, TrainVocabulary.of(table, split), split.rows(Part.TRAIN))
    windows = reader.windows(split.part_R == Part.TRAIN, 16, 16)
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
