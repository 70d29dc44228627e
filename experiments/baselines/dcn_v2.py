"""DCN-v2: deep and cross network (Wang et al., 2021, arXiv:2008.13535)."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array
from layers import Perceptron, Rival, dropped

from tenrec_jax.models.blocks import layer_norm
from tenrec_jax.models.dense import Linear
from tenrec_jax.models.features import Vocabulary
from tenrec_jax.models.pooling import MASKED, Pool, empty_pool, prefix_pools
from tenrec_jax.models.ranker import RankerConfig
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


class CrossNetwork(nnx.Module):
    """`x_{l+1} = x_0 * (W_l x_l + b_l) + x_l` with full matrices (section 3.2)."""

    def __init__(self, width: int, layers: int, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(Linear(width, width, rngs=rngs) for _ in range(layers))

    def __call__(self, x0: Array) -> Array:
        """[..., F] to [..., F]."""
        x = x0
        for layer in self.layers:
            x = x0 * layer(x) + x
        return x


class DcnV2(Rival):
    """The parallel structure: cross network and deep network over the same features, side by side below the head.

    Features: user (unless the run leaves ids out), gender, age, item, category, the mean of the items clicked before and, in DCN's favour,
    the mean of all events before with their actions. Each passes a layer norm; those of the means stand before the mean.
    """

    def __init__(self, config: RankerConfig, vocabulary: Vocabulary, settings: DcnV2Config, *, rngs: nnx.Rngs) -> None:
        width = config.encoder.width
        fields = 7 if config.features.user_id else 6
        super().__init__(config, vocabulary, fields * width + settings.hidden[-1], rngs=rngs)
        self.norms = nnx.List(layer_norm(width, rngs) for _ in range(fields))
        self.cross = CrossNetwork(fields * width, settings.cross_layers, rngs=rngs)
        self.perceptron = Perceptron(fields * width, settings.hidden, config.encoder.dropout, rngs=rngs)

    def _deep(self, timeline: Timeline, slots: Slots, rngs: nnx.Rngs | None) -> Array:
        profile, events = timeline.profile, timeline.events
        *norms, clicked_norm, event_norm = self.norms
        embedded = [self.users.gender(profile.gender), self.users.age(profile.age)]
        if self.users.id is not None:
            embedded.append(self.users.id(profile.user))
        fields = [slots.own(x_BUD) for x_BUD in embedded]
        fields += [self.items.id(events.item), self.items.category(events.category)]
        fields = [norm(dropped(self.dropout, x_BTD, rngs)) for norm, x_BTD in zip(norms, fields, strict=True)]
        item_BTD = self.items(events.item, events.category)
        event_BTD = self.events.context(item_BTD, events.action, slots.place)
        clicked_BT = events.mask & (events.action[..., 0] > 0)
        for norm, x_BTD, counts_BT in ((clicked_norm, item_BTD, clicked_BT), (event_norm, event_BTD, events.mask)):
            fields.append(mean_before(norm(dropped(self.dropout, x_BTD, rngs)), counts_BT, slots))
        x_BTF = jnp.concatenate(fields, axis=-1)
        return jnp.concatenate([self.cross(x_BTF), self.perceptron(x_BTF, rngs)], axis=-1)


def mean_before(x_BTD: Array, counts_BT: Array, slots: Slots) -> Array:
    """The mean over the events before each, in its own timeline, that count; zero where none does. [B, T, D]."""
    logit_BT1 = jnp.where(counts_BT, 0.0, MASKED)[..., None]
    start = empty_pool(x_BTD.shape[:1], 1, x_BTD.shape[-1])
    # Entry t covers t itself: the pool before an event is that of the event before.
    pools = prefix_pools(logit_BT1, x_BTD[:, :, None], start, slots.segment)
    before = Pool(*(jnp.roll(x, 1, axis=1) for x in pools))
    exists_BT1 = (before.maximum > MASKED) & ~slots.first[..., None]
    denominator_BT1 = jnp.where(exists_BT1, before.denominator, 1.0)
    return jnp.where(exists_BT1, before.numerator[:, :, 0] / denominator_BT1, 0.0)
