"""The encoder that a configuration names."""

from flax import nnx

from tenrec_jax.models.blocks import Encoder, EncoderConfig
from tenrec_jax.models.fastformer import FastformerEncoder
from tenrec_jax.models.softmax_attention import SoftmaxEncoder


def make_encoder(config: EncoderConfig, max_length: int, *, rngs: nnx.Rngs) -> Encoder:
    """An encoder of timelines of a user's token and up to `max_length` events; additive attention takes any number of them."""
    if config.attention == "softmax":
        return SoftmaxEncoder(config, max_length + 1, rngs=rngs)
    return FastformerEncoder(config, rngs=rngs)
