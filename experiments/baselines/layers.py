"""What the rivals share: their outer form, and the perceptron on top."""

from collections.abc import Sequence
from itertools import pairwise

from flax import nnx
from jax import Array

from tenrec_jax.models.blocks import layer_norm
from tenrec_jax.models.dense import Linear
from tenrec_jax.models.features import Vocabulary
from tenrec_jax.models.heads import make_head
from tenrec_jax.models.ranker import RankerConfig, TimelineRanker
from tenrec_jax.models.slots import Slots, slots_of
from tenrec_jax.timeline import Timeline


class Rival(TimelineRanker):
    """A ranker whose deep part is a vector [F] of each event and what was before it, from `_deep`.

    Embeddings, heads, biases and the dropout of inputs are the Fastformer ranker's, as the run's configuration has them; the dropout of
    hidden layers is that of its encoder.

    Args:
        config, vocabulary: of the run.
        deep_width: F.
    """

    def __init__(self, config: RankerConfig, vocabulary: Vocabulary, deep_width: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, vocabulary, rngs=rngs)
        self.output_norm = layer_norm(deep_width, rngs)
        self.head = make_head(config.heads, deep_width, vocabulary.actions, rngs=rngs)

    def timeline_logits(self, timeline: Timeline, key: Array | None = None) -> Array:
        slots = slots_of(timeline.start, timeline.events.item.shape[1])
        deep_BTF = self._deep(timeline, slots, None if key is None else nnx.Rngs(key))
        head_BTA = self.head(self.output_norm(deep_BTF))
        return self._wide_and(head_BTA, timeline.events.item, slots.own(self._bias(timeline.profile)))

    def _deep(self, timeline: Timeline, slots: Slots, rngs: nnx.Rngs | None) -> Array:
        """[B, T, F]; entry t knows event t's item and what was before it. `rngs` draws dropout; None is deterministic."""
        raise NotImplementedError


class Perceptron(nnx.Module):
    """Hidden layers with PReLU (He et al., 2015, arXiv:1502.01852), dropout after each."""

    def __init__(self, inputs: int, hidden: Sequence[int], dropout: float, *, rngs: nnx.Rngs) -> None:
        widths = [inputs, *hidden]
        self.layers = nnx.List(Linear(into, out, rngs=rngs) for into, out in pairwise(widths))
        self.activations = nnx.List(nnx.PReLU() for _ in hidden)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: Array, rngs: nnx.Rngs | None = None) -> Array:
        """[..., inputs] to [..., hidden[-1]]."""
        for layer, activation in zip(self.layers, self.activations, strict=True):
            x = dropped(self.dropout, activation(layer(x)), rngs)
        return x


def dropped(dropout: nnx.Dropout, x: Array, rngs: nnx.Rngs | None) -> Array:
    """`x` after dropout, whose next key `rngs` draws; without it, as it is."""
    return x if rngs is None else dropout(x, rngs=rngs)
