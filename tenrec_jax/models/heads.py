"""Heads of the ranker: from one vector an event to one logit an action.

    shared_bottom   one linear layer;
    mmoe            multi-gate mixture of experts (Ma, Zhao et al., 2018, doi:10.1145/3219819.3220007);
    ple             progressive layered extraction (Tang et al., 2020, doi:10.1145/3383313.3412236);
    esmm            entire-space multi-task model (Ma, Zhao, Huang et al., 2018, arXiv:1804.07931): a linear layer whose logits after the
                    first are of P(action | click), and P(action) = P(click) P(action | click).

ESMM takes it that an action implies a click. In Tenrec it does not: about three likes in ten come without one. There the model can at
best learn that such a like is improbable: the probability of an action never exceeds that of a click.

Last layers are zero at first, so that training starts from the item and user biases alone, which are added to the logits (in ESMM to
those of the click and of the actions given it).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from tenrec_jax.settings import Count, Settings

ZEROS = nnx.initializers.zeros


@dataclass(frozen=True)
class HeadsConfig(Settings):
    """How the ranker's actions share their last layers.

    Attributes:
        kind: see the module.
        experts: of MMoE, shared by all actions; of PLE, in the shared group and in each action's own.
        expert_width: output width of an expert.
        levels: of PLE, extraction layers one upon the other.
    """

    kind: Literal["shared_bottom", "mmoe", "ple", "esmm"] = "shared_bottom"
    experts: Count = 4
    expert_width: Count = 64
    levels: Count = 1


class MixtureOfExperts(nnx.Module):
    """MMoE. With x [..., D], experts `f_i(x) = relu(W_i x + b_i)` and for each action a softmax gate and a linear tower,

    g_a(x) = softmax(G_a x),   logit_a = w_a . sum_i g_a(x)_i f_i(x) + c_a.
    """

    def __init__(self, config: HeadsConfig, width: int, actions: int, *, rngs: nnx.Rngs) -> None:
        self.actions, self.num_experts = actions, config.experts
        self.experts = nnx.Linear(width, config.experts * config.expert_width, rngs=rngs)
        self.gates = nnx.Linear(width, actions * config.experts, use_bias=False, rngs=rngs)
        self.towers = _towers(config.expert_width, actions, rngs)

    def __call__(self, x: Array) -> Array:
        """[..., D] to [..., A]."""
        expert = jax.nn.relu(self.experts(x)).reshape(*x.shape[:-1], self.num_experts, -1)
        gate = jax.nn.softmax(self.gates(x).reshape(*x.shape[:-1], self.actions, self.num_experts))
        return self.towers(jnp.einsum("...an,...nw->...aw", gate, expert))


class ExtractionLayer(nnx.Module):
    """One level of PLE. Groups G = A + 1: one of each action, and the shared one last; each has `experts` experts.

    An action's gate, from that action's input, mixes its own experts and the shared ones; the shared gate, from the shared input, mixes
    all experts. The last level needs no shared output and has no such gate.
    """

    def __init__(self, config: HeadsConfig, width: int, actions: int, *, last: bool, rngs: nnx.Rngs) -> None:
        groups, experts = actions + 1, config.experts
        shape = (groups, width, experts, config.expert_width)
        # One fan-in a group, where the initialiser would count all groups and experts together.
        init = nnx.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=1, out_axis=(2, 3), batch_axis=0
        )
        self.experts = nnx.Einsum(
            "...gd,gdnw->...gnw", shape, (groups, experts, shape[-1]), kernel_init=init, rngs=rngs
        )
        gate_init = nnx.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        gates_shape = (actions, width, 2 * experts)
        self.gates = nnx.Einsum("...ad,adn->...an", gates_shape, kernel_init=gate_init, rngs=rngs)
        self.shared_gate = None if last else nnx.Linear(width, groups * experts, use_bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Inputs of the groups [..., G, D] to outputs [..., G, W], of the last level [..., A, W]."""
        expert = jax.nn.relu(self.experts(x))
        own, shared = expert[..., :-1, :, :], expert[..., -1:, :, :]
        seen = jnp.concatenate([own, jnp.broadcast_to(shared, own.shape)], axis=-2)
        mixed = jnp.einsum("...an,...anw->...aw", jax.nn.softmax(self.gates(x[..., :-1, :])), seen)
        if self.shared_gate is None:
            return mixed
        everything = expert.reshape(*expert.shape[:-3], -1, expert.shape[-1])
        weight = jax.nn.softmax(self.shared_gate(x[..., -1, :]))
        return jnp.concatenate([mixed, jnp.einsum("...n,...nw->...w", weight, everything)[..., None, :]], axis=-2)


