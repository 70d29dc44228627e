"""Pools against a plain softmax in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenrec_jax.models.pooling import MASKED, empty_pool, merge, prefix_pools, token_pool


def softmax_mean(logit_TH: np.ndarray, value_THE: np.ndarray) -> np.ndarray:
    logit_TH = logit_TH.astype(np.float64)
    weight_TH = np.exp(logit_TH - logit_TH.max(0))
    return np.einsum("th,the->he", weight_TH / weight_TH.sum(0), value_THE.astype(np.float64))


@jax.jit
def prefix_means(logit_BTH: jax.Array, value_BTHE: jax.Array) -> jax.Array:
    return prefix_pools(logit_BTH, value_BTHE, empty_pool((2,), 3, 4), chunk=8).mean()


@settings(max_examples=50, deadline=None)
@given(scale=st.sampled_from([0.0, 1.0, 30.0, 1000.0]), offset=st.floats(-1e4, 1e4), seed=st.integers(0, 10**6))
def test_prefix_pools_equal_a_softmax_over_each_prefix(scale: float, offset: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    logit = (scale * random.normal(size=(2, 21, 3)) + offset).astype(np.float32)
    value = random.normal(size=(2, 21, 3, 4)).astype(np.float32)
    pooled = prefix_means(logit, value)
    for batch in range(2):
        for t in range(21):
            expected = softmax_mean(logit[batch, : t + 1], value[batch, : t + 1])
            np.testing.assert_allclose(pooled[batch, t], expected, atol=2e-5)


def test_prefix_pools_stay_exact_over_six_thousand_rising_logits() -> None:
    length = 6000
    logit = jnp.linspace(-300.0, 300.0, length)[None, :, None]
    value = jax.random.normal(jax.random.key(0), (1, length, 1, 2))
    pooled = jax.jit(prefix_pools)(logit, value, empty_pool((1,), 1, 2)).mean()
    assert bool(jnp.isfinite(pooled).all())
    np.testing.assert_allclose(pooled[0, -1], softmax_mean(np.asarray(logit[0]), np.asarray(value[0])), atol=1e-5)


def test_merging_two_halves_equals_the_whole_in_either_order() -> None:
    random = np.random.default_rng(0)
    logit, value = (
        random.normal(size=(1, 10, 2)).astype(np.float32),
        random.normal(size=(1, 10, 2, 3)).astype(np.float32),
    )

    def pool(tokens: slice):
        pools = prefix_pools(jnp.asarray(logit[:, tokens]), jnp.asarray(value[:, tokens]), empty_pool((1,), 2, 3))
        return jax.tree.map(lambda x: x[:, -1], pools)

    left, right, whole = pool(slice(0, 4)), pool(slice(4, 10)), softmax_mean(logit[0], value[0])
    np.testing.assert_allclose(merge(left, right).mean()[0], whole, atol=1e-6)
    np.testing.assert_allclose(merge(right, left).mean()[0], whole, atol=1e-6)
    np.testing.assert_array_equal(merge(empty_pool((1,), 2, 3), left).mean(), left.mean())


def test_masked_tokens_do_not_count() -> None:
    random = np.random.default_rng(1)
    logit, value = random.normal(size=(1, 6, 2)).astype(np.float32), random.normal(size=(1, 6, 2, 3)).astype(np.float32)
    logit[:, 2:4] = MASKED
    pooled = prefix_pools(jnp.asarray(logit), jnp.asarray(value), empty_pool((1,), 2, 3)).mean()
    keep = [0, 1, 4, 5]
    np.testing.assert_allclose(pooled[0, -1], softmax_mean(logit[0, keep], value[0, keep]), atol=1e-6)


@pytest.mark.parametrize("length", [5, 40])
def test_gradients_equal_those_of_a_plain_softmax(length: int) -> None:
    random = np.random.default_rng(2)
    logit, value = jnp.asarray(random.normal(size=(1, length, 1))), jnp.asarray(random.normal(size=(1, length, 1, 2)))
    weight_T = jnp.asarray(random.normal(size=length))

    def ours(logit: jax.Array, value: jax.Array) -> jax.Array:
        pools = prefix_pools(logit, value, empty_pool((1,), 1, 2), chunk=8)
        own = token_pool(logit, value)
        return (merge(pools, own).mean()[0, :, 0, 0] * weight_T).sum()

    def plain(logit: jax.Array, value: jax.Array) -> jax.Array:
        # Each token counts in its prefix and once more by itself.
        weight_TT = (jnp.tri(length) + jnp.eye(length)) * jnp.exp(logit[0, :, 0])
        return (weight_TT @ value[0, :, 0, 0] / weight_TT.sum(1) * weight_T).sum()

    gradients = (jax.jit(jax.grad(function, (0, 1)))(logit, value) for function in (ours, plain))
    for got, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
