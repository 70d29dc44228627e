"""The optimiser: AdamW with gradient clipping, warm-up and decay, from optax."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        learning_rate: peak rate.
        warmup_steps: steps of linear warm-up.
        schedule: "constant" after the warm-up, or "cosine" down to a hundredth of the peak.
        weight_decay: decoupled, on the matrices of dense layers.
        table_decay: the same on the embedding tables, but not on the bias tables, which start from the log's rates.
        b2: second-moment decay.
        clip_norm: global norm to which gradients are clipped; 0 is off.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: float = 0.0
    table_decay: float = 0.0
    b2: float = 0.98
    clip_norm: float = 1.0


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step, for a run of `steps`."""
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0,
            config.learning_rate,
            config.warmup_steps,
            max(steps, config.warmup_steps + 1),
            config.learning_rate / 100,
        )
    return optax.warmup_constant_schedule(0.0, config.learning_rate, config.warmup_steps)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) for a run of `steps`."""
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(b2=config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=_mask(lambda path: "'kernel'" in path)),
        optax.add_decayed_weights(
            config.table_decay, mask=_mask(lambda path: "'embedding'" in path and "bias" not in path)
        ),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
    )


def _mask(choose: Callable[[str], bool]) -> Callable[[Any], Any]:
    def mask(parameters: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: choose(jax.tree_util.keystr(path)), parameters)

    return mask
