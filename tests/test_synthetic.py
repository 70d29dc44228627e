"""The synthetic twin: its files, its rates and what can be learnt from it."""

import csv
import re
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from tenrec_jax.data import synthetic, twin_model
from tenrec_jax.data.stats import concentration
from tenrec_jax.data.synthetic import TwinSummary, end_of_rows, history_and_kept, write_twin
from tenrec_jax.data.twin_play import simulate
from tenrec_jax.data.twin_recipes import recipe_of
from tenrec_jax.errors import UserError

ROWS, SEED = 80_000, 7
VIDEO = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age"
HISTORY = ",".join(f"hist_{k}" for k in range(1, 11))


class Twin(NamedTuple):
    summary: TwinSummary
    text: str
    columns: dict[str, np.ndarray]
    truth: dict[str, np.ndarray]

    @property
    def blocks(self) -> list[slice]:
        """Where each user's rows stand."""
        ends = np.cumsum([len(list(rows)) for _, rows in groupby(self.columns["user_id"])])
        return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    @property
    def place(self) -> np.ndarray:
        """How far each row is in its user's block, from 0 to just below 1."""
        return np.concatenate([np.arange(b.stop - b.start) / (b.stop - b.start) for b in self.blocks])


def make(folder: Path, kind: str, rows: int = ROWS, seed: int = SEED) -> Twin:
    summary = write_twin(folder / f"{kind}.csv", kind=kind, rows=rows, seed=seed, progress=False)
    with summary.path.open(newline="") as file:
        header, *records = csv.reader(file)
    # -1 stands for a missing category.
    values = np.array([[-1 if value == r"\N" else int(value) for value in record] for record in records])
    table = pq.read_table(summary.truth, page_checksum_verification=True)
    truth = {name: table[name].to_numpy() for name in table.column_names}
    return Twin(summary, summary.path.read_bytes().decode(), dict(zip(header, values.T, strict=True)), truth)


@pytest.fixture(scope="module")
def qb(tmp_path_factory: pytest.TempPathFactory) -> Twin:
    return make(tmp_path_factory.mktemp("qb"), "qb_video")


@pytest.fixture(scope="module")
def ctr(tmp_path_factory: pytest.TempPathFactory) -> Twin:
    return make(tmp_path_factory.mktemp("ctr"), "ctr_1m")


@pytest.fixture(params=["qb", "ctr"])
def twin(request: pytest.FixtureRequest) -> Twin:
    return request.getfixturevalue(request.param)


def grouped_auc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    """AUC by user, weighted by rows, over the users with both labels."""
    total = weight = 0.0
    for user in np.unique(users):
        rows = users == user
        if 0 < labels[rows].sum() < rows.sum():
            total += roc_auc_score(labels[rows], scores[rows]) * rows.sum()
            weight += rows.sum()
    return total / weight


def smoothed_rate(keys: np.ndarray, clicks: np.ndarray, seen: np.ndarray, strength: float) -> np.ndarray:
    """Each row's click rate over the rows `seen` that share its key, drawn towards the mean."""
    mean, size = clicks[seen].mean(), keys.max() + 1
    shown = np.bincount(keys[seen], minlength=size)
    clicked = np.bincount(keys[seen], clicks[seen], minlength=size)
    return ((clicked + strength * mean) / (shown + strength))[keys]


def test_qb_video_has_ten_columns_in_the_order_and_form_of_the_real_file(qb: Twin) -> None:
    header, *lines, after = qb.text.split("\n")
    assert header == VIDEO
    assert len(lines) == ROWS
    assert after == ""
    line = re.compile(r"[1-9]\d*,[1-9]\d*,[01],[01],[01],[01],(?:0|1|\\N),\d+,[0-2],[0-7]")
    assert all(line.fullmatch(text) for text in lines)


def test_ctr_1m_has_twenty_columns_in_the_order_and_form_of_the_real_file(ctr: Twin) -> None:
    header, *lines, after = ctr.text.split("\n")
    assert header == f"{VIDEO},{HISTORY}"
    assert len(lines) == ROWS
    assert after == ""
    line = re.compile(r"[1-9]\d*,[1-9]\d*,[01],[01],[01],[01],(?:0|1|\\N),\d+,[0-2],[0-7](?:,\d+){10}")
    assert all(line.fullmatch(text) for text in lines)


