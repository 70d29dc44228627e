"""A recurrent ranker in the manner of GRU4Rec (Hidasi et al., 2016, arXiv:1511.06939)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from layers import Perceptron, Rival, dropped

from tenrec_jax.models.blocks import layer_norm
from tenrec_jax.models.dense import Linear
from tenrec_jax.models.features import Vocabulary, context_tokens
from tenrec_jax.models.ranker import RankerConfig
from tenrec_jax.models.slots import Slots
from tenrec_jax.settings import Count, Settings
from tenrec_jax.timeline import Timeline


@dataclass(frozen=True)
class GruConfig(Settings):
    """Sizes of the recurrent ranker.

    Attributes:
        state: width of the state.
        hidden: widths of the perceptron above.
    """

    state: Count = 128
    hidden: tuple[Count, ...] = (256, 128)


class Gru(Rival):
    """One GRU layer over the user's token and the events with their actions; a perceptron over the state before an event and that event.

    The perceptron gets state, user and target, and the target's products with the user and with a projection of the state: GRU4Rec scores
    an item by such a product alone.
    """

    def __init__(self, config: RankerConfig, vocabulary: Vocabulary, settings: GruConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, vocabulary, settings.hidden[-1], rngs=rngs)
        width = config.encoder.width
        self.context_norm, self.target_norm, self.user_norm = (layer_norm(width, rngs) for _ in range(3))
        self.cell = nnx.GRUCell(width, settings.state, rngs=rngs)
        self.query = Linear(settings.state, width, rngs=rngs)
        self.perceptron = Perceptron(settings.state + 4 * width, settings.hidden, config.encoder.dropout, rngs=rngs)

    def _deep(self, timeline: Timeline, slots: Slots, rngs: nnx.Rngs | None) -> Array:
        events = timeline.events
        x_BTD, places, _ = context_tokens(self.users, self.items, self.events, timeline)
        x_BTD = self.context_norm(dropped(self.dropout, x_BTD, rngs))
        state_BTH = self.states(x_BTD, slots.first, places.mask)
        target_BTD = self._target(events.item, events.category, slots.place)
        target_BTD = self.target_norm(dropped(self.dropout, target_BTD, rngs))
        user_BTD = slots.own(self.user_norm(dropped(self.dropout, self.users(timeline.profile), rngs)))
        products = [user_BTD * target_BTD, self.query(state_BTH) * target_BTD]
        return self.perceptron(jnp.concatenate([state_BTH, user_BTD, target_BTD, *products], axis=-1), rngs)

    def states(self, x_BTD: Array, first_BT: Array, mask_BT: Array) -> Array:
        """The state [B, T, H] after each token of its context.

        Args:
            x_BTD: the tokens.
            first_BT: True where a context begins, with an empty state. mask_BT: True on tokens that change the state.
        """

        def step(state_BH: Array, token: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            x_BD, first_B, counts_B = token
            state_BH = jnp.where(first_B[:, None], 0.0, state_BH)
            state_BH = jnp.where(counts_B[:, None], self.cell(state_BH, x_BD)[0], state_BH)
            return state_BH, state_BH

        by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (x_BTD, first_BT, mask_BT))
        empty_BH = jnp.zeros((len(x_BTD), self.cell.hidden_features))
        return jnp.moveaxis(jax.lax.scan(step, empty_BH, by_time)[1], 0, 1)
