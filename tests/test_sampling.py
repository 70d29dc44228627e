"""Negatives, candidates and history batches against brute force."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from tenrec_jax.data import sampling
from tenrec_jax.data.batches import TrainVocabulary
from tenrec_jax.data.candidates import sampled_candidates
from tenrec_jax.data.history_batches import HistoryBatches
from tenrec_jax.data.interactions import Interactions, Items, Users, offsets_of
from tenrec_jax.data.protocols import Part, Split, make_split, official_ctr, per_user_order
from tenrec_jax.data.sampling import (
    ExcludingSampler,
    ItemSampler,
    NegativeSampler,
    PopularItems,
    UniformItems,
    UserPositives,
)
from tenrec_jax.errors import UserError


def table_of(lengths: list[int], items: int, seed: int = 0, actions: int = 3) -> Interactions:
    random = np.random.default_rng(seed)
    user_R = np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32)
    users = len(lengths) + 1
    return Interactions(
        kind="qb_video",
        actions=("click", "like", "share", "follow")[:actions],
        has_exposures=True,
        user_R=user_R,
        item_R=np.minimum(random.geometric(3 / (items + 3), len(user_R)), items).astype(np.int32),
        labels_RA=random.integers(0, 2, (len(user_R), actions)).astype(np.int8),
        offsets=offsets_of(user_R, len(lengths)),
        users=Users(np.arange(users) - 1, *random.integers(0, 3, (2, users)).astype(np.int32)),
        items=Items(np.arange(items + 1) - 1, random.integers(0, 3, items + 1).astype(np.int32)),
        sha256="",
    )


def positives_of(table: Interactions, split: Split) -> list[set[int]]:
    found: list[set[int]] = [set() for _ in range(table.num_users + 1)]
    for row in range(table.num_rows):
        if split.part_R[row] == Part.TRAIN and table.labels_RA[row, 0]:
            found[table.user_R[row]].add(int(table.item_R[row]))
    return found


def click_counts(table: Interactions, split: Split) -> np.ndarray:
    counts = np.zeros(table.num_items + 1)
    for row in split.rows(Part.TRAIN):
        counts[table.item_R[row]] += table.labels_RA[row, 0]
    return counts


def samplers(table: Interactions, split: Split) -> dict[str, ItemSampler]:
    vocabulary = TrainVocabulary.of(table, split)
    return {
        "catalogue": UniformItems.of_catalogue(vocabulary),
        "trained": UniformItems.of_trained(vocabulary),
        "popular": PopularItems(click_counts(table, split), 0.75),
        "in_batch": PopularItems(click_counts(table, split), 1.0),
    }


LOG = [40, 3, 25, 1, 60, 17, 33]
NAMES = ("catalogue", "trained", "popular", "in_batch")


def assert_distributed(drawn: np.ndarray, probability: np.ndarray) -> None:
    """Pearson's chi-square at a level of 1e-4; the seed is fixed."""
    counts, expected = np.bincount(drawn, minlength=len(probability)), probability * len(drawn)
    assert not counts[probability == 0].any()
    drawable = probability > 0
    statistic = ((counts - expected)[drawable] ** 2 / expected[drawable]).sum()
    assert statistic < chi2.ppf(1 - 1e-4, drawable.sum() - 1)


@pytest.mark.parametrize("name", NAMES)
def test_draws_follow_the_stated_probability(name: str) -> None:
    table = table_of(LOG, items=30)
    split = per_user_order(table)
    items = samplers(table, split)[name]
    assert items.probability.sum() == pytest.approx(1, abs=1e-12)
    sampler = NegativeSampler(items, count=2000, seed=1)
    assert_distributed(np.concatenate([sampler.draw(step) for step in range(50)]), items.probability)
    np.testing.assert_array_equal(sampler.draw(7), sampler.draw(7))
    assert sampler.draw(7).tolist() != sampler.draw(8).tolist()


