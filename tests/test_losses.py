"""Losses against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import log_loss

from tenrec_jax.models.losses import action_losses, sampled_softmax


def test_action_losses_equal_scikit_learns_log_loss() -> None:
    random = np.random.default_rng(0)
    logit, label = random.normal(size=(3, 5, 2)).astype(np.float32), random.integers(0, 2, (3, 5, 2))
    where = random.random((3, 5)) < 0.7
    got = action_losses(jnp.asarray(logit), jnp.asarray(label), jnp.asarray(where))
    probability = 1 / (1 + np.exp(-logit.astype(np.float64)))
    for action in range(2):
        expected = log_loss(label[where][:, action], probability[where][:, action], normalize=False, labels=[0, 1])
        assert float(got[action]) == pytest.approx(expected, rel=1e-5)


def test_sampled_softmax_with_every_item_once_is_the_full_softmax() -> None:
    random = np.random.default_rng(1)
    query, item = random.normal(size=(6, 4)).astype(np.float32), random.normal(size=(9, 4)).astype(np.float32)
    positive, where = np.array([0, 3, 3, 8, 5, 1]), np.array([True, True, False, True, True, True])
    got = sampled_softmax(
        *map(jnp.asarray, (query, item[positive], positive, item, np.arange(9), np.zeros(9, np.float32), where))
    )
    score = query.astype(np.float64) @ item.T
    expected = np.log(np.exp(score).sum(1)) - score[np.arange(6), positive]
    assert float(got) == pytest.approx(expected[where].sum(), rel=1e-5)


def test_log_q_correction_makes_the_partition_function_unbiased() -> None:
    random = np.random.default_rng(2)
    item, query = random.normal(size=(20, 3)).astype(np.float32), random.normal(size=(1, 3)).astype(np.float32)
    popularity = random.dirichlet(np.ones(20))
    popular, uniform = 40, 60
    expected_count = popular * popularity + uniform / 20

    @jax.jit
    def partition(negative: jax.Array) -> jax.Array:
        loss = sampled_softmax(
            query, item[:1], jnp.zeros(1, int), jnp.asarray(item)[negative], negative,
            jnp.log(jnp.asarray(expected_count, jnp.float32))[negative], jnp.ones(1, bool),
        )  # fmt: skip
        return jnp.exp(loss + (query[0] * item[0]).sum())

    estimates = [
        float(partition(np.concatenate([random.choice(20, popular, p=popularity), random.integers(0, 20, uniform)])))
        for _ in range(1500)
    ]
    truth = np.exp(query.astype(np.float64) @ item.T).sum()
    assert np.mean(estimates) == pytest.approx(truth, abs=5 * np.std(estimates) / np.sqrt(len(estimates)))


def test_accidental_hits_are_masked() -> None:
    query, vector = jnp.ones((1, 2)), jnp.ones((3, 2))
    loss = sampled_softmax(
        query, vector[:1], jnp.array([7]), vector, jnp.array([7, 7, 8]), jnp.zeros(3), jnp.array([True])
    )
    assert float(loss) == pytest.approx(np.log(2.0))


def test_smoothed_labels_of_the_full_softmax_are_optax_s_whatever_the_negatives_repeat() -> None:
    random = np.random.default_rng(3)
    query, item = random.normal(size=(6, 4)).astype(np.float32), random.normal(size=(9, 4)).astype(np.float32)
    positive, times = np.array([0, 3, 3, 8, 5, 1]), random.integers(1, 4, 9)
    negative = np.repeat(np.arange(9), times)
    got = sampled_softmax(
        jnp.asarray(query), jnp.asarray(item[positive]), jnp.asarray(positive), jnp.asarray(item[negative]), jnp.asarray(negative),
        jnp.log(jnp.asarray(times, jnp.float32))[negative], jnp.ones(6, bool), label_smoothing=0.2,
    )  # fmt: skip
    labels = optax.smooth_labels(jax.nn.one_hot(positive, 9), 0.2)
    assert float(got) == pytest.approx(float(optax.softmax_cross_entropy(query @ item.T, labels).sum()), rel=1e-5)


def test_smoothed_labels_never_meet_the_infinite_correction_of_what_is_no_negative() -> None:
    query, vector = jnp.ones((1, 2)), jnp.ones((3, 2))
    loss = sampled_softmax(
        query, vector[:1], jnp.array([7]), vector, jnp.array([7, 8, 9]), jnp.array([0.0, 0.0, jnp.inf]), jnp.array([True]),
        label_smoothing=0.5,
    )  # fmt: skip
    assert float(loss) == pytest.approx(np.log(2.0))
