"""DCN-v2: deep and cross network (Wang et al., 2021, arXiv:2008.13535)."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array
from layers import Perceptron, Rival, dropped

from tenrec_jax.models.blocks import layer_norm
from tenrec_jax.models.crosses import CrossNetwork
from tenrec_jax.models.features import Vocabulary
from tenrec_jax.models.ranker import RankerConfig
from tenrec_jax.models.running_means import means_before
from tenrec_jax.models.slots import Slots
from tenrec_jax.settings import Count, Settings
from tenrec_jax.timeline import Timeline


@dataclass(frozen=True)
class DcnV2Config(Settings):
    """Sizes of DCN-v2.

    Attributes:
        cross_layers: of the cross network.
        hidden: widths of the deep network beside it.
    """

    cross_layers: Count = 3
    hidden: tuple[Count, ...] = (256, 128)


class DcnV2(Rival):
    """The parallel structure: cross network and deep network over the same features, side by side below the head.

    Features: user (unless the run leaves ids out), gender, age, item, category (where there is any), the mean of the items clicked before
    and, in DCN's favour, the mean of all events before with their actions. Each passes a layer norm; those of the means stand before the
    mean.
    """

    def __init__(self, config: RankerConfig, vocabulary: Vocabulary, settings: DcnV2Config, *, rngs: nnx.Rngs) -> None:
        width = config.encoder.width
        fields = 5 + config.features.user_id + (vocabulary.categories > 1)
        super().__init__(config, vocabulary, fields * width + settings.hidden[-1], rngs=rngs)
        self.norms = nnx.List(layer_norm(width, rngs) for _ in range(fields))
        self.cross = CrossNetwork(fields * width, settings.cross_layers, rngs=rngs)
        self.perceptron = Perceptron(fields * width, settings.hidden, config.encoder.dropout, rngs=rngs)

    def _deep(self, timeline: Timeline, slots: Slots, rngs: nnx.Rngs | None) -> Array:
        profile, events = timeline.profile, timeline.events
        *norms, clicked_norm, event_norm = self.norms
        embedded = [slots.own(x_BUD) for x_BUD in self.users.fields(profile)]
        embedded += self.items.fields(events.item, events.category)
        fields = [norm(dropped(self.dropout, x_BTD, rngs)) for norm, x_BTD in zip(norms, embedded, strict=True)]
        item_BTD = self.items(events.item, events.category)
        event_BTD = self.events.context(item_BTD, events.action, slots.place)
        past = ((clicked_norm, item_BTD), (event_norm, event_BTD))
        past_BT2D = jnp.stack([norm(dropped(self.dropout, x_BTD, rngs)) for norm, x_BTD in past], axis=2)
        clicked_BT = events.mask & (events.action[..., 0] > 0)
        fields.append(means_before(past_BT2D, jnp.stack([clicked_BT, events.mask], axis=-1), slots))
        x_BTF = jnp.concatenate(fields, axis=-1)
        return jnp.concatenate([self.cross(x_BTF), self.perceptron(x_BTF, rngs)], axis=-1)