def test_stated_probabilities_equal_counting() -> None:
    table = table_of(LOG, items=30)
    split = per_user_order(table)
    trained, clicks = {int(table.item_R[row]) for row in split.rows(Part.TRAIN)}, click_counts(table, split)
    of = {name: items.probability for name, items in samplers(table, split).items()}
    for item in range(1, 31):
        assert of["catalogue"][item] == pytest.approx((item in trained) / 30)
        assert of["trained"][item] == pytest.approx((item in trained) / len(trained))
        assert of["popular"][item] == pytest.approx(clicks[item] ** 0.75 / sum(c**0.75 for c in clicks))
        assert of["in_batch"][item] == pytest.approx(clicks[item] / clicks.sum())
    assert of["catalogue"][0] == pytest.approx((30 - len(trained)) / 30)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    items=st.integers(2, 300),
    seed=st.integers(0, 100),
    name=st.sampled_from(NAMES),
)
def test_no_negative_is_a_training_positive_of_its_user(lengths: list[int], items: int, seed: int, name: str) -> None:
    table = table_of(lengths, items, seed)
    split = per_user_order(table)
    if not click_counts(table, split).any():
        return
    positives, drawn_from = positives_of(table, split), samplers(table, split)[name]
    drawable = set(np.flatnonzero(drawn_from.probability).tolist())
    users = np.asarray([user for user in range(len(lengths) + 1) if drawable - positives[user]] * 5)
    sampler = ExcludingSampler(drawn_from, UserPositives(table, split), count=11, seed=seed)
    drawn = sampler.draw(3, users)
    assert drawn.shape == (len(users), 11)
    for user, row in zip(users.tolist(), drawn.tolist(), strict=True):
        assert set(row) <= drawable - positives[user]


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8), items=st.integers(1, 300), seed=st.integers(0, 100)
)
def test_the_filter_finds_exactly_the_positives(lengths: list[int], items: int, seed: int) -> None:
    table = table_of(lengths, items, seed)
    split = per_user_order(table)
    expected, positives = positives_of(table, split), UserPositives(table, split)
    users = np.arange(len(lengths) + 1)
    every = np.broadcast_to(np.arange(items + 1, dtype=np.int32), (len(users), items + 1))
    found = np.zeros(every.size, bool)
    found[positives.hits(users, every)] = True
    for user in users:
        assert set(np.flatnonzero(found.reshape(every.shape)[user]).tolist()) == expected[user]
    np.testing.assert_array_equal(positives.contains(users[:, None], every), found.reshape(every.shape))


@pytest.mark.parametrize("name", NAMES)
def test_excluding_draws_follow_the_truncated_distribution(name: str) -> None:
    table = table_of(LOG, items=30)
    split = per_user_order(table)
    items, positives = samplers(table, split)[name], positives_of(table, split)
    sampler = ExcludingSampler(items, UserPositives(table, split), count=100, seed=0)
    users = np.asarray([1, 3, 5, 2] * 200)
    drawn = np.stack([sampler.draw(step, users) for step in range(2)])
    every = np.arange(31)
    for user in (1, 2, 3, 5):
        log_probability = sampler.log_probability(np.asarray([user]), every[None])[0]
        outside = np.asarray([item not in positives[user] for item in every])
        expected = np.where(outside, items.probability, 0.0)
        np.testing.assert_allclose(np.exp(log_probability), expected / expected.sum(), rtol=1e-12)
        assert_distributed(drawn[:, users == user].ravel(), np.exp(log_probability))


def test_what_a_row_gets_does_not_depend_on_the_part_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_CHUNK", 8)
    table = table_of(LOG, items=30)
    split = per_user_order(table)
    sampler = ExcludingSampler(samplers(table, split)["trained"], UserPositives(table, split), count=5, seed=0)
    users = np.random.default_rng(0).integers(1, 8, 37)
    whole = sampler.draw(4, users)
    for start in range(38):
        for stop in range(start, 38):
            np.testing.assert_array_equal(sampler.draw(4, users, slice(start, stop)), whole[start:stop])


def test_a_user_who_clicked_everything_has_no_negatives() -> None:
    table = table_of([200], items=3)
    split = per_user_order(table)
    sampler = ExcludingSampler(samplers(table, split)["trained"], UserPositives(table, split), count=5, seed=0)
    with pytest.raises(UserError, match="Dense user 1 clicked every item"):
        sampler.draw(0, np.asarray([1]))


def test_popularity_without_clicks_is_refused() -> None:
    with pytest.raises(UserError, match="needs items with clicks"):
        PopularItems(np.zeros(5), 0.75)