def test_summary_counts_what_the_file_holds(twin: Twin) -> None:
    columns, summary = twin.columns, twin.summary
    assert summary.rows == columns["click"].size == ROWS
    assert summary.users == len(set(columns["user_id"]))
    assert summary.items == len(set(columns["item_id"]))
    assert summary.click_rate == pytest.approx(columns["click"].mean(), abs=1e-12)
    assert summary.truth == summary.path.with_suffix(".truth.parquet")


def test_user_blocks_are_contiguous_and_numbered_by_first_appearance(twin: Twin) -> None:
    users = [user for user, _ in groupby(twin.columns["user_id"])]
    assert users == list(range(1, len(users) + 1))


def test_items_are_numbered_by_first_appearance(qb: Twin) -> None:
    assert list(dict.fromkeys(qb.columns["item_id"])) == list(range(1, qb.summary.items + 1))


def test_users_and_items_keep_their_features(twin: Twin) -> None:
    for key, feature in (("user_id", "gender"), ("user_id", "age"), ("item_id", "video_category")):
        pairs = set(zip(twin.columns[key], twin.columns[feature], strict=True))
        assert len(pairs) == len(set(twin.columns[key]))


def test_same_seed_gives_the_same_bytes_and_another_seed_others(ctr: Twin, tmp_path: Path) -> None:
    def written(folder: str, seed: int) -> tuple[bytes, bytes]:
        summary = write_twin(tmp_path / folder / "log.csv", kind="ctr_1m", rows=ROWS, seed=seed, progress=False)
        return summary.path.read_bytes(), summary.truth.read_bytes()

    first, other = (ctr.text.encode(), ctr.summary.truth.read_bytes()), written("b", SEED + 1)
    assert written("a", SEED) == first
    assert first[0] != other[0]
    assert first[1] != other[1]


@pytest.mark.parametrize("kind", ["qb_video", "ctr_1m"])
@pytest.mark.parametrize("rows", [1, 700])
def test_any_number_of_rows_is_met_exactly(tmp_path: Path, kind: str, rows: int) -> None:
    twin = make(tmp_path, kind, rows=rows)
    assert twin.columns["click"].size == twin.truth["click"].size == rows


def test_more_users_than_fit_a_chunk_go_on_in_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "CHUNK_ROWS", 2_000)
    for kind in ("qb_video", "ctr_1m"):
        twin = make(tmp_path, kind, rows=6_000)
        users = [user for user, _ in groupby(twin.columns["user_id"])]
        assert users == list(range(1, twin.summary.users + 1))
        assert twin.summary.users > 32
        assert twin.truth["click"].size == 6_000


def test_rates_of_the_actions_are_those_of_tenrec(qb: Twin, ctr: Twin) -> None:
    assert qb.summary.click_rate == pytest.approx(0.6965, abs=0.03)
    assert ctr.summary.click_rate == pytest.approx(0.24, abs=0.03)
    assert qb.columns["like"].mean() == pytest.approx(0.0085, rel=0.5)
    assert ctr.columns["like"].mean() == pytest.approx(0.019, rel=0.4)
    clicked = qb.columns["click"] == 1
    assert qb.columns["like"][clicked].mean() > qb.columns["like"][~clicked].mean() > 0
    for action in ("share", "follow"):
        assert 0.0003 < qb.columns[action].mean() < 0.0025
        assert 0.0008 < ctr.columns[action].mean() < 0.0035
        assert qb.columns[action][~clicked].any()


def test_qb_video_begins_with_its_heavy_users(qb: Twin) -> None:
    border = round(ROWS * 500_000 / 2_442_299)
    head = [block for block in qb.blocks if block.start < border]
    assert head[-1].stop == border  # the last user of the head is cut there
    tail = qb.blocks[len(head) :]
    assert border / len(head) == pytest.approx(160, rel=0.25)
    assert (ROWS - border) / len(tail) == pytest.approx(62.4, rel=0.1)
    assert qb.columns["click"][:border].mean() == pytest.approx(0.4351, abs=0.05)
    assert qb.columns["click"][border:].mean() == pytest.approx(0.764, abs=0.025)
    rates = np.array([qb.columns["click"][block].mean() for block in head])
    assert np.median(rates) == pytest.approx(0.43, abs=0.08)
    assert np.quantile(rates, 0.9) == pytest.approx(0.73, abs=0.1)
    assert np.median([qb.columns["like"][block].mean() for block in head]) == 0


