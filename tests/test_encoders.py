"""Invariants that every encoder keeps, whatever its attention and options."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tenrec_jax.models.blocks import Block, EncoderConfig, places_of
from tenrec_jax.models.encoders import make_encoder
from tenrec_jax.models.softmax_attention import SoftmaxAttention

CONFIG = EncoderConfig(num_layers=2, width=16, num_heads=2, hidden=24, recency_bias=True)
OPTIONS = {
    "additive": {},
    "additive, post-norm, SwiGLU, no recency bias": {"pre_norm": False, "activation": "swiglu", "recency_bias": False},
    "additive, pool residual, no feed-forward": {"pool_residual": True, "feed_forward": False},
    "softmax": {"attention": "softmax"},
    "softmax, post-norm, ReLU, no recency bias": {
        "attention": "softmax",
        "pre_norm": False,
        "activation": "relu",
        "recency_bias": False,
    },
    "softmax, no feed-forward": {"attention": "softmax", "feed_forward": False},
}
LENGTH, WIDTH = 7, 16


def tokens(seed: int, batch: int = 2, length: int = LENGTH) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, length, WIDTH))


class Encoded(NamedTuple):
    """The same contexts and targets, two of `LENGTH` tokens, encoded in every way.

    Attributes:
        timeline, context: [B, T, D], a context a row. packed_*: both contexts in one row, the second one twice, and padding.
        isolated: targets at t against a state of the tokens up to t. one_by_one: the same with states extended token by token.
        extended: outputs of that extension.
        gradient_*: of a projection of each entry of the packed timeline by the context tokens and by the targets, [P, P, D].
    """

    timeline: jax.Array
    context: jax.Array
    packed_timeline: jax.Array
    packed_context: jax.Array
    isolated: jax.Array
    one_by_one: jax.Array
    extended: jax.Array
    gradient_context: jax.Array
    gradient_target: jax.Array


@pytest.fixture(scope="module", params=OPTIONS.values(), ids=OPTIONS)
def encoded(request: pytest.FixtureRequest) -> Encoded:
    model = make_encoder(dataclasses.replace(CONFIG, **request.param), LENGTH - 1, rngs=nnx.Rngs(0))
    return jax.jit(lambda x, target: encode_in_every_way(model, x, target))(tokens(1), tokens(2))


def encode_in_every_way(model, x: jax.Array, target: jax.Array) -> Encoded:
    places, projection_D = places_of(jnp.ones((2, LENGTH), bool)), tokens(3, 1, 1)[0, 0]
    prefix_TT = jnp.tri(LENGTH, dtype=bool)

    def packed(y: jax.Array) -> jax.Array:
        return jnp.concatenate([y[0], y[1], y[1], 1e3 * tokens(4, 1, 3)[0]])[None]

    slot = jnp.arange(3 * LENGTH + 3)[None]
    packed_places = places_of(slot < 3 * LENGTH, (slot % LENGTH == 0) & (slot < 3 * LENGTH))

    def isolated(mask_T: jax.Array, target_BD: jax.Array) -> jax.Array:
        state = model.extend(model.start(2), x, jnp.broadcast_to(mask_T, (2, LENGTH)))[1]
        return model.isolated(state, target_BD[:, None])[:, 0]

    def one_by_one(state, inputs: tuple[jax.Array, jax.Array]):
        x_BD, target_BD = inputs
        output_B1D, state = model.extend(state, x_BD[:, None], jnp.ones((2, 1), bool))
        return state, (output_B1D[:, 0], model.isolated(state, target_BD[:, None])[:, 0])

    x_TBD, target_TBD = x.swapaxes(0, 1), target.swapaxes(0, 1)
    _, (extended_TBD, stepped_TBD) = jax.lax.scan(one_by_one, model.start(2), (x_TBD, target_TBD))

    # A plain sum would not do: that of a LayerNorm's output is constant.
    def projected(x_1PD: jax.Array, target_1PD: jax.Array) -> tuple[jax.Array, jax.Array]:
        encoded_1PD = model.timeline(x_1PD, target_1PD, packed_places)
        return (encoded_1PD @ projection_D)[0], encoded_1PD

    jacobian = jax.jacrev(projected, argnums=(0, 1), has_aux=True)
    (gradient_context, gradient_target), packed_timeline = jacobian(packed(x), packed(target))
    return Encoded(
        timeline=model.timeline(x, target, places),
        context=model.context(x, places),
        packed_timeline=packed_timeline,
        packed_context=model.context(packed(x), packed_places),
        isolated=jax.vmap(isolated, out_axes=1)(prefix_TT, target_TBD),
        one_by_one=stepped_TBD.swapaxes(0, 1),
        extended=extended_TBD.swapaxes(0, 1),
        gradient_context=gradient_context[:, 0],
        gradient_target=gradient_target[:, 0],
    )


def test_timeline_equals_isolated_with_the_events_before(encoded: Encoded) -> None:
    np.testing.assert_allclose(encoded.isolated, encoded.timeline, atol=1e-5)


def test_states_extended_event_by_event_give_the_same(encoded: Encoded) -> None:
    np.testing.assert_allclose(encoded.one_by_one, encoded.timeline, atol=1e-5)
    np.testing.assert_allclose(encoded.extended, encoded.context, atol=1e-5)


def test_packing_changes_nothing(encoded: Encoded) -> None:
    for packed, alone in (
        (encoded.packed_timeline, encoded.timeline),
        (encoded.packed_context, encoded.context),
    ):
        by_context = packed[0, : 3 * LENGTH].reshape(3, LENGTH, WIDTH)
        np.testing.assert_allclose(by_context, alone[jnp.array([0, 1, 1])], atol=1e-5)


def test_no_gradient_flows_to_later_events_other_targets_or_other_contexts(encoded: Encoded) -> None:
    slot, real = np.arange(3 * LENGTH + 3), 3 * LENGTH
    of_one_context = slot[:, None] // LENGTH == slot // LENGTH
    for gradient, expected in (
        (encoded.gradient_context, of_one_context & np.tri(len(slot), dtype=bool)),
        (encoded.gradient_target, np.eye(len(slot), dtype=bool)),
    ):
        reaches = np.asarray((gradient != 0).any(-1))
        np.testing.assert_array_equal(reaches[:real], expected[:real])


def test_softmax_attention_equals_a_plain_loop_in_float64() -> None:
    length, heads = 8, 2
    attention = SoftmaxAttention(CONFIG, length, rngs=nnx.Rngs(0))
    mask = np.array([[True, True, False, True, True, False, True, True]])
    first = np.array([[True, False, False, False, True, False, False, False]])
    x, target, places = tokens(1, 1, length), tokens(2, 1, length), places_of(jnp.asarray(mask), jnp.asarray(first))

    @jax.jit
    def attend(x: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        output, seen = attention.context(x, places)
        return output, attention.targets(target, places, seen)

    def project(name: str, x: jax.Array) -> np.ndarray:
        layer = getattr(attention, name)
        kernel, bias = (np.asarray(leaf[...], np.float64) for leaf in (layer.kernel, layer.bias))
        return np.asarray(x[0], np.float64) @ kernel + bias

    def attended(query_D: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray], position: list[int]):
        out = []
        for head in range(heads):
            part, rate = slice(8 * head, 8 * head + 8), float(attention.recency_rate[...][head])
            logit = np.array([k[part] @ query_D[part] / 8**0.5 + rate * p for k, p in zip(keys, position, strict=True)])
            weight = np.exp(logit - logit.max())
            out.append((weight / weight.sum()) @ np.array([v[part] for v in values]))
        return np.concatenate(out)

    key, value, query = project("key", x), project("value", x), project("query", x)
    own_key, own_value, target_query = project("key", target), project("value", target), project("query", target)
    contexts, targets = [], []
    for t in range(length):
        begin = 0 if t < 4 else 4
        seen = [s for s in range(begin, t + 1) if mask[0, s]]
        position = [int(mask[0, begin : s + 1].sum()) - 1 for s in seen]
        keys, values = [key[s] for s in seen], [value[s] for s in seen]
        contexts.append(attended(query[t], keys, values, position))
        targets.append(attended(target_query[t], [*keys, own_key[t]], [*values, own_value[t]], [*position, len(seen)]))
    for got, expected in zip(attend(x, target), (contexts, targets), strict=True):
        np.testing.assert_allclose(got[0], project("out_proj", np.stack(expected)[None]), atol=1e-5)


def test_a_full_cache_answers_nan_and_never_forgets_in_silence() -> None:
    model = make_encoder(dataclasses.replace(CONFIG, attention="softmax"), 3, rngs=nnx.Rngs(0))
    extend, isolated = jax.jit(model.extend), jax.jit(model.isolated)
    # The second user has half as many events: one is full while the other has room.
    state, mask = model.start(2), jnp.array([[True, True], [True, False]])
    _, state = extend(state, tokens(1, length=2), mask)
    _, state = extend(state, tokens(2, length=2), mask)
    assert bool(jnp.isfinite(isolated(state, tokens(3, length=2))).all())
    outputs, state = extend(state, tokens(4, length=2), mask)
    assert jnp.isnan(outputs).all((1, 2)).tolist() == [True, False]
    assert jnp.isnan(isolated(state, tokens(3, length=2))).any((1, 2)).tolist() == [True, False]
    with pytest.raises(ValueError, match="5 tokens do not fit in a memory of 4"):
        model.extend(model.start(2), tokens(1, length=5), jnp.ones((2, 5), bool))


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_block_is_the_formula_in_float64(pre_norm: bool, activation: str) -> None:
    config = dataclasses.replace(CONFIG, pre_norm=pre_norm, activation=activation)
    block = Block(config, lambda rngs: SoftmaxAttention(config, 1, rngs=rngs), rngs=nnx.Rngs(0))
    scales = {name: jax.random.normal(jax.random.key(i), (WIDTH,)) for i, name in enumerate(("norm1", "norm2"))}
    for name, scale_D in scales.items():
        getattr(block, name).scale[...] = scale_D
    got, rest = block(tokens(1), lambda y: (3 * jnp.square(y), "passed on"), None)
    assert rest == "passed on"

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return x @ np.asarray(getattr(block.ffn, name).kernel[...], np.float64)

    def feed_forward(x: np.ndarray) -> np.ndarray:
        if activation == "relu":
            return dense("down", np.maximum(dense("up", x), 0))
        gate = dense("gate", x)
        return dense("down", gate / (1 + np.exp(-gate)) * dense("up", x))

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6) * np.asarray(scales[name])

    x = np.asarray(tokens(1), np.float64)
    if pre_norm:
        x = x + 3 * norm("norm1", x) ** 2
        expected = x + feed_forward(norm("norm2", x))
    else:
        x = norm("norm1", x + 3 * x**2)
        expected = norm("norm2", x + feed_forward(x))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("attention", "length"), [("additive", 6000), ("softmax", 300)])
def test_long_timelines_stay_finite_and_bfloat16_stays_near_float32(attention: str, length: int) -> None:
    places, outputs = places_of(jnp.ones((1, length), bool)), {}
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(CONFIG, attention=attention, dtype=dtype)
        model = make_encoder(config, length, rngs=nnx.Rngs(0))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        outputs[dtype] = jax.jit(model.timeline)(tokens(1, 1, length), tokens(2, 1, length), places)
        assert outputs[dtype].dtype == jnp.float32
        assert bool(jnp.isfinite(outputs[dtype]).all())
        _, state = jax.eval_shape(model.extend, model.start(1), tokens(1, 1), jnp.ones((1, LENGTH), bool))
        summed = jnp.float32 if attention == "additive" else dtype
        assert all(leaf.dtype == summed for leaf in jax.tree.leaves(state.memory))
    # The outputs are normalised to about 1 an entry; bfloat16 keeps 8 bits.
    difference = np.abs(outputs["bfloat16"] - outputs["float32"])
    assert 0 < difference.mean() < 0.01
    assert difference.max() < 0.1
