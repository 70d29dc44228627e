"""Does an interval hold the truth as often as it says, and does a system that has nothing to learn look like chance?"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from test_baselines import make_table
from test_pipeline import tiny_config

from tenrec_jax.data.synthetic import write_twin
from tenrec_jax.evaluation.baselines import item_rate, item_user_rate, train_counts, user_rate
from tenrec_jax.evaluation.statistics import (
    BinarySample,
    MeanSample,
    bootstrap_binary,
    bootstrap_mean,
    paired_differences,
)
from tenrec_jax.pipeline import Pipeline

USERS, ROWS, TRIALS, RESAMPLES = 200, 8, 1000, 300


@pytest.mark.slow
def test_a_95_percent_interval_holds_the_truth_in_93_to_97_of_100_samples():
    """Users differ in their rates and their scores are shifted, so rows depend; truths are known in closed form."""
    generator = np.random.default_rng(0)
    user = np.repeat(np.arange(USERS), ROWS)
    shift_auc = 0.5 * (1 + math.erf(1 / math.sqrt(2 * (1 + 1)) / math.sqrt(2)))
    truth = {"mean": 0.4, "auc": shift_auc, "log_loss": -(0.4 * math.log(0.3) + 0.6 * math.log(0.7)), "difference": 0.0}
    held = dict.fromkeys(truth, 0)
    for trial in range(TRIALS):
        rate = generator.beta(2, 3, USERS)
        label = generator.random(USERS * ROWS) < rate[user]
        how = {"seed": trial, "resamples": RESAMPLES}
        half = np.tile([0, 1], USERS * ROWS // 2)
        score = half + generator.normal(size=len(half)) + generator.normal(size=USERS)[user]
        probability = 1 / (1 + np.exp(-score))
        other = 1 / (1 + np.exp(-(half + generator.normal(size=len(half)) + generator.normal(size=USERS)[user])))
        samples = (BinarySample(half, each, user, USERS) for each in (probability, other))
        found = {
            "mean": bootstrap_mean(np.bincount(user, label), np.full(USERS, ROWS), **how),
            "auc": bootstrap_binary(half, probability, user, **how).auc,
            "log_loss": bootstrap_binary(label, np.full(len(label), 0.3), user, **how).log_loss,
            "difference": paired_differences(*samples, USERS, **how)["auc"],
        }
        for name, estimate in found.items():
            held[name] += estimate.low <= truth[name] <= estimate.high
    for name, times in held.items():
        assert 0.93 <= times / TRIALS <= 0.97, (name, times / TRIALS)


def test_a_mean_of_users_has_the_interval_of_its_ratio():
    values = np.random.default_rng(1).random(50)
    sample, ones = MeanSample({"x": values, "y": 1 - values}), np.ones(50)
    found = paired_differences(MeanSample({"x": 0 * values, "y": ones}), sample, 50, seed=3, resamples=60)
    expected = bootstrap_mean(values, ones, seed=3, resamples=60)
    assert (found["x"].value, found["x"].low, found["x"].high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )
    assert found["y"].value == pytest.approx(-expected.value)


def test_rates_counted_on_shuffled_labels_are_chance_within_their_interval():
    table = make_table(num_users=60, num_rows=4000)
    labels_RA = np.random.default_rng(1).permutation(table.labels_RA)
    table = dataclasses.replace(table, labels_RA=labels_RA)
    train, test = np.flatnonzero(np.arange(4000) % 5 < 4), np.flatnonzero(np.arange(4000) % 5 == 4)
    counts = train_counts(table, train)
    items, users = item_rate(counts, "click"), user_rate(counts, "click")
    score_R = item_user_rate(items[table.item_R[test]], users[table.user_R[test]], users[0])
    found = bootstrap_binary(labels_RA[test, 0], score_R, table.user_R[test], seed=0, resamples=400)
    for estimate in (found.auc, found.gauc):
        assert estimate.low <= 0.5 <= estimate.high


@pytest.mark.slow
def test_a_run_on_shuffled_labels_is_chance_within_its_interval(tmp_path: Path) -> None:
    write_twin(tmp_path / "log.csv", kind="qb_video", rows=4000, seed=3, progress=False)
    header, *lines = (tmp_path / "log.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines]
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = [",".join([*row[:2], *rows[other][2:6], *row[6:]]) for row, other in zip(rows, order, strict=True)]
    (tmp_path / "shuffled.csv").write_text("\n".join([header, *shuffled]) + "\n")
    config = tiny_config()
    data = dataclasses.replace(config.data, path=str(tmp_path / "shuffled.csv"))
    evaluation = dataclasses.replace(config.evaluation, resamples=400)
    results = Pipeline(dataclasses.replace(config, data=data, evaluation=evaluation), tmp_path / "run").run()
    for metric in ("auc", "gauc"):
        estimate = results["ranking"]["click"][metric]
        assert estimate["low"] <= 0.5 <= estimate["high"], (metric, estimate)
