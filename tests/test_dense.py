"""Our dense layers against flax's: the same values, and the gradients that automatic differentiation of those gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tenrec_jax.models.dense import LayerNorm, Linear, together

WIDTH, OUT = 6, 4


def filled(layer: nnx.Module) -> nnx.Module:
    """The layer with random parameters: biases start at zero, where an error would not show."""
    graphdef, state = nnx.split(layer)
    leaves = jax.tree.leaves(state)
    drawn = [jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), drawn))


def value_and_gradients(layer: nnx.Module, x: jax.Array) -> tuple:
    graphdef, state = nnx.split(layer)

    def loss(state: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(graphdef, state)(x)
        return jnp.sin(y).sum(), y

    (_, y), (state, x) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)
    return y, jax.tree.leaves(state), x


LAYERS = [
    pytest.param(Linear(WIDTH, OUT, rngs=nnx.Rngs(0)), nnx.Linear(WIDTH, OUT, rngs=nnx.Rngs(0)), id="Linear"),
    pytest.param(
        LayerNorm(WIDTH, epsilon=1e-5, rngs=nnx.Rngs(0)),
        nnx.LayerNorm(WIDTH, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0)),
        id="LayerNorm",
    ),
]


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), ()])
@pytest.mark.parametrize(("ours", "reference"), LAYERS)
def test_values_and_gradients_are_those_of_the_layer_in_flax(ours, reference, shape):
    x = jax.random.normal(jax.random.key(9), (*shape, WIDTH))
    found, expected = value_and_gradients(filled(ours), x), value_and_gradients(filled(reference), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)


@pytest.mark.parametrize(("ours", "reference"), LAYERS)
def test_fresh_parameters_are_those_of_the_layer_in_flax(ours, reference):
    jax.tree.map(np.testing.assert_array_equal, nnx.split(ours)[1], nnx.split(reference)[1])


def test_layers_together_give_what_each_gives_alone():
    layers = [filled(Linear(WIDTH, out, rngs=nnx.Rngs(out))) for out in (3, 1, 4)]
    x = jax.random.normal(jax.random.key(9), (2, 5, WIDTH))
    expected = jnp.concatenate([layer(x) for layer in layers], axis=-1)
    np.testing.assert_allclose(together(x, *layers), expected, atol=1e-6)