def test_users_of_ctr_1m_are_as_active_as_tenrecs(ctr: Twin) -> None:
    lengths = [block.stop - block.start for block in ctr.blocks]
    assert np.quantile(lengths, [0.5, 0.9, 0.99]) == pytest.approx([82, 265, 590], rel=0.15)
    assert np.mean(lengths) == pytest.approx(120.4, rel=0.1)


def test_clicks_of_ctr_1m_rise_and_fall_over_the_parts_of_a_strict_split(ctr: Twin) -> None:
    clicks, place = ctr.columns["click"], ctr.place
    parts = [clicks[place < 0.8], clicks[(place >= 0.8) & (place < 0.9)], clicks[place >= 0.9]]
    assert [part.mean() for part in parts] == pytest.approx([0.2407, 0.2622, 0.2119], abs=0.035)
    assert parts[1].mean() > parts[2].mean() + 0.02


def test_marginals_of_the_features_are_those_of_tenrec(twin: Twin) -> None:
    category, gender, age = (twin.columns[name] for name in ("video_category", "gender", "age"))
    assert np.mean(category == -1) == pytest.approx(0.0132, abs=0.004)
    assert np.mean(category == 1) == pytest.approx(0.451, abs=0.02)
    # One value a user: 80,000 rows are few users.
    assert np.bincount(gender) / ROWS == pytest.approx([0.188, 0.580, 0.232], abs=0.09)
    assert np.bincount(age, minlength=8)[:4] / ROWS == pytest.approx([0.186, 0.020, 0.492, 0.212], abs=0.09)
    runs = [len(list(rows)) for _, rows in groupby(category)]
    assert np.median(runs) == 1


def test_watching_times_follow_the_labels(qb: Twin) -> None:
    times, clicked, liked = (qb.columns[name] for name in ("watching_times", "click", "like"))
    assert times[(clicked == 0) & (liked == 0)].mean() == pytest.approx(0.9, abs=0.03)
    assert times[clicked == 1].mean() == pytest.approx(2.4, abs=0.05)
    assert times[liked == 1].mean() == pytest.approx(2.5, abs=0.2)


def test_some_exposures_are_repeated_and_half_of_those_exactly(qb: Twin) -> None:
    pairs = zip(qb.columns["user_id"], qb.columns["item_id"], strict=True)
    repeated = sum(count - 1 for count in Counter(pairs).values()) / ROWS
    exact = sum(count - 1 for count in Counter(qb.text.split("\n")[1:-1]).values()) / ROWS
    assert 0.01 <= repeated <= 0.03
    assert 0.3 * repeated <= exact <= 0.8 * repeated


