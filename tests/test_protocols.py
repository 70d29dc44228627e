"""Splits against going through each user's rows one by one."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenrec_jax.data import row_blocks
from tenrec_jax.data.interactions import Interactions, Items, Users, offsets_of
from tenrec_jax.data.protocols import (
    DRAWN,
    PROTOCOLS,
    Part,
    cold_user,
    leave_one_out,
    make_split,
    merlin_qk,
    official_ctr,
    per_user_order,
    sampled_128,
)
from tenrec_jax.errors import UserError

# Clicks of each user's rows, oldest first: users with a single row and users without a click among them.
logs = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=25), min_size=1, max_size=6)
names = st.sampled_from(sorted(PROTOCOLS))


def table_of(clicks_of_users, items=8, raw_id=None, has_exposures=True, actions=("click", "like"), seed=0):
    lengths = [len(clicks) for clicks in clicks_of_users]
    clicks = np.asarray([click for clicks in clicks_of_users for click in clicks], np.int8)
    generator, users = np.random.default_rng(seed), len(lengths)
    user_R = np.repeat(np.arange(1, users + 1), lengths).astype(np.int32)
    raw_id = np.arange(-1, users) if raw_id is None else raw_id
    return Interactions(
        kind="qb_video",
        actions=actions,
        has_exposures=has_exposures,
        user_R=user_R,
        item_R=np.minimum(generator.geometric(0.15, len(clicks)), items).astype(np.int32),
        labels_RA=np.stack([clicks, generator.integers(0, 2, len(clicks)).astype(np.int8)], axis=1),
        offsets=offsets_of(user_R, users),
        users=Users(raw_id, np.zeros(users + 1, np.int32), np.zeros(users + 1, np.int32)),
        items=Items(np.arange(-1, items), np.zeros(items + 1, np.int32)),
        sha256="",
    )


def cut_in_order(log):
    expected = []
    for clicks in log:
        n = len(clicks)
        train, validation = (8 * n - 8 * n % 10) // 10, (9 * n - 9 * n % 10) // 10
        expected += [Part.TRAIN] * train + [Part.VALIDATION] * (validation - train) + [Part.TEST] * (n - validation)
    return expected


@settings(deadline=None)
@given(log=logs, seed=st.integers(0, 3))
def test_per_user_order_and_sampled_128_cut_each_block(log, seed):
    table = table_of(log)
    for split in (per_user_order(table), sampled_128(table, seed)):
        assert split.part_R.tolist() == cut_in_order(log)
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
@given(log=logs, seed=st.integers(0, 5))
def test_official_ctr_keeps_every_click_and_two_others_for_each(log, seed):
    clicks = [click for user in log for click in user]
    split = official_ctr(table_of(log), seed)
    kept = [part != Part.NONE for part in split.part_R.tolist()]
    assert all(kept[row] for row, click in enumerate(clicks) if click)
    others = sum(1 for row, click in enumerate(clicks) if not click and kept[row])
    assert others == min(2 * sum(clicks), clicks.count(0))
    n = sum(kept)
    sizes = [len(split.rows(part)) for part in (Part.TRAIN, Part.VALIDATION, Part.TEST)]
    assert sizes == [8 * n // 10, 9 * n // 10 - 8 * n // 10, n - 9 * n // 10]


def test_official_ctr_draws_every_row_alike():
    # 20 clicks and 180 others of one user; over many seeds each other row is kept and tested equally often.
    table = table_of([[1] * 20 + [0] * 180])
    parts = np.stack([official_ctr(table, seed).part_R for seed in range(400)])
    kept, tested = (parts > 0).mean(0), (parts == Part.TEST).mean(0)
    np.testing.assert_allclose(kept[20:], 40 / 180, atol=5 * np.sqrt(0.22 * 0.78 / 400))
    np.testing.assert_allclose(tested[:20], 0.1, atol=5 * np.sqrt(0.09 / 400))


def merlin_log(seed):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 2, length).tolist() for length in (1, 29, 30, 31, 45, 60, 150, 151, 200, 80, 33, 38)]


def merlin_rows(table):
    """The rows that are left, by walking through them."""
    rows = [row for row in range(table.num_rows) if table.labels_RA[row, 0] or not any(table.labels_RA[row])]
    for _ in range(5):
        of_user = Counter(int(table.user_R[row]) for row in rows)
        rows = [row for row in rows if 30 <= of_user[int(table.user_R[row])] <= 150]
        of_item = Counter(int(table.item_R[row]) for row in rows)
        rows = [row for row in rows if of_item[int(table.item_R[row])] >= 30]
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_merlin_qk_filters_and_draws_a_fifth_of_each_user(seed):
    table = table_of(merlin_log(seed), items=12, seed=seed)
    split, rows = merlin_qk(table, seed), merlin_rows(table)
    assert 0 < len(rows) < table.num_rows
    assert np.flatnonzero(split.part_R).tolist() == rows
    left_out = 0
    for user in range(1, table.num_users + 1):
        parts = split.part_R[table.rows_of(user)].tolist()
        n = sum(part != Part.NONE for part in parts)
        evaluated = n // 5
        assert parts.count(Part.VALIDATION) == evaluated // 2
        assert parts.count(Part.TEST) == evaluated - evaluated // 2
        left_out += evaluated == 0
    assert split.users_left_out == left_out


def test_merlin_qk_draws_every_row_of_a_user_alike():
    table = table_of([[1] * 50], items=1)
    parts = np.stack([merlin_qk(table, seed).part_R for seed in range(400)])
    for part in (Part.VALIDATION, Part.TEST):
        np.testing.assert_allclose((parts == part).mean(0), 0.1, atol=5 * np.sqrt(0.09 / 400))


@pytest.mark.parametrize("as_text", [False, True])
def test_cold_user_goes_by_the_spelling_of_the_raw_id_alone(as_text):
    raw = [3502303, 17, 0, 999, 123456789012, *range(1000, 1400)]
    ids = np.asarray(["", *map(str, raw)], object) if as_text else np.asarray([-1, *raw])
    table = table_of([[1, 0, 1]] * len(raw), raw_id=ids)
    expected = []
    for user in raw:
        tenth = int(hashlib.blake2b(str(user).encode(), digest_size=8).hexdigest(), 16) % 10
        expected += [Part.TRAIN if tenth < 8 else Part.VALIDATION if tenth == 8 else Part.TEST] * 3
    split = cold_user(table)
    assert split.part_R.tolist() == expected
    assert 0.7 < (split.part_R == Part.TRAIN).mean() < 0.9


@settings(deadline=None)
@given(log=logs, name=names, seed=st.integers(0, 9))
def test_parts_cover_the_rows_once_and_keep_each_user_in_order_where_order_is_promised(log, name, seed):
    table = table_of(log)
    split = make_split(name, table, seed=seed)
    rows = [split.rows(part) for part in Part]
    assert sorted(np.concatenate(rows).tolist()) == list(range(table.num_rows))
    assert all(part.dtype == np.int64 for part in rows)
    assert split.protocol == name
    assert split.ordered == (name not in ("official_ctr", "merlin_qk"))
    assert split.seed == (seed if name in DRAWN else None)
    for user in range(1, table.num_users + 1):
        used = [part for part in split.part_R[table.rows_of(user)].tolist() if part != Part.NONE]
        assert not split.ordered or used == sorted(used)


@settings(deadline=None)
@given(log=logs, name=names, part=st.sampled_from([Part.TRAIN, Part.VALIDATION, Part.TEST]))
def test_context_is_every_earlier_part_if_ordered_and_training_alone_if_not(log, name, part):
    split = make_split(name, table_of(log))
    for other, seen in zip(split.part_R.tolist(), split.context_of(part).tolist(), strict=True):
        assert seen == (Part.TRAIN <= other <= part if split.ordered else other == Part.TRAIN)


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_splits_do_not_depend_on_the_block_size(name, monkeypatch):
    table = table_of(merlin_log(0), items=12)
    whole = make_split(name, table, seed=3)
    monkeypatch.setattr(row_blocks, "BLOCK_ROWS", 40)
    assert make_split(name, table, seed=3).part_R.tolist() == whole.part_R.tolist()


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_the_hash_is_stable_and_tells_protocols_seeds_and_logs_apart(name):
    log = merlin_log(1)
    first, again = (make_split(name, table_of(log, items=12), seed=1).sha256 for _ in range(2))
    assert first == again
    other_seed = make_split(name, table_of(log, items=12), seed=2).sha256
    assert (other_seed != first) == (name in DRAWN)
    longer = make_split(name, table_of([*log, [1, 0, 1, 1]], items=12), seed=1).sha256
    assert longer != first
    assert len({make_split(other, table_of(log, items=12), seed=1).sha256 for other in PROTOCOLS}) == len(PROTOCOLS)


def test_parts_cannot_be_written_to():
    for name in PROTOCOLS:
        assert not make_split(name, table_of([[1, 0]])).part_R.flags.writeable


@pytest.mark.parametrize("name", ["official_ctr", "merlin_qk"])
def test_protocols_of_exposures_refuse_logs_of_clicks_alone(name):
    with pytest.raises(UserError, match=f"{name} needs exposures"):
        make_split(name, table_of([[1, 1, 1]], has_exposures=False))


@pytest.mark.parametrize("name", ["official_ctr", "merlin_qk", "leave_one_out", "sampled_128"])
def test_protocols_of_clicks_refuse_logs_without_them(name):
    with pytest.raises(UserError, match=f"{name} needs clicks"):
        make_split(name, table_of([[1, 1, 1]], actions=("like", "share")))


def test_an_unknown_protocol_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="Did you mean leave_one_out"):
        make_split("leave_one_ut", table_of([[1]]))


WORDS = ("none", "train", "validation", "test")


def write_split(path: Path, rows, parts):
    if path.suffix == ".csv":
        path.write_text("row,part\n" + "".join(f"{row},{part}\n" for row, part in zip(rows, parts, strict=True)))
    else:
        pq.write_table(pa.table({"part": parts, "row": pa.array(rows, pa.int32())}), path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_split_file_assigns_every_row_whatever_its_order(suffix, tmp_path):
    table = table_of([[1, 0, 1], [0] * 5, [1]])
    expected = np.random.default_rng(0).integers(0, 4, 9)
    order = np.random.default_rng(1).permutation(9)
    path = tmp_path / f"parts{suffix}"
    write_split(path, order.tolist(), [WORDS[code] for code in expected[order]])
    split = make_split("split_file", table, file=path)
    assert split.part_R.tolist() == expected.tolist()
    assert (split.ordered, split.protocol) == (False, "split_file")
    write_split(path, list(range(9)), [WORDS[code] for code in expected])
    assert make_split("split_file", table, file=path).sha256 == split.sha256


@pytest.mark.parametrize(
    ("rows", "parts", "message"),
    [
        ([0, 1, 3], ["train"] * 3, "{2}: row 3 is unknown"),
        ([0, -1, 1], ["train"] * 3, "{1}: row -1 is unknown"),
        ([0, 2, 1, 2], ["train"] * 4, "{3}: row 2 stands here for the second time"),
        ([0, 2], ["train"] * 2, "does not say where row 1 goes"),
        ([0, 1, 2], ["train", "test", "dev"], "{2}: row 2 has the part dev"),
        ([], [], "does not say where row 0 goes, nor 2 others"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_wrong_split_file_is_refused_with_its_place(rows, parts, message, suffix, tmp_path):
    path = tmp_path / f"parts{suffix}"
    write_split(path, rows, parts)
    for place in range(4):
        named = f"line {place + 2}" if suffix == ".csv" else f"record {place}"
        message = message.replace(f"{{{place}}}", named)
    with pytest.raises(UserError, match=message):
        make_split("split_file", table_of([[1, 0, 1]]), file=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row,part\n0,train\nx,train\n", "Row #3"),
        ("row,part\n0,train\n\n1,train\n", "Row #3|line 3"),
        ("row,part\n0,train,1\n", "Row #2"),
        ("user,part\n0,train\n", "has the columns user, part"),
        ("", "Empty CSV"),
    ],
)
def test_a_malformed_split_file_is_refused_with_its_line(text, message, tmp_path):
    (tmp_path / "parts.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        make_split("split_file", table_of([[1, 0]]), file=tmp_path / "parts.csv")


def test_a_split_file_goes_with_its_protocol_alone(tmp_path):
    table = table_of([[1, 0]])
    for name, file in (("split_file", None), ("per_user_order", tmp_path / "parts.csv")):
        with pytest.raises(UserError, match="goes with the protocol split_file"):
            make_split(name, table, file=file)
    with pytest.raises(UserError, match="does not exist"):
        make_split("split_file", table, file=tmp_path / "parts.csv")
