"""Runs that differ in their seed alone: the mean of their metrics, and its spread."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from tenrec_jax import __main__
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.seeds import over_seeds

ESTIMATE = {"low": 0.0, "high": 1.0}
NDCG = {0: 0.30, 1: 0.34, 2: 0.29}


def write_run(folder: Path, seed: int, **changes: Any) -> Path:
    """What a finished run leaves, as far as it matters here."""
    retrieval = {"ndcg@10": {"value": NDCG[seed], **ESTIMATE}}
    ranking = {"click": {"auc": {"value": 0.7 + seed / 100, **ESTIMATE}, "gauc": {"value": None}, "rows": 9}}
    results = {
        "protocol": "leave_one_out",
        "data_sha256": "a",
        "split_sha256": "b",
        "seed": seed,
        "retrieval": retrieval,
        "ranking": ranking,
        "lists": {"k": 10},
        "baselines": {"popularity": {"retrieval": {"ndcg@10": {"value": 0.1, **ESTIMATE}}}},
    }
    config = {"name": f"seed{seed}", "seed": seed, "retrieval": {"train": {"epochs": 5}}} | changes
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "test.json").write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / f"run{seed}", seed) for seed in NDCG]


def test_mean_and_deviation_of_every_metric_that_is_defined(runs: list[Path]) -> None:
    found = {(spread.scorer, spread.metric): spread for spread in over_seeds(runs)}
    assert list(found) == [("model", "retrieval ndcg@10"), ("model", "click auc"), ("popularity", "retrieval ndcg@10")]
    ndcg = found["model", "retrieval ndcg@10"]
    assert ndcg.values == tuple(NDCG.values())
    assert ndcg.mean == pytest.approx(statistics.mean(NDCG.values()))
    assert ndcg.deviation == pytest.approx(statistics.stdev(NDCG.values()))
    assert found["popularity", "retrieval ndcg@10"].deviation == pytest.approx(0.0, abs=1e-12)


def test_both_stages_stand_beside_retrieval(runs: list[Path]) -> None:
    for run, value in zip(runs, (0.4, 0.5, 0.9), strict=True):
        path = run / "eval" / "test.json"
        both = {"both_stages": {"retrieval": {"ndcg@10": {"value": value, **ESTIMATE}}}}
        path.write_text(json.dumps(json.loads(path.read_text()) | both))
    found = {spread.scorer: spread for spread in over_seeds(runs) if spread.metric == "retrieval ndcg@10"}
    assert found["both_stages"].values == (0.4, 0.5, 0.9)
    assert found["both_stages"].mean == pytest.approx(0.6)
    assert found["model"].values == tuple(NDCG.values())


def test_the_command_prints_a_table_or_json(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(run) for run in runs]
    assert __main__.main(["seeds", *names]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["metric", "mean", "deviation", "run0", "run1", "run2"]
    assert printed[1].split() == ["model", "retrieval", "ndcg@10", "0.3100", "0.0265", "0.3000", "0.3400", "0.2900"]
    assert __main__.main(["seeds", *names, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["values"] == list(NDCG.values())


def test_runs_that_differ_in_more_than_the_seed_are_refused(runs: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", 1, retrieval={"train": {"epochs": 6}})
    with pytest.raises(UserError, match=r"retrieval\.train\.epochs: 5 in .*run0, 6 in .*other"):
        over_seeds([runs[0], other])
    with pytest.raises(UserError, match=r"seeds are \[1, 1\]"):
        over_seeds([runs[1], write_run(tmp_path / "again", 1)])
    with pytest.raises(UserError, match="at least two"):
        over_seeds(runs[:1])
    with pytest.raises(UserError, match="is not there: give the workdir of a finished run"):
        over_seeds([runs[0], tmp_path / "nothing"])
