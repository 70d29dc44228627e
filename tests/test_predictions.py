"""Files of predictions, read back by pyarrow alone and by the reader; lists of items against counting by hand."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_baselines import make_table

from tenrec_jax.errors import UserError
from tenrec_jax.evaluation import metrics, predictions
from tenrec_jax.evaluation.evaluator import TargetRanks
from tenrec_jax.evaluation.places import Places
from tenrec_jax.evaluation.predictions import Origin, read_predictions, write_predictions, write_recommendations
from tenrec_jax.evaluation.scorers import MODEL, Scorer

ACTIONS = ("click", "like")
ORIGIN = Origin("test", "per_user_order", "data", "split", True, 29, ACTIONS)


@pytest.fixture
def table():
    return make_table(actions=ACTIONS)


@pytest.fixture
def rows():
    return np.sort(np.random.default_rng(1).choice(400, 90, replace=False))


@pytest.fixture
def scorers(table, rows):
    """A model and a baseline; some targets tie, one has no place."""
    generator = np.random.default_rng(2)
    target = rows[table.labels_RA[rows, 0] == 1][1:]
    first = generator.integers(1, 20, len(target)).astype(float)
    last = first + generator.integers(0, 3, len(target))
    first[3] = last[3] = math.inf
    lists_UK = np.array([[3, 1], [2, 0]])
    ranks = TargetRanks(
        target,
        table.user_R[target],
        table.item_R[target],
        Places(first, last),
        np.full(len(first), table.num_items),
        lists_UK,
    )
    score_RA = generator.random((400, 2)).astype(np.float32)
    return [Scorer(MODEL, ranks, lambda rows: score_RA[rows]), Scorer("other", ranks, None)]


def test_columns_are_those_of_the_log_and_the_scorers(table, rows, scorers, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "_BLOCK", 17)
    write_predictions(tmp_path / "p.parquet", ORIGIN, table, rows, scorers)
    found = pq.read_table(tmp_path / "p.parquet").to_pydict()
    assert found["row"] == rows.tolist()
    assert found["user"] == table.users.raw_id[table.user_R[rows]].tolist()
    assert found["item"] == table.items.raw_id[table.item_R[rows]].tolist()
    for column, action in enumerate(ACTIONS):
        assert found[action] == table.labels_RA[rows, column].tolist()
        assert found[f"score_{action}"] == scorers[0].score(rows)[:, column].tolist()
    ranks = dict(zip(scorers[0].ranks.row.tolist(), zip(*scorers[0].ranks.places, strict=True), strict=True))
    for place, row in enumerate(rows.tolist()):
        first, last = ranks.get(row, (None, None))
        assert found["rank"][place] == found["other_rank"][place] == first
        assert found["tied"][place] == (None if first is None else 0 if first == math.inf else last - first)
    assert "other_score_click" not in found
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


def test_what_is_read_back_is_what_was_written(table, rows, scorers, tmp_path):
    write_predictions(tmp_path / "p.parquet", ORIGIN, table, rows, scorers)
    found, ranks = read_predictions(tmp_path / "p.parquet"), scorers[0].ranks
    assert found.origin == ORIGIN
    np.testing.assert_array_equal(found.row[found.ranked], ranks.row)
    np.testing.assert_array_equal(found.places, ranks.places)
    np.testing.assert_array_equal(found.labels_RA, table.labels_RA[rows])
    np.testing.assert_array_equal(found.score_RA, scorers[0].score(rows))
    write_predictions(tmp_path / "q.parquet", ORIGIN, table, rows, scorers[1:])
    with pytest.raises(UserError, match="no predictions of a model"):
        read_predictions(tmp_path / "q.parquet")


def test_recommendations_are_lists_of_raw_ids(table, scorers, tmp_path):
    write_recommendations(tmp_path / "r.parquet", ORIGIN, table, np.array([4, 9]), scorers[0].ranks)
    raw = table.items.raw_id
    assert pq.read_table(tmp_path / "r.parquet").to_pydict() == {
        "user": table.users.raw_id[[4, 9]].tolist(),
        "items": [[raw[3], raw[1]], [raw[2]]],
    }


def test_files_that_hold_no_predictions_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"p\.parquet is missing"):
        read_predictions(tmp_path / "p.parquet")
    pq.write_table(pa.table({"user": [1]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="no predictions of this project"):
        read_predictions(tmp_path / "p.parquet")


def test_coverage_novelty_and_gini_of_lists_equal_counting_by_hand():
    lists = np.array([[1, 2, 3], [1, 2, 0], [1, 4, 2]])
    exposures = np.array([0, 7, 0, 1, 3, 4])  # of 5 items, 15 rows
    assert metrics.coverage(lists, 5) == 4 / 5
    bits = {item: -math.log2((exposures[item] + 1) / (15 + 5)) for item in range(1, 6)}
    listed = [item for line in lists.tolist() for item in line if item]
    assert metrics.novelty(lists, exposures) == pytest.approx(sum(bits[item] for item in listed) / len(listed))
    times = [listed.count(item) for item in range(1, 6)]
    differences = [abs(a - b) for a in times for b in times]
    assert metrics.gini(lists, 5) == pytest.approx(np.mean(differences) / (2 * np.mean(times)))
    assert metrics.gini(np.arange(1, 6)[None], 5) == pytest.approx(0)
    assert metrics.gini(np.ones((4, 1), int), 1000) == pytest.approx(0.999)
    nothing = np.zeros((2, 3), int)
    assert metrics.coverage(nothing, 5) == 0
    assert math.isnan(metrics.novelty(nothing, exposures))
    assert math.isnan(metrics.gini(nothing, 5))
    with pytest.raises(ValueError, match=r"catalogue has 1\.\.3"):
        metrics.coverage(lists, 3)
