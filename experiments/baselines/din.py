"""DIN: deep interest network (Zhou et al., 2018, arXiv:1706.06978)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from layers import Perceptron, Rival, dropped

from tenrec_jax.models.blocks import layer_norm
from tenrec_jax.models.dense import Linear
from tenrec_jax.models.features import Vocabulary, event_tokens
from tenrec_jax.models.ranker import RankerConfig
from tenrec_jax.models.slots import Slots
from tenrec_jax.settings import Count, Settings
from tenrec_jax.timeline import Timeline


@dataclass(frozen=True)
class DinConfig(Settings):
    """Sizes of DIN.

    Attributes:
        window: events before the target that it attends to, the last ones of the timeline.
        attention: hidden widths of the activation unit.
        hidden: of the perceptron above.
    """

    window: Count = 50
    attention: tuple[Count, ...] = (64, 32)
    hidden: tuple[Count, ...] = (256, 128)


class ActivationUnit(nnx.Module):
    """The weight of an event h for a target t: `MLP([h, t, h * t, h - t])`, not normalised over the events.

    The first layer takes its four inputs apart: what depends on the event or on the target alone is computed once, not once a pair.
    Weights start at `start` for every pair, from which attention is learned.
    """

    def __init__(self, width: int, hidden: tuple[int, ...], start: float, *, rngs: nnx.Rngs) -> None:
        first, *rest = hidden
        self.first, self.activation = Linear(4 * width, first, rngs=rngs), nnx.PReLU()
        self.rest = Perceptron(first, rest, 0.0, rngs=rngs)
        zeros, constant = nnx.initializers.zeros, nnx.initializers.constant(start)
        self.weight = Linear(hidden[-1], 1, kernel_init=zeros, bias_init=constant, rngs=rngs)

    def apart(self, h: Array, t: Array) -> tuple[Array, Array]:
        """The first layer's share of events [..., D] and of targets [..., D], of any shapes, before they meet."""
        of_h, of_t, _, of_difference = self._kernels()
        return h @ (of_h + of_difference), t @ (of_t - of_difference) + self.first.bias[...]

    def __call__(self, h: Array, t: Array, share_h: Array, share_t: Array) -> Array:
        """Pairs [..., D] with their shares to weights [..., 1]."""
        of_product = self._kernels()[2]
        product = (h * t).reshape(-1, h.shape[-1]) @ of_product
        first = share_h + share_t + product.reshape(share_t.shape)
        return self.weight(self.rest(self.activation(first)))

    def _kernels(self) -> list[Array]:
        return jnp.split(self.first.kernel[...], 4)


class Din(Rival):
    """Target attention over the last events; a perceptron over user, pooled events and target.

    What differs from the paper, in DIN's favour or for the comparison: embeddings pass a layer norm, as in the Fastformer; the perceptron
    also gets the target's products with the user and with the pooled events; PReLU stands for Dice, whose batch statistics would let
    timelines see each other.
    """

    def __init__(self, config: RankerConfig, vocabulary: Vocabulary, settings: DinConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, vocabulary, settings.hidden[-1], rngs=rngs)
        width, self.window = config.encoder.width, settings.window
        self.item_norm, self.user_norm = layer_norm(width, rngs), layer_norm(width, rngs)
        # At first the mean of a full window.
        self.unit = ActivationUnit(width, settings.attention, 1 / settings.window, rngs=rngs)
        self.perceptron = Perceptron(5 * width, settings.hidden, config.encoder.dropout, rngs=rngs)

    def _deep(self, timeline: Timeline, slots: Slots, rngs: nnx.Rngs | None) -> Array:
        events = timeline.events
        event_BTD = event_tokens(self.items, self.events, events, slots.place)
        target_BTD = self._target(events.item, events.category, slots.place)
        user_BTD = slots.own(self.user_norm(dropped(self.dropout, self.users(timeline.profile), rngs)))
        h_BTD, t_BTD = (self.item_norm(dropped(self.dropout, x, rngs)) for x in (event_BTD, target_BTD))
        pooled_BTD = self.attend(h_BTD, t_BTD, slots.place, events.mask)
        both = [user_BTD, pooled_BTD, t_BTD, user_BTD * t_BTD, pooled_BTD * t_BTD]
        return self.perceptron(jnp.concatenate(both, axis=-1), rngs)

    def attend(self, h_BTD: Array, t_BTD: Array, place_BT: Array, mask_BT: Array) -> Array:
        """For each target t, the sum of `w(h_s, t) h_s` over the events s in the window before it.

        The window is walked event by event: all targets meet the event so many places before them at once, in little memory.

        Args:
            h_BTD, t_BTD: each slot as an event and as a target.
            place_BT: of the slot in its timeline. mask_BT: True on events that may be seen.

        Returns:
            [B, T, D].
        """
        length = t_BTD.shape[1]
        window = min(self.window, length - 1)
        share_h_BTF, share_t_BTF = self.unit.apart(h_BTD, t_BTD)
        padded = [_after(window, x) for x in (h_BTD, share_h_BTF, mask_BT)]

        def step(pooled_BTD: Array, back: Array) -> tuple[Array, None]:
            past_BTD, share_BTF, seen_BT = (
                jax.lax.dynamic_slice_in_dim(x, window - back, length, axis=1) for x in padded
            )
            weight_BT1 = self.unit(past_BTD, t_BTD, share_BTF, share_t_BTF)
            counts_BT = seen_BT & (back <= place_BT)
            return pooled_BTD + jnp.where(counts_BT[..., None], weight_BT1, 0.0) * past_BTD, None

        step = jax.checkpoint(step, prevent_cse=False)
        return jax.lax.scan(step, jnp.zeros_like(t_BTD), jnp.arange(1, window + 1))[0]


def _after(slots: int, x_BT: Array) -> Array:
    """The array with so many empty slots before it."""
    return jnp.pad(x_BT, ((0, 0), (slots, 0), *((0, 0),) * (x_BT.ndim - 2)))
