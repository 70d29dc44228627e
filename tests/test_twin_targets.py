"""The twin beside Tenrec's published numbers: each number against a second count, and the twins of a size that can hold them."""

from pathlib import Path

import numpy as np
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from tenrec_jax.data.ingest import ingest
from tenrec_jax.data.interactions import Interactions, open_table
from tenrec_jax.data.manifest import read_manifest
from tenrec_jax.data.protocols import make_split
from tenrec_jax.data.stats import table_stats
from tenrec_jax.data.synthetic import write_twin
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.id_model import id_regression
from tenrec_jax.evaluation.twin_targets import Target, twin_targets, uniform_auc


def make(folder: Path, kind: str, rows: int, seed: int = 0) -> tuple[Interactions, Path]:
    write_twin(folder / "log.csv", kind=kind, rows=rows, seed=seed, progress=False)
    ingest([folder / "log.csv"], kind, folder / "table", progress=False)
    return open_table(folder / "table"), folder / "table"


def targets_of(table: Interactions, directory: Path, truth: Path | None) -> dict[str, Target]:
    split = make_split("per_user_order", table)
    stats = table_stats(table, split, duplicates=read_manifest(directory).counts["duplicate_rows"])
    return {target.name: target for target in twin_targets(table, directory, stats, split, truth)}


def read(folder: Path) -> dict[str, np.ndarray]:
    table = pc.read_csv(folder / "log.csv", convert_options=pc.ConvertOptions(null_values=[r"\N"]))
    return {name: table[name].to_numpy() for name in table.column_names if name != "video_category"}


@pytest.mark.parametrize("kind", ["qb_video", "ctr_1m"])
def test_numbers_are_those_that_a_second_program_counts(tmp_path: Path, kind: str) -> None:
    table, directory = make(tmp_path, kind, 20_000)
    found = targets_of(table, directory, tmp_path / "log.truth.parquet")
    log = read(tmp_path)
    user, item, click, like = (log[name] for name in ("user_id", "item_id", "click", "like"))
    pairs = list(zip(user.tolist(), item.tolist(), strict=True))
    assert found["rows that repeat a user and item"].got == pytest.approx(1 - len(set(pairs)) / 20_000)
    assert found["gender = 1"].got == pytest.approx((log["gender"] == 1).mean())
    assert found["age = 2"].got == pytest.approx((log["age"] == 2).mean())
    if kind == "qb_video":
        border = 20_000 * 500_000 // 2_442_299 + 1
        while border < 20_000 and user[border] == user[border - 1]:
            border += 1
        assert found["head: click rate"].got == pytest.approx(click[:border].mean())
        assert found["tail: click rate"].got == pytest.approx(click[border:].mean())
        rates = [click[:border][user[:border] == one].mean() for one in np.unique(user[:border])]
        assert found["head: users' positive rate, p90"].got == pytest.approx(np.quantile(rates, 0.9))
        assert found["head: P(like | click)"].got == pytest.approx(like[:border][click[:border] == 1].mean())
        watched = log["watching_times"][click == 1].mean()
        assert found["watching_times, mean with a click"].got == pytest.approx(watched)
    else:
        lengths = sum((log[f"hist_{k}"] > 0).astype(int) for k in range(1, 11))
        assert found["length of history, mean"].got == pytest.approx(lengths.mean())
        assert found["share of rows with a history of 10"].got == pytest.approx((lengths == 10).mean())
        assert found["watching_times = 1"].got == pytest.approx((log["watching_times"] == 1).mean())
        clicks = np.array([click[user == one].sum() for one in np.unique(user)])
        assert found["clicks per user, left in the log: mean"].got == pytest.approx(clicks.mean())
        shares = np.array([2701660, 1352459, 497505, 221682, 109327, 89790, 30005, 14053, 3939, 2309])
        bounds = [20, 40, 80, 100, 140, 180, 220, 260, 300, np.inf]
        counts = np.diff([(clicks <= bound).sum() for bound in bounds], prepend=0)
        distance = np.abs(counts / counts.sum() - shares / shares.sum()).sum() / 2
        got = found["clicks per user against fig. 2c, total variation"].got
        assert got == pytest.approx(distance, abs=1e-9)


