"""Invariants of the Fastformer's modes, at lengths around its chunks. `test_encoders` has those that all encoders share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tenrec_jax.models.blocks import EncoderConfig, Places, places_of
from tenrec_jax.models.fastformer import AdditiveAttention, FastformerEncoder

CONFIG = EncoderConfig(num_layers=3, width=16, num_heads=2, hidden=24, recency_bias=True)


def encoder(**changes) -> FastformerEncoder:
    return FastformerEncoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def tokens(seed: int, batch: int = 2, length: int = 9) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, length, 16))


def prefix_mask(batch: int, length: int, real: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length) < real, (batch, length))


def one_context(batch: int, length: int, real: int | None = None) -> Places:
    return places_of(prefix_mask(batch, length, length if real is None else real))


@pytest.mark.parametrize(("length", "normalize"), [(1, True), (9, True), (9, False), (150, False)])
def test_timeline_at_every_t_equals_isolated_with_the_events_before_t(length: int, normalize: bool) -> None:
    model, context, target = encoder(normalize=normalize), tokens(1, length=length), tokens(2, length=length)
    timeline = jax.jit(model.timeline)(context, target, one_context(2, length))

    @jax.jit
    def isolated(mask: jax.Array, target: jax.Array) -> jax.Array:
        return model.isolated(model.extend(model.start(2), context, mask)[1], target)

    for t in range(length):
        alone = isolated(prefix_mask(2, length, t + 1), target[:, t : t + 1])
        np.testing.assert_allclose(alone[:, 0], timeline[:, t], atol=1e-5)


@pytest.mark.parametrize("pool_residual", [False, True])
def test_attention_to_a_context_equals_its_equations_written_out(pool_residual: bool) -> None:
    config = dataclasses.replace(CONFIG, pool_residual=pool_residual)
    attention, x = AdditiveAttention(config, rngs=nnx.Rngs(0)), tokens(1, batch=1)
    got = jax.jit(lambda x: attention.context(x, one_context(1, 9))[0])(x)[0]

    def linear(name: str) -> np.ndarray:
        layer = getattr(attention, name)
        return np.asarray(x[0], np.float64) @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...])

    query, key, value = (linear(name).reshape(9, 2, 8) for name in ("query", "key", "value"))
    recency = np.arange(9)[:, None] * np.asarray(attention.recency_rate[...], np.float64)
    mixed = np.zeros((9, 2, 8))
    for t in range(9):

        def pool(logit: np.ndarray, values: np.ndarray, seen: int = t + 1) -> np.ndarray:
            weight = np.exp((logit + recency)[:seen])
            return (weight[..., None] * values[:seen]).sum(0) / weight.sum(0)[:, None]

        pooled_query, pooled_key = pool(linear("query_weight"), query), pool(linear("key_weight"), key)
        pooled_query /= np.linalg.norm(pooled_query, axis=-1, keepdims=True)
        product = pooled_query * pooled_key
        mixed[t] = value[t] * product / np.linalg.norm(product, axis=-1, keepdims=True) + query[t]
        mixed[t] += pooled_key * pool_residual
    out = attention.out_proj
    expected = mixed.reshape(9, 16) @ np.asarray(out.kernel[...], np.float64) + np.asarray(out.bias[...])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_score_does_not_depend_on_other_candidates() -> None:
    model, candidates = encoder(), tokens(3, length=6)
    state = jax.jit(lambda x: model.extend(model.start(2), x, jnp.ones((2, 9), bool))[1])(tokens(1))
    isolated = jax.jit(lambda x: model.isolated(state, x))
    together = isolated(candidates)
    order = jnp.asarray([4, 2, 0, 5, 1, 3])
    np.testing.assert_array_equal(isolated(candidates[:, order]), together[:, order])
    others_changed = candidates.at[:, 1:].set(tokens(4, length=5))
    np.testing.assert_array_equal(isolated(others_changed)[:, 0], together[:, 0])


def test_joint_scores_do_depend_on_other_candidates() -> None:
    model, candidates = encoder(), tokens(3, length=6)
    changed = candidates.at[:, 1:].set(tokens(4, length=5))
    mask = jnp.ones((2, 6), bool)
    joint = jax.jit(lambda x: model.joint(x, mask)[:, 0])
    assert float(jnp.abs(joint(candidates) - joint(changed)).max()) > 1e-3


@pytest.mark.parametrize("chunk", [1, 4])
def test_extending_event_by_event_equals_encoding_the_whole_history(chunk: int) -> None:
    model, x = encoder(), tokens(1, length=12)
    extend, isolated = jax.jit(model.extend), jax.jit(model.isolated)
    whole, expected = extend(model.start(2), x, jnp.ones((2, 12), bool))
    state, outputs = model.start(2), []
    for start in range(0, 12, chunk):
        output, state = extend(state, x[:, start : start + chunk], jnp.ones((2, chunk), bool))
        outputs.append(output)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), whole, atol=1e-5)
    candidates = tokens(5)
    np.testing.assert_allclose(isolated(state, candidates), isolated(expected, candidates), atol=1e-5)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, model.start(2))


def test_padding_changes_nothing() -> None:
    model, x, target = encoder(), tokens(1), tokens(2)
    real, timeline = 5, jax.jit(model.timeline)
    short = timeline(x[:, :real], target[:, :real], one_context(2, real))
    np.testing.assert_allclose(timeline(x, target, one_context(2, 9, real))[:, :real], short, atol=1e-6)
    garbage_after = x.at[:, real:].set(1e3)
    np.testing.assert_allclose(timeline(garbage_after, target, one_context(2, 9, real))[:, :real], short, atol=1e-6)


@pytest.mark.parametrize("lengths", [(9,), (1, 1, 7), (40, 3, 33, 20), (31, 1, 32, 64)])
def test_contexts_packed_into_a_row_are_encoded_as_if_each_were_alone(lengths: tuple[int, ...]) -> None:
    # The chunks of the pooling are 32 tokens: contexts begin before, at and after their edges.
    model, total = encoder(), sum(lengths)
    x, target = tokens(1, batch=1, length=total), tokens(2, batch=1, length=total)
    random = np.random.default_rng(0)
    first, mask = np.zeros((1, total), bool), random.random((1, total)) < 0.7
    begins = np.cumsum([0, *lengths[:-1]])
    first[0, begins] = mask[0, begins] = True
    places = places_of(jnp.asarray(mask), jnp.asarray(first))
    encode = jax.jit(lambda x, target, places: (model.timeline(x, target, places), model.context(x, places)))
    together = encode(x, target, places)
    for begin, length in zip(begins, lengths, strict=True):
        part = slice(begin, begin + length)

        def alone(x: np.ndarray, part: slice = part, rest: int = total - length) -> np.ndarray:
            return np.pad(x[:, part], ((0, 0), (0, rest), *((0, 0),) * (x.ndim - 2)))

        expected = encode(alone(x), alone(target), places_of(jnp.asarray(alone(mask))))
        for got, wanted in zip(together, expected, strict=True):
            np.testing.assert_allclose(got[:, part], wanted[:, :length], atol=1e-5)


@pytest.mark.parametrize("changes", [{"remat": "nothing_saveable"}, {"remat": "dots_saveable"}, {"unroll": True}])
def test_rematerialised_and_unrolled_layers_give_the_same_loss_and_gradients(changes: dict) -> None:
    places, key = one_context(2, 9), jax.random.key(7)

    def loss_and_gradients(model: FastformerEncoder):
        graphdef, parameters = nnx.split(model)

        def loss(parameters: nnx.State) -> jax.Array:
            return jnp.square(nnx.merge(graphdef, parameters).timeline(tokens(1), tokens(2), places, key)).mean()

        return jax.jit(jax.value_and_grad(loss))(parameters)

    expected = loss_and_gradients(encoder(dropout=0.2))
    got = loss_and_gradients(encoder(dropout=0.2, **changes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_recency_rate_decays_old_events_exponentially(rate: float) -> None:
    model = encoder(num_layers=1, num_heads=1)
    model.blocks.attention.recency_rate[...] = jnp.full((1, 1), rate)
    x, candidate = tokens(1, batch=1, length=30), tokens(2, batch=1, length=1)

    @jax.jit
    def score(x: jax.Array) -> jax.Array:
        return model.isolated(model.extend(model.start(1), x, jnp.ones((1, 30), bool))[1], candidate)

    def effect_of_changing(event: int) -> float:
        return float(jnp.abs(score(x.at[:, event].set(tokens(9, batch=1, length=1)[:, 0])) - score(x)).max())

    assert effect_of_changing(29) > 1e-4
    assert (effect_of_changing(2) > 1e-4) == (rate == 0.0)
