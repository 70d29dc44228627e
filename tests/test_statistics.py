"""Intervals against a plain bootstrap that copies rows, against known truths in simulation, and at the edges."""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from tenrec_jax.errors import UserError
from tenrec_jax.evaluation import metrics, statistics
from tenrec_jax.evaluation.statistics import Estimate, bootstrap_binary, bootstrap_mean

RESAMPLES = 60


@pytest.fixture(scope="module")
def sample():
    """900 rows of 40 users with ids out of order, tied scores, and users that have one label only."""
    generator = np.random.default_rng(5)
    user = generator.choice(generator.permutation(10_000)[:40], 900)
    scores = generator.integers(1, 20, 900) / 20
    labels = (generator.random(900) < scores * (user % 5 != 0)).astype(np.int8)
    return labels, scores, user


def order_statistics(values):
    defined = sorted(value for value in values if not math.isnan(value))
    return defined[math.ceil(0.025 * len(defined)) - 1], defined[math.ceil(0.975 * len(defined)) - 1]


def copied_samples(labels, scores, user, seed):
    """The same draws of users, made the plain way: the rows of a user drawn twice appear twice."""
    ids = np.unique(user)
    blocks = statistics.resample_counts(len(ids), seed=seed, resamples=RESAMPLES)
    for counts in np.concatenate(list(blocks)).astype(int):
        copies = counts[np.searchsorted(ids, user)]
        # Copies of one user are told apart, so that each is a user of the resample.
        copy = np.concatenate([np.arange(number) for number in copies])
        yield np.repeat(labels, copies), np.repeat(scores, copies), np.repeat(user, copies) * 100 + copy


def test_every_interval_equals_that_of_a_bootstrap_that_copies_rows(sample):
    labels, scores, user = sample
    fast = bootstrap_binary(labels, scores, user, seed=11, resamples=RESAMPLES)
    edges = np.sort(scores)[np.arange(1, 15) * len(scores) // 15]
    slow = {"auc": [], "gauc": [], "log_loss": [], "ece": [], "pcoc": []}
    for y, p, group in copied_samples(labels, scores, user, seed=11):
        slow["auc"].append(roc_auc_score(y, p))
        slow["gauc"].append(metrics.grouped_auc(y, p, groups=group).value)
        slow["log_loss"].append(sklearn_log_loss(y, p))
        number = np.searchsorted(edges, p, side="right")
        gaps = [abs((p[number == b] - y[number == b]).sum()) for b in range(15)]
        slow["ece"].append(sum(gaps) / len(y))
        slow["pcoc"].append(p.mean() / y.mean())
    for name, values in slow.items():
        estimate = getattr(fast, name)
        assert (estimate.low, estimate.high) == pytest.approx(order_statistics(values), abs=1e-9), name


def test_values_are_the_metrics_of_the_sample(sample):
    labels, scores, user = sample
    result = bootstrap_binary(labels, scores, user, seed=0, resamples=5)
    grouped = metrics.grouped_auc(labels, scores, groups=user)
    assert result.auc.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert (result.gauc.value, result.gauc_coverage) == (grouped.value, grouped.coverage)
    assert result.log_loss.value == pytest.approx(sklearn_log_loss(labels, scores), abs=1e-12)
    assert result.ece.value == metrics.calibration(labels, scores).ece
    assert result.pcoc.value == metrics.calibration(labels, scores).pcoc
    assert (result.rows, result.users) == (900, 40)
    assert result.gauc_coverage < 1


def test_the_seed_decides_the_interval_and_the_order_of_rows_does_not(sample):
    labels, scores, user = sample
    result = bootstrap_binary(labels, scores, user, seed=3, resamples=RESAMPLES)
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = bootstrap_binary(labels[order], scores[order], user[order], seed=3, resamples=RESAMPLES)
    for name in ("auc", "gauc", "log_loss", "ece", "pcoc"):
        one, other = getattr(result, name), getattr(shuffled, name)
        assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high), abs=1e-12)
    assert bootstrap_binary(labels, scores, user, seed=4, resamples=RESAMPLES).auc.low != result.auc.low


