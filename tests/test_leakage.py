"""The leakage report: every number against scikit-learn or plain Python, planted leaks found, clean columns left alone."""

import csv
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tenrec_jax.data import leakage
from tenrec_jax.data.columns import FOLDS, PRIOR_STRENGTH, count_values, folds_of_users, weighted_auc
from tenrec_jax.data.ingest import IngestOptions, ingest
from tenrec_jax.data.interactions import Interactions, open_table, read_events
from tenrec_jax.data.leakage import Leakage, find_leaks
from tenrec_jax.data.schema import KINDS

VIDEO = KINDS["qb_video"].header


def write_table(folder: Path, kind: str, rows: dict[str, np.ndarray]) -> tuple[Interactions, Path]:
    """A table of these columns; those of the kind that are not given are 0."""
    header, size = KINDS[kind].header, len(rows["user_id"])
    with (folder / "log.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(zip(*(rows.get(name, np.zeros(size, int)).tolist() for name in header), strict=True))
    ingest([folder / "log.csv"], kind, folder / "table", progress=False)
    return open_table(folder / "table"), folder / "table"


def random_rows(rng: np.random.Generator, size: int = 6_000) -> dict[str, np.ndarray]:
    user = np.sort(rng.integers(1, 121, size))
    item = rng.integers(1, 301, size)
    click = (rng.random(size) < 0.2 + 0.4 * (item % 3 == 0)).astype(int)
    return {
        "user_id": user,
        "item_id": item,
        "click": click,
        "video_category": item % 2,
        "watching_times": rng.integers(0, 4, size),
        "gender": user % 3,
        "age": user % 8,
    }


def leaks_of(folder: Path, kind: str, rows: dict[str, np.ndarray], alarm: float = 0.8) -> Leakage:
    table, directory = write_table(folder, kind, rows)
    return find_leaks(table, directory, alarm=alarm)


def test_weighted_auc_is_that_of_the_rows_it_counts() -> None:
    rng = np.random.default_rng(0)
    score, negatives, positives = np.round(rng.normal(size=40), 1), rng.integers(0, 5, 40), rng.integers(0, 5, 40)
    labels = np.concatenate([np.repeat([0, 1], [n, p]) for n, p in zip(negatives, positives, strict=True)])
    scores = np.repeat(score, negatives + positives)
    assert weighted_auc(score, negatives, positives) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert np.isnan(weighted_auc(score, negatives, np.zeros(40, int)))


def test_rate_of_a_value_is_taken_from_the_other_folds(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = random_rows(rng)
    table, _ = write_table(tmp_path, "qb_video", rows)
    item, click, fold = table.item_R, table.labels_RA[:, 0], folds_of_users(table.user_R)
    assert set(fold) == set(range(FOLDS))
    halves = iter([(slice(0, 2_500), item[:2_500]), (slice(2_500, 6_000), item[2_500:])])
    found = count_values(halves, table).by_rate()
    total = 0.0
    for here in range(FOLDS):
        inside, outside = fold == here, fold != here
        mean = click[outside].mean()
        shown = np.bincount(item[outside], minlength=item.max() + 1)
        clicked = np.bincount(item[outside], click[outside], minlength=item.max() + 1)
        rate = (clicked + PRIOR_STRENGTH * mean) / (shown + PRIOR_STRENGTH)
        total += roc_auc_score(click[inside], rate[item[inside]]) * inside.sum()
    assert found == pytest.approx(total / len(item), abs=1e-12)


def test_clean_columns_are_not_flagged_and_post_exposure_always_is(tmp_path: Path) -> None:
    found = leaks_of(tmp_path, "qb_video", random_rows(np.random.default_rng(2)))
    by_name = {column.name: column for column in found.columns}
    assert found.flagged == ("watching_times",)
    assert by_name["watching_times"].auc < 0.55
    assert "after the exposure" in by_name["watching_times"].reason
    assert 0.65 < by_name["item_id"].auc < 0.8
    assert by_name["gender"].auc < 0.55
    assert by_name["user_id"].auc < 0.6


def test_planted_column_that_knows_the_label_is_flagged(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = random_rows(rng)
    rows["age"] = np.where(rng.random(len(rows["click"])) < 0.9, 1 + 3 * rows["click"], rng.integers(1, 8, 6_000))
    found = leaks_of(tmp_path, "qb_video", rows)
    assert set(found.flagged) == {"age", "watching_times"}
    assert next(column for column in found.columns if column.name == "age").auc > 0.9


def test_alarm_decides_what_is_flagged(tmp_path: Path) -> None:
    rows = random_rows(np.random.default_rng(4))
    assert "item_id" not in leaks_of(tmp_path, "qb_video", rows, alarm=0.8).flagged
    table, directory = open_table(tmp_path / "table"), tmp_path / "table"
    assert "item_id" in find_leaks(table, directory, alarm=0.6).flagged


def test_watching_times_is_read_by_value_as_scikit_learn_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = random_rows(rng)
    rows["watching_times"] = rng.poisson(0.6 + 1.4 * rows["click"])
    found = next(c for c in leaks_of(tmp_path, "qb_video", rows).columns if c.name == "watching_times")
    assert found.reading == "value"
    assert found.auc == pytest.approx(roc_auc_score(rows["click"], rows["watching_times"]), abs=1e-12)


def test_positions_in_the_block_are_measured(tmp_path: Path) -> None:
    rows = random_rows(np.random.default_rng(6))
    user = rows["user_id"]
    first = np.searchsorted(user, user)
    place = np.arange(len(user)) - first
    rows["click"] = (place >= 25).astype(int)
    found = {column.name: column for column in leaks_of(tmp_path, "qb_video", rows).columns}
    assert found["position in the user's block"].auc == pytest.approx(1)
    assert found["position in the user's block"].flagged
    to_end = np.searchsorted(user, user, "right") - 1 - np.arange(len(user))
    by_value = roc_auc_score(rows["click"], to_end)
    assert found["rows to the end of the user's block"].auc >= max(by_value, 1 - by_value) - 1e-12


def test_a_log_of_clicks_alone_has_no_areas_and_no_alarm(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("1 5 6 7\n2 5 8\n")
    ingest([tmp_path / "log.txt"], "sequences", tmp_path / "table", progress=False)
    found = find_leaks(open_table(tmp_path / "table"), tmp_path / "table")
    assert found.flagged == ()
    assert all(np.isnan(column.auc) for column in found.columns)
    assert found.history is None
    assert found.marginals == ()


def test_marginals_are_shares_of_the_rows_with_missing_named(tmp_path: Path) -> None:
    lines = [
        ",".join(VIDEO),
        r"1,1,0,0,0,0,\N,3,1,2",
        "1,2,1,0,0,0,1,0,1,2",
        "1,3,0,0,0,0,1,0,1,2",
        "2,4,1,0,0,0,0,0,0,0",
    ]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    ingest([tmp_path / "log.csv"], "qb_video", tmp_path / "table", progress=False)
    found = find_leaks(open_table(tmp_path / "table"), tmp_path / "table")
    shares = {marginal.column: marginal.shares for marginal in found.marginals}
    assert shares["video_category"] == {"missing": 0.25, "0": 0.25, "1": 0.5}
    assert shares["gender"] == {"0": 0.25, "1": 0.75}
    assert shares["watching_times"] == {"0": 0.75, "3": 0.25}


def history_rows(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Histories with everything that can be wrong: items of the row itself, of later and of earlier clicks, of no click."""
    rows = random_rows(rng, 800)
    rows |= {f"hist_{k}": np.where(rng.random(800) < 0.3, rng.integers(1, 400, 800), 0) for k in range(1, 11)}
    quiet = rows["user_id"] % 4 == 0
    for k in range(1, 11):
        rows[f"hist_{k}"][quiet] = rows["user_id"][quiet] if k == 1 else 0
    return rows


def test_history_is_checked_against_each_users_own_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakage, "HISTORY_BLOCK_ROWS", 90)
    rows = history_rows(np.random.default_rng(7))
    found = leaks_of(tmp_path, "ctr_1m", rows).history
    target = future = entries = logged = 0
    by_user: dict[int, list[int]] = {}
    for row, user in enumerate(rows["user_id"].tolist()):
        by_user.setdefault(user, []).append(row)
    lengths = np.zeros(800, int)
    for row, user in enumerate(rows["user_id"].tolist()):
        history = [int(rows[f"hist_{k}"][row]) for k in range(1, 11)]
        filled = [item for item in history if item]
        lengths[row] = len(filled)
        target += int(rows["item_id"][row]) in filled
        clicks = {
            item: [r for r in by_user[user] if rows["item_id"][r] == item and rows["click"][r]] for item in filled
        }
        entries += len(filled)
        logged += sum(bool(clicks[item]) for item in filled)
        future += any(clicks[item] and clicks[item][0] > row for item in filled)
    histories = {
        user: [tuple(int(rows[f"hist_{k}"][row]) for k in range(1, 11)) for row in own] for user, own in by_user.items()
    }
    assert found is not None
    assert found.target_in_history == pytest.approx(target / 800)
    assert found.future == pytest.approx(future / 800)
    assert found.logged == pytest.approx(logged / entries)
    assert found.static_users == pytest.approx(np.mean([len(set(own)) == 1 for own in histories.values()]))
    assert found.filled_first_rows == pytest.approx(np.mean([any(own[0]) for own in histories.values()]))
    assert found.lengths == pytest.approx({str(n): (lengths == n).mean() for n in np.unique(lengths)})


def test_events_come_in_row_order_whatever_the_batches(tmp_path: Path) -> None:
    rows = random_rows(np.random.default_rng(8))
    table, directory = write_table(tmp_path, "qb_video", rows)
    batches = list(read_events(directory, ["watching_times"]))
    together = np.concatenate([batch.column("watching_times").to_numpy() for batch in batches])
    assert (together == rows["watching_times"]).all()
    slices = [slice(0, 10), slice(10, 4_000), slice(4_000, 6_000)]
    cut = [part.column("watching_times").to_numpy() for _, part in leakage._aligned(iter(batches), slices)]
    assert [len(part) for part in cut] == [10, 3_990, 2_000]
    assert (np.concatenate(cut) == together).all()
    assert table.num_rows == 6_000


def test_text_columns_and_missing_values_are_counted(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("u,v,c,g\na,x,1,news\na,y,0,\na,z,1,news\nb,x,0,sport\nb,y,0,sport\nb,z,0,news\n")
    mapping = {"user": "u", "item": "v", "click": "c", "category": "g"}
    ingest([tmp_path / "log.csv"], "custom", tmp_path / "table", IngestOptions(columns=mapping), progress=False)
    found = find_leaks(open_table(tmp_path / "table"), tmp_path / "table")
    assert found.marginals[0].shares == pytest.approx({"missing": 1 / 6, "news": 0.5, "sport": 1 / 3})
    assert [column.name for column in found.columns[:3]] == ["u", "v", "g"]
