"""Statistics of a table against counting by hand: plain Python over the rows, and hypothesis."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenrec_jax.data import stats
from tenrec_jax.data.interactions import Interactions, Items, Users, offsets_of
from tenrec_jax.data.protocols import Part, Split, make_split
from tenrec_jax.data.stats import blocks_of_users, concentration, distribution, table_stats

ACTIONS = ("click", "like", "share")


def table_of(rows: list[tuple[int, int, tuple[int, ...]]]) -> Interactions:
    """A table of (user, item, labels); users and items 1, 2, ... in any order of the rows."""
    rows = sorted(rows, key=lambda row: row[0])
    user, item = (np.array([row[place] for row in rows], np.int32) for place in (0, 1))
    users, items = int(user.max()), int(item.max())
    zeros_U, zeros_N = np.zeros(users + 1, np.int32), np.zeros(items + 1, np.int32)
    return Interactions(
        kind="qb_video",
        actions=ACTIONS,
        has_exposures=True,
        user_R=user,
        item_R=item,
        labels_RA=np.array([row[2] for row in rows], np.int8),
        offsets=offsets_of(user, users),
        users=Users(np.arange(-1, users), zeros_U, zeros_U),
        items=Items(np.arange(-1, items), zeros_N),
        sha256="",
    )


LABELS = st.tuples(*[st.integers(0, 1)] * len(ACTIONS))
ROWS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5), LABELS), min_size=1, max_size=60)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "BLOCK_ROWS", 7)


def measured(table: Interactions) -> stats.TableStats:
    return table_stats(table, make_split("per_user_order", table), duplicates=0)


@given(ROWS)
@settings(deadline=None)
def test_actions_and_their_joint_table_are_counted(rows: list[tuple[int, int, tuple[int, ...]]]) -> None:
    found, expected = measured(table_of(rows)), Counter(labels for _, _, labels in rows)
    assert [cell.labels for cell in found.joint] == [(i >> 2, i >> 1 & 1, i & 1) for i in range(8)]
    assert {cell.labels: cell.rows for cell in found.joint if cell.rows} == expected
    assert sum(cell.share for cell in found.joint) == pytest.approx(1)
    for place, action in enumerate(ACTIONS):
        assert found.rates[action] == pytest.approx(sum(row[2][place] for row in rows) / len(rows))


@given(ROWS)
@settings(deadline=None)
def test_repeats_are_the_rows_beyond_the_first(rows: list[tuple[int, int, tuple[int, ...]]]) -> None:
    found = measured(table_of(rows)).repeats
    pairs, outcomes = Counter(row[:2] for row in rows), Counter(rows)
    clicks: dict[tuple[int, int], set[int]] = {}
    for user, item, labels in rows:
        clicks.setdefault((user, item), set()).add(labels[0])
    assert found.pairs == sum(count - 1 for count in pairs.values())
    assert found.same_labels == sum(count - 1 for count in outcomes.values())
    assert found.click_contradictions == sum(count - 1 for pair, count in pairs.items() if len(clicks[pair]) == 2)
    assert found.pairs_share == pytest.approx(found.pairs / len(rows))


@given(ROWS)
@settings(deadline=None)
def test_parts_of_the_split_count_what_training_lacks(rows: list[tuple[int, int, tuple[int, ...]]]) -> None:
    table = table_of(rows)
    part_R = np.random.default_rng(len(rows)).integers(0, 4, table.num_rows).astype(np.int8)
    found = table_stats(table, Split("random", part_R, "", 0, ordered=False, seed=None), duplicates=0)
    train = part_R == Part.TRAIN
    seen_items, seen_users = set(table.item_R[train].tolist()), set(table.user_R[train].tolist())
    for part, entry in zip((Part.TRAIN, Part.VALIDATION, Part.TEST), found.parts, strict=True):
        here = part_R == part
        items, users = table.item_R[here].tolist(), table.user_R[here].tolist()
        assert (entry.rows, entry.items, entry.users) == (len(items), len(set(items)), len(set(users)))
        if not items:
            assert np.isnan(entry.unseen_rows)
            continue
        assert entry.unseen_rows == pytest.approx(np.mean([item not in seen_items for item in items]))
        assert entry.unseen_items == pytest.approx(np.mean([item not in seen_items for item in set(items)]))
        assert entry.shared_users == pytest.approx(np.mean([user in seen_users for user in set(users)]))
        assert entry.rows_of_shared_users == pytest.approx(np.mean([user in seen_users for user in users]))
        assert entry.rates["click"] == pytest.approx(table.labels_RA[here, 0].mean())


def test_users_and_items_are_described_where_they_have_rows() -> None:
    found = measured(table_of([(1, 1, (1, 0, 0)), (1, 3, (0, 0, 0)), (3, 3, (1, 0, 0))]))  # user 2 and item 2: none
    assert (found.rows_per_user.number, found.rows_per_user.mean) == (2, 1.5)
    assert (found.rows_per_item.number, found.rows_per_item.quantiles["1.0"]) == (2, 2)
    assert found.clicks_per_user.mean == 1


def test_concentration_of_known_counts() -> None:
    even = concentration(np.full(200, 7))
    assert even.gini == pytest.approx(0)
    assert even.top_1_percent == pytest.approx(0.01)
    one = concentration(np.array([1] * 99 + [901]))
    assert one.top_1_percent == one.top_item == pytest.approx(0.901)
    assert one.lorenz["1.0"] == pytest.approx(1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_gini_is_half_the_mean_difference_over_the_mean(counts: list[int]) -> None:
    array = np.array(counts)
    expected = np.abs(array[:, None] - array).mean() / (2 * array.mean())
    assert concentration(array).gini == pytest.approx(expected, abs=1e-12)


def test_quantiles_of_nothing_are_undefined() -> None:
    assert np.isnan(distribution(np.array([], np.int64)).quantiles["0.5"])


@given(ROWS, st.integers(1, 20))
def test_blocks_hold_whole_users_and_every_row_once(rows: list[tuple[int, int, tuple[int, ...]]], size: int) -> None:
    table = table_of(rows)
    blocks = list(blocks_of_users(table, size))
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(len(rows)))
    for block in blocks[1:]:
        assert table.user_R[block.start] != table.user_R[block.start - 1]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows() -> None:
    import tracemalloc

    rng = np.random.default_rng(0)
    rows, users, items = 8_000_000, 60_000, 50_000
    user = np.sort(rng.integers(1, users + 1, rows)).astype(np.int32)
    zeros = np.zeros(users + 1, np.int32)
    table = Interactions(
        "qb_video", ACTIONS, True, user, rng.integers(1, items + 1, rows).astype(np.int32),
        (rng.random((rows, len(ACTIONS))) < 0.3).astype(np.int8), offsets_of(user, users),
        Users(np.arange(-1, users), zeros, zeros), Items(np.arange(-1, items), np.zeros(items + 1, np.int32)), "",
    )  # fmt: skip
    split = Split("first", np.where(np.arange(rows) % 10 < 8, Part.TRAIN, Part.TEST).astype(np.int8), "", 0)
    stats.BLOCK_ROWS = 1 << 20
    tracemalloc.start()
    table_stats(table, split, duplicates=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20