def test_few_items_have_many_rows(qb: Twin) -> None:
    rows = np.sort(np.bincount(qb.columns["item_id"])[1:])
    assert 0.03 <= rows.size / ROWS <= 0.15
    assert np.quantile(rows, 0.99) >= 8 * np.median(rows)
    assert rows[-rows.size // 100 :].sum() >= 0.3 * ROWS


def test_popularity_of_ctr_1m_is_one_law_that_gives_tenrecs_quantiles_and_unseen_items() -> None:
    law, rng = recipe_of("ctr_1m").popularity, np.random.default_rng(0)
    published = {1_000_000: 0.18, 10_000_000: 0.049, 120_342_306: 0.0088}
    for rows, unseen in published.items():
        weight = twin_model.draw_popularity(law, rows, rng)[1]
        share = weight / weight.sum()
        # Rows of test items that none of the 80 % of training rows shows, if rows were independent.
        assert (share * np.exp(-0.8 * rows * share)).sum() == pytest.approx(unseen, rel=0.15)
    counts = rng.poisson(share * rows)
    counts = np.sort(counts[counts > 0])
    assert counts.size == pytest.approx(2_310_087, rel=0.1)
    assert np.quantile(counts, [0.5, 0.9, 0.99]) == pytest.approx([3, 51, 799], rel=0.1)
    assert counts[-1] / rows == pytest.approx(0.0013, rel=0.5)
    shape = concentration(counts)
    assert shape.gini >= 0.88
    assert shape.top_1_percent >= 0.45


def test_popularity_that_stands_for_rare_items_leaves_the_total_share_of_the_others_alone() -> None:
    law, rng = recipe_of("ctr_1m").popularity, np.random.default_rng(0)
    whole = twin_model.draw_popularity(replace(law, items=400_000.0, rarest=0.0), 20_000, rng)[1]
    short = twin_model.draw_popularity(replace(law, items=400_000.0), 20_000, rng)[1]
    assert short.size < 0.5 * whole.size
    for top in (100, 1_000, 10_000):
        shares = [np.sort(weight)[-top:].sum() / weight.sum() for weight in (whole, short)]
        assert shares[1] == pytest.approx(shares[0], rel=0.03)
    # In random order: no part of the array, hence no topic, holds the rare ones alone.
    thirds = np.array([part.sum() for part in np.array_split(np.minimum(short, np.quantile(short, 0.9)), 3)])
    assert thirds / thirds.sum() == pytest.approx(1 / 3, rel=0.05)


@pytest.mark.parametrize("action", ["click", "like", "share", "follow"])
def test_labels_agree_with_the_true_probabilities_in_every_range_of_them(qb: Twin, action: str) -> None:
    truth, labels = qb.truth[action].astype(np.float64), qb.columns[action]
    assert truth.min() > 0
    assert truth.max() < 1
    for rows in np.array_split(np.argsort(truth), 20 if action == "click" else 4):
        deviation = np.sqrt((truth[rows] * (1 - truth[rows])).sum())
        assert abs(labels[rows].sum() - truth[rows].sum()) <= max(4 * deviation, 3)


def test_clicks_after_the_eleventh_agree_with_the_truth_of_ctr_1m(ctr: Twin) -> None:
    # The first click left to a user with a full history is his eleventh; what follows was not chosen by its labels.
    later = np.zeros(ROWS, bool)
    for block in ctr.blocks:
        clicks = np.flatnonzero(ctr.columns["click"][block])
        if clicks.size and ctr.columns["hist_10"][block.start]:
            later[block.start + clicks[0] + 1 : block.stop] = True
    truth, labels = ctr.truth["click"].astype(np.float64), ctr.columns["click"]
    assert later.mean() > 0.6
    for rows in np.array_split(np.flatnonzero(later)[np.argsort(truth[later])], 10):
        assert abs(labels[rows].sum() - truth[rows].sum()) <= 4 * np.sqrt((truth[rows] * (1 - truth[rows])).sum())


def test_truth_beats_item_rate_user_rate_and_popularity(qb: Twin) -> None:
    users, items, clicks = (qb.columns[name] for name in ("user_id", "item_id", "click"))
    seen, test = qb.place < 0.8, qb.place >= 0.9
    item_rate, user_rate = smoothed_rate(items, clicks, seen, 10), smoothed_rate(users, clicks, seen, 5)
    popularity = np.bincount(items[seen], minlength=items.max() + 1)[items]
    both = np.log(item_rate / (1 - item_rate)) + np.log(user_rate / (1 - user_rate))
    oracle = roc_auc_score(clicks[test], qb.truth["click"][test])
    rivals = {
        name: roc_auc_score(clicks[test], scores[test])
        for name, scores in {"item": item_rate, "user": user_rate, "both": both, "popularity": popularity}.items()
    }
    assert 0.82 <= oracle <= 0.88
    assert rivals["both"] <= oracle - 0.04
    assert max(rivals["item"], rivals["user"]) < rivals["both"]
    assert rivals["popularity"] < 0.65
    assert 0.71 <= grouped_auc(clicks[test], qb.truth["click"][test], users[test]) <= 0.82
    assert grouped_auc(clicks[test], both[test], users[test]) <= 0.70


def test_shuffled_labels_cannot_be_told_apart(twin: Twin) -> None:
    shuffled = np.random.default_rng(0).permutation(twin.columns["click"])
    assert roc_auc_score(shuffled, twin.truth["click"]) == pytest.approx(0.5, abs=0.015)


def test_a_click_brings_back_its_topic_and_warms_to_it() -> None:
    rng = np.random.default_rng(3)
    recipe = recipe_of("qb_video")
    catalogue = twin_model.draw_catalogue(recipe.popularity, 40_000, recipe.item_bias, rng)
    population = twin_model.draw_population(catalogue, recipe.crowds[0], 400, rng)
    rows = simulate(catalogue, population, recipe, 0.0, rng)
    topic = catalogue.topic_N[rows.item_R]
    follows = rows.user_R[1:] == rows.user_R[:-1]
    same = topic[1:] == topic[:-1]
    clicked = rows.click_R[:-1]
    assert same[follows & clicked].mean() > 1.3 * same[follows & ~clicked].mean()
    # What remains of the logit, once every part that does not depend on recent rows is taken off.
    sign = np.array([0.0, -1.0, 1.0])[catalogue.category_N[rows.item_R]]
    steady = population.bias_U[rows.user_R] + catalogue.bias_N[rows.item_R] + 1.8 * rows.match_R
    recent = (rows.logit_R - steady - population.category_taste_U[rows.user_R] * sign)[1:]
    assert recent[follows & same & clicked].mean() > recent[follows & same & ~clicked].mean() + 0.3
    assert recent.min() == pytest.approx(0, abs=1e-9)
    assert recent.max() < 1.6


def reference_history(clicked_items: list[int]) -> list[int]:
    """gen_ctr.py's rule for one user."""
    if len(clicked_items) <= 10:
        return clicked_items[:-1] + [0] * (10 - len(clicked_items[:-1]))
    return clicked_items[:10]


LOGS = st.lists(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=30), min_size=1, max_size=4)


