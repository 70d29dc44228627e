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
        table_rate: learning rate of the embedding tables, biases excepted, as a share of `learning_rate`. Adam moves a row met once as far as one met often;
            a small share keeps a small log from being learned by heart.
        b2: second-moment decay.
        clip_norm: global norm to which gradients are clipped; 0 is off.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: float = 0.0
    b2: float = 0.98
    clip_norm: float = 1.0
    table_rate: float = 1.0


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
    adamw = optax.adamw(
        learning_rate_schedule(config, steps), b2=config.b2, weight_decay=config.weight_decay, mask=_dense_matrices
    )
    slowed = optax.masked(optax.scale(config.table_rate), _tables)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, adamw, slowed)


def _dense_matrices(parameters: Any) -> Any:
    return _where(parameters, lambda name: "'kernel'" in name)


def _tables(parameters: Any) -> Any:
    return _where(parameters, lambda name: "'embedding'" in name and "_bias'" not in name)


def _where(parameters: Any, chosen: Callable[[str], bool]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: chosen(jax.tree_util.keystr(path)), parameters)
