"""Heads of the ranker, as in `tenrec_jax.models.heads`: from one vector an event to one logit an action.

shared_bottom   one linear layer;
mmoe            multi-gate mixture of experts (Ma, Zhao et al., 2018, doi:10.1145/3219819.3220007);
ple             progressive layered extraction (Tang et al., 2020, doi:10.1145/3383313.3412236);
esmm            entire-space multi-task model (Ma, Zhao, Huang et al., 2018, arXiv:1804.07931).
"""

import torch
from torch import Tensor, nn

from torch_mlu_backend.config import HeadsConfig


class Einsum(nn.Module):
    """`einsum(x, kernel) + bias`, with the kernel in Flax's layout; zero until weights are loaded."""

    def __init__(self, equation: str, kernel: tuple[int, ...], bias: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.equation = equation
        self.kernel = nn.Parameter(torch.zeros(kernel))
        self.bias = nn.Parameter(torch.zeros(bias)) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum(self.equation, x, self.kernel)
        return y if self.bias is None else y + self.bias


class MixtureOfExperts(nn.Module):
    """MMoE: a gate an action mixes experts that all actions share, a linear tower an action makes the logit."""

    def __init__(self, config: HeadsConfig, width: int, actions: int) -> None:
        super().__init__()
        self.actions, self.num_experts = actions, config.experts
        self.experts = nn.Linear(width, config.experts * config.expert_width)
        self.gates = nn.Linear(width, actions * config.experts, bias=False)
        self.towers = _towers(config.expert_width, actions)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., A]."""
        expert = self.experts(x).relu().reshape(*x.shape[:-1], self.num_experts, -1)
        gate = self.gates(x).reshape(*x.shape[:-1], self.actions, self.num_experts).softmax(-1)
        return self.towers(torch.einsum("...an,...nw->...aw", gate, expert))


class ExtractionLayer(nn.Module):
    """One level of PLE. Groups G = A + 1: one of each action, and the shared one last; each has `experts` experts."""

    def __init__(self, config: HeadsConfig, width: int, actions: int, *, last: bool) -> None:
        super().__init__()
        groups, experts, out = actions + 1, config.experts, config.expert_width
        self.experts = Einsum("...gd,gdnw->...gnw", (groups, width, experts, out), (groups, experts, out))
        self.gates = Einsum("...ad,adn->...an", (actions, width, 2 * experts))
        self.shared_gate = None if last else nn.Linear(width, groups * experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs of the groups [..., G, D] to outputs [..., G, W], of the last level [..., A, W]."""
        expert = self.experts(x).relu()
        own, shared = expert[..., :-1, :, :], expert[..., -1:, :, :]
        seen = torch.cat([own, shared.expand(own.shape)], dim=-2)
        mixed = torch.einsum("...an,...anw->...aw", self.gates(x[..., :-1, :]).softmax(-1), seen)
        if self.shared_gate is None:
            return mixed
        everything = expert.reshape(*expert.shape[:-3], -1, expert.shape[-1])
        weight = self.shared_gate(x[..., -1, :]).softmax(-1)
        return torch.cat([mixed, torch.einsum("...n,...nw->...w", weight, everything)[..., None, :]], dim=-2)


class ProgressiveExtraction(nn.Module):
    """PLE: levels of extraction, then a linear tower an action."""

    def __init__(self, config: HeadsConfig, width: int, actions: int) -> None:
        super().__init__()
        self.groups = actions + 1
        widths = [width, *[config.expert_width] * (config.levels - 1)]
        self.levels = nn.ModuleList(
            ExtractionLayer(config, into, actions, last=level == config.levels)
            for level, into in enumerate(widths, start=1)
        )
        self.towers = _towers(config.expert_width, actions)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., A]."""
        x = x[..., None, :].expand(*x.shape[:-1], self.groups, x.shape[-1])
        for level in self.levels:
            x = level(x)
        return self.towers(x)


def _towers(width: int, actions: int) -> Einsum:
    return Einsum("...aw,aw->...a", (actions, width), (actions,))


def make_head(config: HeadsConfig, width: int, actions: int) -> nn.Module:
    """The module from vectors [..., D] to what `action_logits` expects [..., A]."""
    if config.kind == "mmoe":
        return MixtureOfExperts(config, width, actions)
    if config.kind == "ple":
        return ProgressiveExtraction(config, width, actions)
    return nn.Linear(width, actions)


def action_logits(config: HeadsConfig, x: Tensor) -> Tensor:
    """The logits of the actions' probabilities, from the sums of a head's outputs and the biases, [..., A] each."""
    return entire_space_logits(x) if config.kind == "esmm" else x


def entire_space_logits(x: Tensor) -> Tensor:
    """ESMM's logits of all actions, from those of the click and of the others given a click, [..., A].

    The logit of `sigmoid(a) sigmoid(b)` is minus the log-sum-exp of `-a`, `-b` and `-a - b`, here with the largest taken out.
    """
    click, given_click = x[..., :1], x[..., 1:]
    neither = torch.stack([(-click).expand(given_click.shape), -given_click, -click - given_click])
    largest = neither.detach().amax(0)
    return torch.cat([click, -((neither - largest).exp().sum(0).log() + largest)], dim=-1)
