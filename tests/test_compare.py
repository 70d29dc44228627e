"""Comparing two runs: intervals against a plain bootstrap that copies users, and what is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from test_baselines import make_table

from tenrec_jax.__main__ import main
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation import statistics
from tenrec_jax.evaluation.compare import FILES, compare, text
from tenrec_jax.evaluation.evaluator import TargetRanks
from tenrec_jax.evaluation.places import Places
from tenrec_jax.evaluation.predictions import Origin, read_predictions, write_predictions
from tenrec_jax.evaluation.scorers import MODEL, Scorer

ACTIONS = ("click", "like")
ORIGIN = Origin("test", "per_user_order", "data", "split", True, 29, ACTIONS)
TABLE = make_table(actions=ACTIONS)
ROWS = np.sort(np.random.default_rng(1).choice(400, 200, replace=False))
CLICKED = ROWS[TABLE.labels_RA[ROWS, 0] == 1]


def write_run(folder, *, noise, first, targets=CLICKED, origin=ORIGIN, ranking=True):
    """Predictions that are the labels under noise; targets stand in the places `first`."""
    probability_RA = 1 / (1 + np.exp(-2.0 * (TABLE.labels_RA - 0.5) - noise)).astype(np.float32)
    lists = np.zeros((0, 0), np.int32)
    ranks = TargetRanks(
        targets,
        TABLE.user_R[targets],
        TABLE.item_R[targets],
        Places(first, first),
        np.full(len(first), TABLE.num_items),
        lists,
    )
    scorer = Scorer(MODEL, ranks, (lambda rows: probability_RA[rows]) if ranking else None)
    write_predictions(folder / FILES["test"], origin, TABLE, ROWS, [scorer])
    return folder


@pytest.fixture
def runs(tmp_path):
    generator = np.random.default_rng(4)
    noise = generator.normal(size=(2, 400, 2))
    first = generator.integers(1, 25, (2, len(CLICKED))).astype(float)
    return [
        write_run(tmp_path / name, noise=(3 - 2 * place) * noise[place], first=first[place])
        for place, name in enumerate(("a", "b"))
    ]


def test_intervals_of_differences_equal_those_of_a_bootstrap_that_copies_users(runs):
    found = {row.metric: row for row in compare([runs[0]], [runs[1]], seed=5, resamples=80).metrics}
    scores, places = [], []
    for run in runs:
        predictions = read_predictions(run / FILES["test"])
        scores.append(predictions.score_RA[:, 0])
        places.append(predictions.places.first)
    users = np.unique(TABLE.user_R[ROWS])
    differences = {"click auc": [], "retrieval hit@5": []}
    for counts in np.concatenate(list(statistics.resample_counts(len(users), seed=5, resamples=80))).astype(int):
        copies = counts[np.searchsorted(users, TABLE.user_R[ROWS])]
        aucs = [roc_auc_score(np.repeat(TABLE.labels_RA[ROWS, 0], copies), np.repeat(s, copies)) for s in scores]
        differences["click auc"].append(aucs[1] - aucs[0])
    users = np.unique(TABLE.user_R[CLICKED])
    for counts in np.concatenate(list(statistics.resample_counts(len(users), seed=5, resamples=80))).astype(int):
        drawn = np.repeat(users, counts)
        hit = [np.mean([p[TABLE.user_R[CLICKED] == user].min() <= 5 for user in drawn]) for p in places]
        differences["retrieval hit@5"].append(hit[1] - hit[0])
    for metric, values in differences.items():
        values = sorted(values)
        expected = values[math.ceil(0.025 * 80) - 1], values[math.ceil(0.975 * 80) - 1]
        difference = found[metric].difference
        assert (difference.low, difference.high) == pytest.approx(expected, abs=1e-9), metric
        assert difference.value == pytest.approx(found[metric].second - found[metric].first)
    assert found["click auc"].is_real
    assert found["click auc"].difference.value > 0


def test_a_side_of_several_runs_has_the_mean_of_their_metrics_in_every_draw(runs, tmp_path, capsys):
    noise = np.random.default_rng(5).normal(size=(400, 2))
    third = write_run(tmp_path / "c", noise=noise, first=np.full(len(CLICKED), 3.0))
    options = {"seed": 5, "resamples": 40}
    alone = [{row.metric: row for row in compare([runs[0]], [run], **options).metrics} for run in (runs[1], third)]
    both = {row.metric: row for row in compare([runs[0]], [runs[1], third], **options).metrics}
    for name, row in both.items():
        assert row.second == pytest.approx(np.mean([one[name].second for one in alone]))
        assert row.difference.value == pytest.approx(np.mean([one[name].difference.value for one in alone]))
    # Of one run twice the draws are those of that run.
    copy = write_run(tmp_path / "d", noise=noise, first=np.full(len(CLICKED), 3.0))
    twice = {row.metric: row for row in compare([runs[0]], [third, copy], **options).metrics}
    for name, row in twice.items():
        expected = alone[1][name].difference
        assert (row.difference.low, row.difference.high) == pytest.approx((expected.low, expected.high))
    assert main(["compare", str(runs[0]), f"{runs[1]},{third}"]) == 0
    assert "Means over 1 and 2 runs" in capsys.readouterr().out
    assert main(["compare", str(runs[0]), f"{third},{third}"]) == 2
    assert "named twice" in capsys.readouterr().err


def test_a_run_does_not_differ_from_itself(runs):
    found = compare([runs[0]], [runs[0]], resamples=20)
    assert not any(row.is_real for row in found.metrics)
    assert {row.difference.value for row in found.metrics} == {0.0}
    assert "0 of 28 differences are real" in text(found)
    assert "of 28, about 1 would be called real by chance" in text(found)


def test_runs_of_other_samples_of_users_are_compared_on_those_that_both_have(tmp_path):
    few = CLICKED[TABLE.user_R[CLICKED] > 5]
    noise = np.zeros((400, 2))
    one = write_run(tmp_path / "a", noise=noise, first=np.ones(len(CLICKED)), ranking=False)
    two = write_run(tmp_path / "b", noise=noise, first=np.full(len(few), 30.0), targets=few)
    found = compare([one], [two], resamples=20)
    assert found.users == {"retrieval": len(np.unique(TABLE.user_R[few]))}
    assert found.left_out == ("ranking: not all runs have a ranker",)
    values = {row.metric: (row.first, row.second, row.is_real) for row in found.metrics}
    assert values["retrieval recall@20"] == (1.0, 0.0, True)


@pytest.mark.parametrize("key", ["protocol", "data_sha256", "split_sha256", "exclude_seen"])
def test_runs_of_other_rows_are_refused_unless_forced(runs, tmp_path, key, capsys):
    value = not ORIGIN.exclude_seen if key == "exclude_seen" else "other"
    origin = dataclasses.replace(ORIGIN, **{key: value})
    other = write_run(tmp_path / "c", noise=np.zeros((400, 2)), first=np.ones(len(CLICKED)), origin=origin)
    with pytest.raises(UserError, match=f"{key}: .* in .*a, {value} in .*c"):
        compare([runs[0]], [other])
    assert main(["compare", str(runs[0]), str(other)]) == 2
    assert main(["compare", str(runs[0]), str(other), "--force"]) == 0
    printed = capsys.readouterr().out
    assert "WARNING" in printed
    assert key in printed
    assert "real" not in printed


def test_the_command_prints_a_table_or_json(runs, capsys):
    command = ["compare", *map(str, runs)]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines()[3:-4])) <= 100
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    real = [row["metric"] for row in found["metrics"] if row["is_real"]]
    assert "click auc" in real
    assert sum(line.endswith("real") for line in table.splitlines()) == len(real)
    assert main(["compare", str(runs[0]), str(runs[0] / "none")]) == 2
    assert "is missing" in capsys.readouterr().err
