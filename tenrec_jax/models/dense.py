"""Dense layers with gradients that compile well: the same parameters, values and gradients as `flax.nnx.Linear` and `LayerNorm`.

Two things make automatic gradients slow on CPU. A weight's gradient contracts over rows and tokens at once, for which XLA first transposes
both factors: a layer here sees all tokens of a batch as one axis. And the gradient of a bias sums columns, which XLA turns into a slow
window reduction: here it is a product with ones.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Linear(nnx.Linear):
    """`x @ kernel + bias` over the last axis."""

    bias: nnx.Param

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        return together(x, self)


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation over the last axis, with a scale and a bias and the two-pass variance."""

    scale: nnx.Param
    bias: nnx.Param

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        centred = x - x.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return _scale_and_shift(normal, self.scale[...], self.bias[...])


def together(x: Array, *layers: Linear) -> Array:
    """The outputs of several layers with the same input, side by side in the last axis, by one product in the widest of their types."""
    dtype = jnp.result_type(*(layer.dtype or layer.param_dtype for layer in layers))
    kernel, bias = layers[0].kernel[...], layers[0].bias[...]
    if len(layers) > 1:
        kernel = jnp.concatenate([layer.kernel[...] for layer in layers], axis=1)
        bias = jnp.concatenate([layer.bias[...] for layer in layers])
    product = x.reshape(-1, x.shape[-1]).astype(dtype) @ kernel.astype(dtype)
    return _shift(product, bias.astype(dtype)).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _shift(x: Array, bias: Array) -> Array:
    return x + bias


def _shift_forward(x: Array, bias: Array) -> tuple[Array, None]:
    return x + bias, None


def _shift_backward(_: None, gradient: Array) -> tuple[Array, Array]:
    return gradient, _column_sums(gradient)


@jax.custom_vjp
def _scale_and_shift(x: Array, scale: Array, bias: Array) -> Array:
    return x * scale + bias


def _scale_and_shift_forward(x: Array, scale: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    return x * scale + bias, (x, scale)


def _scale_and_shift_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, scale = saved
    return gradient * scale, _column_sums(gradient * x), _column_sums(gradient)


def _column_sums(x: Array) -> Array:
    x = x.reshape(-1, x.shape[-1])
    # Accelerators would round the factors of a product, though not of a sum.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    sums = jnp.matmul(jnp.ones((len(x),), x.dtype), x, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)
    return sums.astype(x.dtype)


_shift.defvjp(_shift_forward, _shift_backward)
_scale_and_shift.defvjp(_scale_and_shift_forward, _scale_and_shift_backward)
