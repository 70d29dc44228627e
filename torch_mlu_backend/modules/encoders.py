"""The encoder that a configuration names."""

from torch_mlu_backend.config import EncoderConfig
from torch_mlu_backend.modules.blocks import Encoder
from torch_mlu_backend.modules.fastformer import FastformerEncoder
from torch_mlu_backend.modules.softmax_attention import SoftmaxEncoder


def make_encoder(config: EncoderConfig, max_length: int) -> Encoder:
    """An encoder of timelines of a user's token and up to `max_length` events; additive attention takes any number of them."""
    return SoftmaxEncoder(config, max_length + 1) if config.attention == "softmax" else FastformerEncoder(config)
