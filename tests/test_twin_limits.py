"""The limits of what a twin's rows can tell: equal to brute force, and between what a learner has and the true probabilities."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import log_loss

from tenrec_jax.config import RunConfig, default_config
from tenrec_jax.data.protocols import Part
from tenrec_jax.data.twin_model import SHARED_PROPENSITY
from tenrec_jax.errors import UserError
from tenrec_jax.pipeline import Pipeline
from tenrec_jax.run_data import RunData

BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"
ROWS, DRAWS = 40_000, 400_000


@pytest.fixture(scope="module")
def twin_limits() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield __import__("twin_limits")
        sys.modules.pop("twin_limits")


def config(**data: Any) -> RunConfig:
    whole = default_config()
    return dataclasses.replace(whole, data=dataclasses.replace(whole.data, twin_rows=ROWS, **data))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "twin"
    Pipeline(config(), folder).run(["data"])
    return folder


def test_expected_actions_are_those_of_a_weighted_sample_of_users(twin_limits: Any) -> None:
    random, rows = np.random.default_rng(0), 30
    spread_A = np.array([2.5, 1.6, 1.8])
    offset_TA2 = np.array([[-3.0, -2.0], [-4.0, -3.0], [-3.5, -3.0]]) + random.normal(size=(rows, 3, 1))
    label_TA, click_T = random.random((rows, 3)) < 0.2, random.random(rows) < 0.6
    rate_T, scored_T = random.random(rows), np.arange(rows) >= 25
    ours = twin_limits.expected_actions(spread_A, offset_TA2, label_TA, click_T, rate_T, scored_T)

    normal = random.standard_normal((DRAWS, 4))
    drawn = np.sqrt(SHARED_PROPENSITY) * normal[:, :1] + np.sqrt(1 - SHARED_PROPENSITY) * normal[:, 1:]
    drawn *= spread_A
    log_weight, theirs = np.zeros(DRAWS), []
    for row in range(rows):
        if scored_T[row]:
            weight = np.exp(log_weight - log_weight.max())
            without, given = expit(drawn + offset_TA2[row, :, 0]), expit(drawn + offset_TA2[row, :, 1])
            p = rate_T[row] * given + (1 - rate_T[row]) * without
            theirs.append(weight @ p / weight.sum())
        p = expit(drawn + offset_TA2[row, :, int(click_T[row])])
        log_weight += np.log(np.where(label_TA[row], p, 1 - p)).sum(axis=1)
    np.testing.assert_allclose(ours, theirs, rtol=0.02)


def test_what_rows_tell_lies_between_ignorance_and_the_truth(twin_limits: Any, workdir: Path) -> None:
    data = RunData(config(), workdir / "table", 1)
    table, split = data.table, data.split
    train, rows = split.rows(Part.TRAIN), split.rows(Part.TEST)
    planted = twin_limits.plant(config(), table)
    label_r = table.labels_RA[rows, 0]
    truth = log_loss(label_r, expit(planted.click_R[rows]))
    known = log_loss(label_r, twin_limits.known_users(planted, table, train, rows))
    nothing = np.zeros(0, np.int64)
    unknown = log_loss(label_r, twin_limits.known_users(planted, table, nothing, rows))
    assert truth < known < unknown

    expected_rA = twin_limits.known_clicks(planted, table, split, rows)
    actions_rA = table.labels_RA[rows, 1:]
    # Each action comes as often as expected, but for chance.
    for expected, seen in zip(expected_rA.sum(axis=0), actions_rA.sum(axis=0), strict=True):
        assert abs(expected - seen) < 4 * np.sqrt(expected)
    mean = np.broadcast_to(actions_rA[:, 0].mean(), len(rows))
    assert log_loss(actions_rA[:, 0], expected_rA[:, 0]) < 0.9 * log_loss(actions_rA[:, 0], mean)


def test_a_table_that_is_not_the_twin_as_written_is_refused(twin_limits: Any, workdir: Path) -> None:
    table = RunData(config(), workdir / "table", 1).table
    with pytest.raises(UserError, match="keep duplicates"):
        twin_limits.plant(config(twin_seed=1), table)


def test_an_unfinished_run_is_an_error_that_names_the_file(
    twin_limits: Any, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert twin_limits.main(["--run", str(workdir)]) == 2
    assert "eval/test.json is missing" in capsys.readouterr().err


def test_the_parts_of_the_way_are_counted_from_the_best_baseline(twin_limits: Any) -> None:
    def ranking(value: float) -> dict[str, Any]:
        return {"ranking": {"click": {"gauc": {"value": value, "low": value, "high": value}}}}

    baselines = {"popularity": {"retrieval": {}}, "item_rate": ranking(0.6), "user_rate": ranking(0.5)}
    test = ranking(0.7) | {"baselines": baselines, "oracle": ranking(0.8)}
    line = twin_limits._line("click", "gauc", test, ranking(0.75)["ranking"])
    assert line["closed_by_ranker"] == pytest.approx(0.5)
    assert line["closed_by_limit"] == pytest.approx(0.75)
    assert "50%" in twin_limits.text([line])