def test_learnability_is_measured_on_the_last_tenth_of_each_user(tmp_path: Path) -> None:
    table, directory = make(tmp_path, "qb_video", 20_000)
    found = targets_of(table, directory, tmp_path / "log.truth.parquet")
    log, truth = read(tmp_path), pq.read_table(tmp_path / "log.truth.parquet")["click"].to_numpy()
    size = np.bincount(log["user_id"])
    place = np.arange(20_000) - (np.cumsum(size) - size)[log["user_id"]]
    test = place >= size[log["user_id"]] * 9 // 10
    train = place < size[log["user_id"]] * 8 // 10
    areas = {name: target.got for name, target in found.items()}
    regression = found["true probabilities: AUC above the regression's"]
    assert regression.got == pytest.approx(roc_auc_score(log["click"][test], truth[test]), abs=1e-9)
    assert regression.target == pytest.approx(areas["regression on ids: AUC"])
    popularity = np.bincount(log["item_id"][train], minlength=log["item_id"].max() + 1)
    on_exposures = roc_auc_score(log["click"][test], popularity[log["item_id"][test]])
    assert areas["popularity alone, on true exposures: AUC"] == pytest.approx(on_exposures, abs=1e-9)
    clicked = popularity[log["item_id"][test & (log["click"] == 1)]]
    labels = np.repeat([1, 0], [len(clicked), len(popularity) - 1])
    expected = roc_auc_score(labels, np.concatenate([clicked, popularity[1:]]))
    got = areas["popularity alone, clicked rows against uniform items: AUC"]
    assert got == pytest.approx(expected, abs=1e-9)


def test_uniform_auc_is_undefined_without_positives() -> None:
    assert np.isnan(uniform_auc(np.array([1, 2]), np.array([], int)))


def test_regression_on_ids_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    user, item = rng.integers(1, 9, 800), rng.integers(1, 13, 800)
    click = (rng.random(800) < 0.15 + 0.05 * (user % 3) + 0.04 * item).astype(int)
    train = rng.random(800) < 0.8
    one_hot = np.concatenate([np.eye(9)[user], np.eye(13)[item]], axis=1)
    theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=2_000).fit(one_hot[train], click[train])
    ours = id_regression(user, item, click, train, sweeps=200)
    assert ours == pytest.approx(theirs.decision_function(one_hot), abs=1e-3)


def test_what_a_size_cannot_hold_is_not_judged(tmp_path: Path) -> None:
    table, directory = make(tmp_path, "ctr_1m", 2_000)
    found = targets_of(table, directory, None)
    gini = found["items: Gini coefficient"]
    assert gini.met is None
    assert gini.from_rows == 100_000_000
    assert "contradicts" in gini.note
    assert found["unseen rows of the test part"].met is None
    assert not any(name.startswith("true probabilities") for name in found)
    assert all(target.note for target in found.values() if target.met is None)


def test_other_tables_splits_and_truths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("1 5 6 7\n")
    ingest([tmp_path / "log.txt"], "sequences", tmp_path / "clicks", progress=False)
    with pytest.raises(UserError, match="no twin of sequences"):
        targets_of(open_table(tmp_path / "clicks"), tmp_path / "clicks", None)
    table, directory = make(tmp_path, "qb_video", 500)
    with pytest.raises(UserError, match="There is no"):
        targets_of(table, directory, tmp_path / "none.parquet")
    write_twin(tmp_path / "other.csv", kind="qb_video", rows=400, seed=0, progress=False)
    with pytest.raises(UserError, match="400 rows, the table 500"):
        targets_of(table, directory, tmp_path / "other.truth.parquet")
    split = make_split("leave_one_out", table)
    with pytest.raises(UserError, match="per_user_order"):
        twin_targets(table, directory, table_stats(table, split, duplicates=0), split)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["qb_video", "ctr_1m"])
def test_twins_of_a_million_rows_meet_every_target_that_they_can(tmp_path: Path, kind: str, seed: int) -> None:
    table, directory = make(tmp_path, kind, 1_000_000, seed)
    found = targets_of(table, directory, tmp_path / "log.truth.parquet")
    assert [name for name, target in found.items() if target.met is False] == []
    unjudged = {name for name, target in found.items() if target.met is None}
    assert (not unjudged) if kind == "qb_video" else "regression on ids: GAUC" in unjudged


@pytest.mark.slow
def test_a_twin_of_ten_million_rows_has_tenrecs_share_of_unseen_items(tmp_path: Path) -> None:
    table, directory = make(tmp_path, "ctr_1m", 10_000_000)
    found = targets_of(table, directory, tmp_path / "log.truth.parquet")
    assert found["unseen rows of the test part"].target == pytest.approx(0.049)
    assert found["unseen rows of the validation part"].met
    assert found["unseen rows of the test part"].met