class ProgressiveExtraction(nnx.Module):
    """PLE: levels of extraction, then a linear tower an action."""

    def __init__(self, config: HeadsConfig, width: int, actions: int, *, rngs: nnx.Rngs) -> None:
        self.groups = actions + 1
        widths = [width, *[config.expert_width] * (config.levels - 1)]
        self.levels = nnx.List(
            ExtractionLayer(config, into, actions, last=level == config.levels, rngs=rngs)
            for level, into in enumerate(widths, start=1)
        )
        self.towers = _towers(config.expert_width, actions, rngs)

    def __call__(self, x: Array) -> Array:
        """[..., D] to [..., A]."""
        x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], self.groups, x.shape[-1]))
        for level in self.levels:
            x = level(x)
        return self.towers(x)


def _towers(width: int, actions: int, rngs: nnx.Rngs) -> nnx.Einsum:
    return nnx.Einsum("...aw,aw->...a", (actions, width), (actions,), kernel_init=ZEROS, rngs=rngs)


def make_head(config: HeadsConfig, width: int, actions: int, *, rngs: nnx.Rngs) -> Callable[[Array], Array]:
    """The module from vectors [..., D] to what `action_logits` expects [..., A]."""
    if config.kind == "mmoe":
        return MixtureOfExperts(config, width, actions, rngs=rngs)
    if config.kind == "ple":
        return ProgressiveExtraction(config, width, actions, rngs=rngs)
    return nnx.Linear(width, actions, kernel_init=ZEROS, rngs=rngs)


def by_output(config: HeadsConfig, x_A: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers, one an action, as factors of the weights that make its output: the last layer's, by their names within the head."""
    if config.kind in ("mmoe", "ple"):
        return {"towers.kernel": x_A[:, None], "towers.bias": x_A}
    return {"kernel": x_A, "bias": x_A}


def action_logits(config: HeadsConfig, x: Array) -> Array:
    """The logits of the actions' probabilities, from the sums of a head's outputs and the biases, [..., A] each."""
    return entire_space_logits(x) if config.kind == "esmm" else x


def entire_space_logits(x: Array) -> Array:
    """ESMM's logits of all actions, from those of the click and of the others given a click, [..., A].

    The logit of `p = sigmoid(a) sigmoid(b)` is `log p - log(1 - p)` with `log p = log_sigmoid(a) + log_sigmoid(b)`. Since
    `1 / p - 1 = exp(-a) + exp(-b) + exp(-a - b)`, it is minus the log-sum-exp of `-a`, `-b` and `-a - b`: exact where p is next to 0 or 1,
    where the difference would cancel, and with finite gradients everywhere.
    """
    click, given_click = x[..., :1], x[..., 1:]
    neither = jnp.stack([jnp.broadcast_to(-click, given_click.shape), -given_click, -click - given_click])
    return jnp.concatenate([click, -jax.nn.logsumexp(neither, axis=0)], axis=-1)


def modelled_rates(config: HeadsConfig, rate: np.ndarray) -> np.ndarray:
    """The rates [..., A] that the biases stand for, from the actions' rates: ESMM's are, after the click's, those given a click.

    Where an action is more frequent than clicks its rate given one is 1, the most that ESMM can say.
    """
    if config.kind != "esmm":
        return rate
    return np.concatenate([rate[..., :1], np.minimum(rate[..., 1:] / rate[..., :1], 1.0)], axis=-1)