def test_resamples_do_not_depend_on_the_block_size(sample, monkeypatch):
    whole = np.concatenate(list(statistics.resample_counts(40, seed=1, resamples=50)))
    result = bootstrap_binary(*sample, seed=1, resamples=50)
    monkeypatch.setattr(statistics, "_BLOCK_BYTES", 40 * 8 * 7)
    blocks = list(statistics.resample_counts(40, seed=1, resamples=50))
    assert [len(block) for block in blocks] == [7] * 7 + [1]
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    again = bootstrap_binary(*sample, seed=1, resamples=50)
    assert (again.auc, again.gauc_coverage) == (result.auc, result.gauc_coverage)
    assert (again.log_loss.low, again.log_loss.high) == pytest.approx((result.log_loss.low, result.log_loss.high))


def test_multiplicities_are_multinomial():
    counts = np.concatenate(list(statistics.resample_counts(20, seed=0, resamples=20_000)))
    np.testing.assert_array_equal(counts.sum(axis=1), 20)
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.05)
    np.testing.assert_allclose(counts.var(axis=0), 1 - 1 / 20, atol=0.08)


def test_mean_equals_a_bootstrap_that_copies_users():
    generator = np.random.default_rng(2)
    count = generator.integers(0, 6, 50)
    total = generator.random(50) * count
    used = count > 0
    values = [
        np.repeat(total[used], draws.astype(int)).sum() / np.repeat(count[used], draws.astype(int)).sum()
        for block in statistics.resample_counts(int(used.sum()), seed=9, resamples=200)
        for draws in block
    ]
    estimate = bootstrap_mean(total, count, seed=9, resamples=200)
    assert estimate.value == pytest.approx(total.sum() / count.sum(), abs=1e-12)
    assert (estimate.low, estimate.high) == pytest.approx(order_statistics(values), abs=1e-12)


def test_intervals_cover_the_truth_when_the_rows_of_a_user_depend():
    """20 rows a user that share the user's own rate: an interval that took rows as independent covers about 70 %."""
    generator = np.random.default_rng(8)
    covered = {"mean": 0, "rows as users": 0, "log_loss": 0}
    trials, users, rows = 150, 40, 20
    truth = 0.4
    true_loss = -(0.4 * math.log(0.3) + 0.6 * math.log(0.7))
    user = np.repeat(np.arange(users), rows)
    for trial in range(trials):
        rate = generator.beta(2, 3, users)
        labels = (generator.random(users * rows) < rate[user]).astype(np.int8)
        sums = np.bincount(user, labels)
        mean = bootstrap_mean(sums, np.full(users, rows), seed=trial, resamples=200)
        naive = bootstrap_mean(labels.astype(float), np.ones(len(labels)), seed=trial, resamples=200)
        loss = bootstrap_binary(labels, np.full(len(labels), 0.3), user, seed=trial, resamples=200).log_loss
        covered["mean"] += mean.low <= truth <= mean.high
        covered["rows as users"] += naive.low <= truth <= naive.high
        covered["log_loss"] += loss.low <= true_loss <= loss.high
    assert 0.86 <= covered["mean"] / trials <= 0.99
    assert 0.86 <= covered["log_loss"] / trials <= 0.99
    assert covered["rows as users"] / trials <= 0.75


def test_the_interval_of_the_auc_covers_the_truth():
    """Scores are N(label, 1) plus a user's own shift: the AUC is that of a shift of 1 between two N(0, sqrt(2))."""
    generator = np.random.default_rng(4)
    truth = 0.5 * (1 + math.erf(1 / math.sqrt(2 * (1 + 1)) / math.sqrt(2)))
    user = np.repeat(np.arange(60), 10)
    covered = 0
    for trial in range(120):
        labels = np.tile([0, 1], 300)
        scores = labels + generator.normal(size=600) + generator.normal(size=60)[user]
        probabilities = 1 / (1 + np.exp(-scores))
        interval = bootstrap_binary(labels, probabilities, user, seed=trial, resamples=200).auc
        covered += interval.low <= truth <= interval.high
    assert 0.86 <= covered / 120 <= 0.995


