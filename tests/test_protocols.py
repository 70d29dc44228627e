"""Splits against going through each user's rows one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenrec_jax.data.interactions import Interactions, Items, Users
from tenrec_jax.data.protocols import PROTOCOLS, Part, leave_one_out, make_split, per_user_order
from tenrec_jax.errors import UserError

# Clicks of each user's rows, oldest first.
logs = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=25), min_size=1, max_size=6)


def table_of(clicks_of_users):
    lengths = [len(clicks) for clicks in clicks_of_users]
    clicks = np.asarray([click for clicks in clicks_of_users for click in clicks], np.int8)
    generator = np.random.default_rng(0)
    users = len(lengths)
    return Interactions(
        kind="qb_video",
        actions=("click", "like"),
        has_exposures=True,
        user_R=np.repeat(np.arange(1, users + 1), lengths).astype(np.int32),
        item_R=generator.integers(1, 9, len(clicks)).astype(np.int32),
        labels_RA=np.stack([clicks, generator.integers(0, 2, len(clicks)).astype(np.int8)], axis=1),
        offsets=np.concatenate([[0, 0], np.cumsum(lengths)]).astype(np.int64),
        users=Users(np.arange(-1, users), np.zeros(users + 1, np.int32), np.zeros(users + 1, np.int32)),
        items=Items(np.arange(-1, 9), np.zeros(10, np.int32)),
        sha256="",
    )


@settings(deadline=None)
@given(log=logs)
def test_per_user_order_equals_cutting_each_block(log):
    expected = []
    for clicks in log:
        n = len(clicks)
        train, validation = (8 * n - 8 * n % 10) // 10, (9 * n - 9 * n % 10) // 10
        expected += [Part.TRAIN] * train + [Part.VALIDATION] * (validation - train) + [Part.TEST] * (n - validation)
    split = per_user_order(table_of(log))
    assert split.part_R.tolist() == expected
    assert split.users_left_out == 0


@pytest.mark.parametrize(
    ("length", "sizes"),
    [(1, (0, 0, 1)), (2, (1, 0, 1)), (5, (4, 0, 1)), (9, (7, 1, 1)), (10, (8, 1, 1)), (70, (56, 7, 7))],
)
def test_per_user_order_rounds_down(length, sizes):
    split = per_user_order(table_of([[0] * length]))
    assert tuple(len(split.rows(part)) for part in (Part.TRAIN, Part.VALIDATION, Part.TEST)) == sizes


@settings(deadline=None)
@given(log=logs)
def test_leave_one_out_equals_walking_back_from_each_last_click(log):
    expected, left_out = [], 0
    for clicks in log:
        parts = [Part.TRAIN if click else Part.NONE for click in clicks]
        clicked = [place for place, click in enumerate(clicks) if click]
        if len(clicked) >= 3:
            parts[clicked[-1]], parts[clicked[-2]] = Part.TEST, Part.VALIDATION
        else:
            left_out += 1
        expected += parts
    split = leave_one_out(table_of(log))
    assert split.part_R.tolist() == expected
    assert split.users_left_out == left_out


@settings(deadline=None)
@given(log=logs, name=st.sampled_from(sorted(PROTOCOLS)))
def test_parts_cover_the_rows_once_and_keep_each_user_in_order(log, name):
    table = table_of(log)
    split = make_split(name, table)
    rows = [split.rows(part) for part in Part]
    assert sorted(np.concatenate(rows).tolist()) == list(range(table.num_rows))
    assert all(part.dtype == np.int64 for part in rows)
    assert split.protocol == name
    for user in range(1, table.num_users + 1):
        used = [part for part in split.part_R[table.rows_of(user)].tolist() if part != Part.NONE]
        assert used == sorted(used)


def test_the_hash_tells_splits_apart():
    tables = [table_of([[1, 1, 1, 0]]), table_of([[1, 1, 1, 0]]), table_of([[1, 1, 0, 1]])]
    first, same, other = (leave_one_out(table).sha256 for table in tables)
    assert first == same
    assert first != other
    assert first != per_user_order(tables[0]).sha256


def test_parts_cannot_be_written_to():
    assert not per_user_order(table_of([[1]])).part_R.flags.writeable


def test_an_unknown_protocol_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="Did you mean leave_one_out"):
        make_split("leave_one_ut", table_of([[1]]))