@pytest.mark.parametrize(("rule", "actions"), [(per_user_order, 1), (per_user_order, 3), (official_ctr, 4)])
def test_history_batches_equal_walking_through_the_training_rows(rule: object, actions: int) -> None:
    table = table_of([*LOG, 90], items=40, actions=actions)
    split = make_split(rule.__name__, table, seed=2)
    vocabulary, positives = TrainVocabulary.of(table, split), positives_of(table, split)
    batches = HistoryBatches(
        table, vocabulary, split, UniformItems.of_trained(vocabulary), history=6, negatives=9, batch_size=8, seed=0
    )
    train = split.rows(Part.TRAIN).tolist()
    expected = {}
    for row in train:
        if table.labels_RA[row, 0]:
            before = [r for r in train if r < row and table.user_R[r] == table.user_R[row]][-6:]
            events = tuple((int(table.item_R[r]), *table.labels_RA[r].tolist()) for r in before)
            key = (int(table.user_R[row]), events, int(table.item_R[row]), tuple(table.labels_RA[row].tolist()))
            expected[key] = expected.get(key, 0) + 1
    assert batches.steps_per_epoch == sum(expected.values()) // 8
    for step in range(batches.steps_per_epoch):
        (profile, _, events), item, label, negative = batches(step)
        assert events.action.shape == (8, 6, actions)
        np.testing.assert_array_equal(profile.gender, table.users.gender[profile.user])
        np.testing.assert_array_equal(events.category[events.mask], table.items.category[events.item[events.mask]])
        for field in (events.item, events.category, events.action):
            assert not field[~events.mask].any()
        for b in range(8):
            real = int(events.mask[b].sum())
            assert events.mask[b, :real].all()
            seen = tuple((int(events.item[b, s]), *events.action[b, s].tolist()) for s in range(real))
            key = (int(profile.user[b, 0]), seen, int(item[b]), tuple(label[b].tolist()))
            expected[key] -= 1
            assert expected[key] >= 0
            assert not positives[int(profile.user[b, 0])] & set(negative[b].tolist())


def test_history_batches_are_pure_and_divide_over_processes() -> None:
    table = table_of(LOG * 3, items=200)
    split = per_user_order(table)
    vocabulary = TrainVocabulary.of(table, split)

    def make(seed: int) -> HistoryBatches:
        return HistoryBatches(
            table,
            vocabulary,
            split,
            UniformItems.of_trained(vocabulary),
            history=6,
            negatives=9,
            batch_size=12,
            seed=seed,
        )

    def flat(batch: object) -> list[np.ndarray]:
        return jax.tree.leaves(batch)

    batches, again, other = make(0), make(0), make(1)
    for step in reversed(range(2 * batches.steps_per_epoch)):
        whole = flat(batches(step))
        assert [a.tobytes() for a in whole] == [a.tobytes() for a in flat(again(step))]
        assert [a.tobytes() for a in whole] != [a.tobytes() for a in flat(other(step))]
        for processes in (1, 2, 4):
            parts = [flat(batches(step, index, processes)) for index in range(processes)]
            for joined, expected in zip(map(np.concatenate, zip(*parts, strict=True)), whole, strict=True):
                np.testing.assert_array_equal(joined, expected)
    with pytest.raises(ValueError, match="cannot be divided by 5"):
        batches(0, 0, 5)
    with pytest.raises(UserError, match="fewer than a batch of 10000"):
        HistoryBatches(
            table,
            vocabulary,
            split,
            UniformItems.of_trained(vocabulary),
            history=6,
            negatives=9,
            batch_size=10000,
            seed=0,
        )


def test_sampled_candidates_are_the_rows_item_and_127_uniform_others() -> None:
    table = table_of([200] * 10, items=40)
    split = make_split("sampled_128", table, seed=5)
    vocabulary, rows = TrainVocabulary.of(table, split), np.flatnonzero(split.part_R > Part.TRAIN)
    candidates = sampled_candidates(table, vocabulary, split, rows)
    assert candidates.shape == (len(rows), 128)
    np.testing.assert_array_equal(candidates[:, 0], table.item_R[rows])
    trained = {int(item) for item in table.item_R[split.rows(Part.TRAIN)]}
    for row in candidates.tolist():
        assert set(row[1:]) <= trained - {row[0]}
    own = int(np.bincount(candidates[:, 0]).argmax())
    others = np.asarray([item in trained - {own} for item in range(41)])
    assert_distributed(candidates[candidates[:, 0] == own, 1:].ravel(), others / others.sum())


def test_a_rows_candidates_are_a_function_of_seed_and_row() -> None:
    table = table_of([50] * 4, items=40)
    split, other = make_split("sampled_128", table, seed=5), make_split("sampled_128", table, seed=6)
    vocabulary, rows = TrainVocabulary.of(table, split), np.arange(table.num_rows)
    whole = sampled_candidates(table, vocabulary, split, rows)
    np.testing.assert_array_equal(sampled_candidates(table, vocabulary, split, rows[::-7]), whole[::-7])
    assert (sampled_candidates(table, vocabulary, other, rows) != whole).any(1).all()
    assert len({row.tobytes() for row in whole[:, 1:]}) == len(rows)
    with pytest.raises(UserError, match="per_user_order draws no candidates"):
        sampled_candidates(table, vocabulary, per_user_order(table), rows)