def test_one_class_gives_nan_with_a_nan_interval_and_leaves_the_rest_defined():
    result = bootstrap_binary(np.zeros(6, np.int8), np.full(6, 0.25), np.arange(6) // 2, seed=0, resamples=20)
    for estimate in (result.auc, result.gauc, result.pcoc):
        assert all(math.isnan(number) for number in (estimate.value, estimate.low, estimate.high))
    assert result.gauc_coverage == 0
    expected = (-math.log(0.75),) * 3
    assert (result.log_loss.value, result.log_loss.low, result.log_loss.high) == pytest.approx(expected)


def test_no_rows_give_nan_everywhere():
    none = np.zeros(0)
    result = bootstrap_binary(none.astype(np.int8), none, none.astype(np.int32), seed=0)
    for name in ("auc", "gauc", "log_loss", "ece", "pcoc"):
        estimate = getattr(result, name)
        assert all(math.isnan(number) for number in (estimate.value, estimate.low, estimate.high))
    assert (result.rows, result.users) == (0, 0)
    assert math.isnan(bootstrap_mean(none, none, seed=0).value)
    assert math.isnan(bootstrap_mean(np.zeros(3), np.zeros(3), seed=0).low)


def test_one_user_has_a_value_and_no_interval():
    estimate = bootstrap_mean(np.array([0.0, 3.0]), np.array([0, 4]), seed=0)
    assert estimate.value == 0.75
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


def test_resamples_without_a_positive_are_left_out_of_the_interval():
    labels, user = np.array([1, 0, 0, 0, 0, 0]), np.arange(6) // 2
    result = bootstrap_binary(labels, np.array([0.9, 0.1, 0.2, 0.3, 0.4, 0.5]), user, seed=0, resamples=50)
    assert (result.auc.value, result.auc.low, result.auc.high) == (1.0, 1.0, 1.0)


def test_an_infinite_loss_is_infinite_only_where_its_user_is_drawn():
    labels, scores = np.ones(100, np.int8), np.full(100, 0.5)
    scores[0] = 0.0
    loss = bootstrap_binary(labels, scores, np.arange(100), seed=0, resamples=400).log_loss
    assert (loss.value, loss.high) == (math.inf, math.inf)
    assert loss.low == pytest.approx(math.log(2))
    assert json.loads(json.dumps(loss.to_json(), allow_nan=False)) == {"value": None, "low": loss.low, "high": None}


def test_estimates_become_plain_json():
    assert Estimate(0.5, 0.25, math.nan).to_json() == {"value": 0.5, "low": 0.25, "high": None}


def test_wrong_input_is_refused():
    with pytest.raises(UserError, match="row 1"):
        bootstrap_binary(np.array([0, 1]), np.array([0.1, 1.5]), np.array([1, 2]), seed=0)
    with pytest.raises(ValueError, match="one length"):
        bootstrap_binary(np.array([0, 1]), np.array([0.1, 0.5]), np.array([1, 2, 3]), seed=0)
    with pytest.raises(ValueError, match="one length"):
        bootstrap_mean(np.zeros(2), np.zeros(3), seed=0)
    for sums, counts in (([0.0, 1.0], [1, 0]), ([np.nan], [1]), ([1.0], [-1]), ([-np.inf], [1])):
        with pytest.raises(ValueError, match="counts must be"):
            bootstrap_mean(np.array(sums), np.array(counts), seed=0)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_mean(np.ones(2), np.ones(2), seed=0, resamples=0)


def test_several_means_have_the_intervals_that_each_has_alone():
    values = {name: np.random.default_rng(seed).random(30) for seed, name in enumerate("ab")}
    together = statistics.bootstrap_means(values, seed=4, resamples=50)
    for name, value_U in values.items():
        alone = bootstrap_mean(value_U, np.ones(30), seed=4, resamples=50)
        found = together[name]
        assert (found.value, found.low, found.high) == pytest.approx((alone.value, alone.low, alone.high), abs=1e-14)
    assert math.isnan(statistics.bootstrap_means({"a": np.zeros(0)}, seed=0)["a"].value)
