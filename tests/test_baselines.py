"""Baselines against counting row by row in plain Python."""

import math

import numpy as np
import pytest
from scipy.special import logit

from tenrec_jax.data.interactions import Interactions, Items, Users
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation import baselines

ACTIONS = ("click", "like", "share", "follow")


def make_table(actions=ACTIONS, num_users=13, num_items=29, num_rows=400, seed=0):
    """A random log whose last user and item never occur."""
    generator = np.random.default_rng(seed)
    user = np.sort(generator.integers(1, num_users, num_rows)).astype(np.int32)
    lengths = np.bincount(user, minlength=num_users + 1)
    return Interactions(
        kind="qb_video",
        actions=actions,
        has_exposures=True,
        user_R=user,
        item_R=generator.integers(1, num_items, num_rows).astype(np.int32),
        labels_RA=(generator.random((num_rows, len(actions))) < 0.3).astype(np.int8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        users=Users(
            raw_id=np.arange(-1, num_users, dtype=np.int64),
            gender=np.zeros(num_users + 1, np.int32),
            age=np.zeros(num_users + 1, np.int32),
        ),
        items=Items(raw_id=np.arange(-1, num_items, dtype=np.int64), category=np.zeros(num_items + 1, np.int32)),
        sha256="",
    )


@pytest.fixture
def table():
    return make_table()


@pytest.fixture
def rows():
    return np.sort(np.random.default_rng(1).choice(400, 250, replace=False))


def test_counts_equal_counting_row_by_row(table, rows):
    counts = baselines.train_counts(table, rows)
    item_exposures, user_exposures = [0.0] * 30, [0.0] * 14
    item_actions, user_actions = [[0.0] * 4 for _ in range(30)], [[0.0] * 4 for _ in range(14)]
    for row in rows:
        item, user = table.item_R[row], table.user_R[row]
        item_exposures[item] += 1
        user_exposures[user] += 1
        for action in range(4):
            item_actions[item][action] += table.labels_RA[row, action]
            user_actions[user][action] += table.labels_RA[row, action]
    np.testing.assert_array_equal(counts.item_exposures_N1, item_exposures)
    np.testing.assert_array_equal(counts.user_exposures_U1, user_exposures)
    np.testing.assert_array_equal(counts.item_actions_N1A, item_actions)
    np.testing.assert_array_equal(counts.user_actions_U1A, user_actions)
    assert counts.item_exposures_N1.dtype == counts.user_actions_U1A.dtype == np.float64
    assert counts.actions == ACTIONS


def test_rows_outside_the_training_part_have_no_influence(table, rows):
    before = baselines.train_counts(table, rows)
    held_out = np.setdiff1d(np.arange(400), rows)
    table.labels_RA[held_out] = 1 - table.labels_RA[held_out]
    table.item_R[held_out] = 1
    after = baselines.train_counts(table, rows)
    for name in ("item_exposures_N1", "item_actions_N1A", "user_exposures_U1", "user_actions_U1A"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_counts_do_not_depend_on_the_block_size(table, rows, monkeypatch):
    whole = baselines.train_counts(table, rows)
    monkeypatch.setattr(baselines, "_BLOCK", 7)
    blocks = baselines.train_counts(table, rows)
    np.testing.assert_array_equal(blocks.item_actions_N1A, whole.item_actions_N1A)
    np.testing.assert_array_equal(blocks.user_exposures_U1, whole.user_exposures_U1)


def test_popularity_is_the_number_of_training_clicks(table, rows):
    scores = baselines.popularity_scores(baselines.train_counts(table, rows))
    clicks = [sum(table.labels_RA[r, 0] for r in rows if table.item_R[r] == item) for item in range(30)]
    np.testing.assert_array_equal(scores, clicks)
    assert scores[0] == scores[29] == 0


@pytest.mark.parametrize("strength", [20.0, 0.5])
@pytest.mark.parametrize("column", range(4))
def test_rates_are_smoothed_towards_the_global_rate(table, rows, column, strength):
    counts = baselines.train_counts(table, rows)
    mean = table.labels_RA[rows, column].mean()
    items = baselines.item_rate(counts, ACTIONS[column], prior_strength=strength)
    users = baselines.user_rate(counts, ACTIONS[column], prior_strength=strength)
    for rates, ids in ((items, table.item_R), (users, table.user_R)):
        for entry, rate in enumerate(rates):
            mine = rows[ids[rows] == entry]
            expected = (table.labels_RA[mine, column].sum() + strength * mean) / (len(mine) + strength)
            assert rate == pytest.approx(expected, rel=1e-12)
    assert items[0] == items[29] == users[0] == users[13] == pytest.approx(mean)


def test_the_default_prior_weighs_twenty_exposures(table, rows):
    counts = baselines.train_counts(table, rows)
    default, explicit = baselines.item_rate(counts, "like"), baselines.item_rate(counts, "like", prior_strength=20)
    np.testing.assert_array_equal(default, explicit)


def test_wrong_use_is_refused(table, rows):
    counts = baselines.train_counts(make_table(actions=("click",)), rows)
    with pytest.raises(UserError, match="no action 'like', only click"):
        baselines.item_rate(counts, "like")
    with pytest.raises(UserError, match="did you mean 'click'"):
        baselines.user_rate(counts, "clik")
    for strength in (0, -1, np.nan, np.inf):
        with pytest.raises(UserError, match="prior_strength"):
            baselines.item_rate(counts, "click", prior_strength=strength)
    empty = baselines.train_counts(table, rows[:0])
    assert empty.item_exposures_N1.sum() == 0
    with pytest.raises(UserError, match="no rows"):
        baselines.item_rate(empty, "click")
    for bad in (np.ones(400, bool), np.array([-1]), np.array([400])):
        with pytest.raises(ValueError, match="train_rows"):
            baselines.train_counts(table, bad)


@pytest.mark.parametrize("strength", [1.0, 20.0])
def test_item_and_user_rate_together_add_on_the_logit(table, rows, strength):
    counts = baselines.train_counts(table, rows)
    items = baselines.item_rate(counts, "click", prior_strength=strength)
    users = baselines.user_rate(counts, "click", prior_strength=strength)
    mean = users[0]
    both = baselines.item_user_rate(items[:, None], users, mean)
    np.testing.assert_allclose(logit(both), logit(items)[:, None] + logit(users) - logit(mean), atol=1e-12)
    np.testing.assert_allclose(both[0], users)
    np.testing.assert_allclose(both[:, 0], items)


def test_an_action_of_no_row_or_of_all_has_that_rate_for_every_item_and_user():
    for rate in (0.0, 1.0):
        np.testing.assert_array_equal(baselines.item_user_rate(np.full(3, rate), np.full(3, rate), rate), rate)


def test_recent_clicks_are_those_in_the_last_quarter_of_each_users_rows(table, rows, monkeypatch):
    expected = [0.0] * 30
    for user in range(14):
        mine = [row for row in rows if table.user_R[row] == user]
        for row in mine[len(mine) - math.ceil(0.25 * len(mine)) :]:
            expected[table.item_R[row]] += table.labels_RA[row, 0]
    np.testing.assert_array_equal(baselines.recent_clicks(table, rows), expected)
    monkeypatch.setattr(baselines, "_BLOCK", 7)
    np.testing.assert_array_equal(baselines.recent_clicks(table, rows), expected)
    with pytest.raises(ValueError, match="ascending"):
        baselines.recent_clicks(table, rows[::-1])


def test_recency_puts_a_users_own_latest_items_first_and_then_those_that_are_clicked_of_late(table, rows):
    recent = baselines.recent_clicks(table, rows)
    users = np.array([2, 5, 13])
    scores = baselines.recency_scorer(table, rows, recent)(users)
    for user, line in zip(users, scores, strict=True):
        own = [table.item_R[row] for row in rows[::-1] if table.user_R[row] == user]
        own = list(dict.fromkeys(own))
        assert (1 + np.argsort(-line, kind="stable"))[: len(own)].tolist() == own
        others = np.setdiff1d(np.arange(1, 30), own)
        np.testing.assert_array_equal(
            np.argsort(line[others - 1], kind="stable"), np.argsort(recent[others], kind="stable")
        )