def columns_of(log: list[list[tuple[int, bool]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    users = np.repeat(np.arange(len(log)), [len(rows) for rows in log])
    return users, np.array([item for rows in log for item, _ in rows]), np.array([c for rows in log for _, c in rows])


@given(LOGS)
@settings(deadline=None)
def test_history_is_the_oldest_ten_clicks_and_deletes_the_rows_that_show_them(
    log: list[list[tuple[int, bool]]],
) -> None:
    expected, kept = [], []
    for rows in log:
        expected.append(reference_history([item for item, click in rows if click]))
        kept += [item not in expected[-1] for item, _ in rows]
    history_US, kept_R = history_and_kept(*columns_of(log))
    while len(history_US) < len(log):  # users at the end who have clicked nothing
        history_US = np.vstack([history_US, np.full(10, -1)])
    assert np.where(history_US == -1, 0, history_US).tolist() == expected
    assert kept_R.tolist() == kept


@given(LOGS, st.data())
@settings(deadline=None)
def test_time_line_is_cut_where_exactly_the_wanted_rows_are_left(
    log: list[list[tuple[int, bool]]], data: st.DataObject
) -> None:
    users, items, clicks = columns_of(log)
    available = int(history_and_kept(users, items, clicks)[1].sum())
    wanted = data.draw(st.integers(1, available + 1))
    end = end_of_rows(users, items, clicks, wanted)
    left = history_and_kept(users[:end], items[:end], clicks[:end])[1].sum()
    assert left == min(wanted, available)


def test_history_of_ctr_1m_is_static_padded_at_the_end_and_shown_in_no_row(ctr: Twin) -> None:
    history = np.stack([ctr.columns[f"hist_{k}"] for k in range(1, 11)], axis=1)
    full = 0
    for block in ctr.blocks:
        first = history[block][0]
        assert (history[block] == first).all()
        length = int((first > 0).sum())
        assert (first[:length] > 0).all()
        assert not np.isin(ctr.columns["item_id"][block], first).any()
        if length < 10:
            assert ctr.columns["click"][block].sum() <= 1
        full += length == 10 and block.stop - block.start
    assert full >= 0.9 * ROWS


def test_truth_of_a_damaged_page_is_refused(qb: Twin, tmp_path: Path) -> None:
    content = bytearray(qb.summary.truth.read_bytes())
    content[200] ^= 1
    truth = tmp_path / "damaged.parquet"
    truth.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(truth, page_checksum_verification=True)


def test_failure_leaves_the_files_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.csv"
    path.write_text("precious")

    def fail(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(synthetic, "react", fail)
    with pytest.raises(OSError, match="no space left"):
        write_twin(path, kind="qb_video", rows=1_000, seed=0, progress=False)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("kind", "rows", "seed", "message"),
    [
        ("qb_vidoe", 10, 0, "Did you mean qb_video"),
        ("movielens", 10, 0, "choose one of qb_video, ctr_1m"),
        ("qb_video", 0, 0, "at least 1 row"),
        ("qb_video", 10, -1, "seed of at least 0"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, kind: str, rows: int, seed: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_twin(tmp_path / "log.csv", kind=kind, rows=rows, seed=seed, progress=False)
    assert not list(tmp_path.iterdir())
