"""What users did with the items of each category, as in `tenrec_jax.models.tallies`.

A tally counts events and, of those, the ones with each action: [..., 1 + A], the number of events first.
"""

import torch
from torch import Tensor, nn

from torch_mlu_backend.modules.records import Events
from torch_mlu_backend.modules.slots import Slots


def no_tallies(users: int, categories: int, actions: int, device: torch.device) -> Tensor:
    """The tallies of users without events, one a category: [B, K, 1 + A]."""
    return torch.zeros((users, categories, 1 + actions), device=device)


def with_events(tally_BKF: Tensor, events: Events) -> Tensor:
    """The tallies after further events."""
    of_each_BTF = _of_each(events)
    return tally_BKF.scatter_add(1, events.category.long()[..., None].expand(of_each_BTF.shape), of_each_BTF)


def of_category(tally_BKF: Tensor, category_BC: Tensor) -> Tensor:
    """The tallies [B, C, 1 + A] of these categories."""
    return tally_BKF.gather(1, category_BC.long()[..., None].expand(-1, -1, tally_BKF.shape[-1]))


def tallies_before(events: Events, slots: Slots, categories: int) -> tuple[Tensor, Tensor]:
    """Of the events before each one in its own timeline: the tally of those of its category, and that of all; [B, T, 1 + A] each.

    Running sums of all categories, which take K times the memory of what is returned.
    """
    of_each_BT1F = _of_each(events)[:, :, None]
    batch, length, _, width = of_each_BT1F.shape
    index_BT1F = events.category.long()[..., None, None].expand(of_each_BT1F.shape)
    empty_BTKF = torch.zeros((batch, length, categories, width), device=of_each_BT1F.device)
    of_each_BTKF = empty_BTKF.scatter(2, index_BT1F, of_each_BT1F)
    before_BTKF = of_each_BTKF.cumsum(1) - of_each_BTKF
    begin_BT = torch.arange(length, device=slots.place.device) - slots.place
    begin_BTKF = before_BTKF.gather(1, begin_BT[..., None, None].expand(before_BTKF.shape))
    before_BTKF = before_BTKF - begin_BTKF
    return before_BTKF.gather(2, index_BT1F)[:, :, 0], before_BTKF.sum(2)


def _of_each(events: Events) -> Tensor:
    """What each event adds to a tally, [B, T, 1 + A]; nothing where it does not count."""
    action_BTA = events.action.float()
    one_and_actions_BTF = torch.cat([torch.ones_like(action_BTA[..., :1]), action_BTA], dim=-1)
    return torch.where(events.mask[..., None], one_and_actions_BTF, 0.0)


class MatchedRates(nn.Module):
    """logit(q_a) - logit(r_a), logit(r_a), log(1 + m) and log(1 + n), brought to a size of about one, where

    r_a = (k_a + 1/2) / (n + 1),   q_a = (l_a + s_a r_a) / (m + s_a)

    with n and k_a the events and those with action a, m and l_a those in the candidate's category, and s_a learned.
    """

    def __init__(self, actions: int) -> None:
        super().__init__()
        self.width = 2 * actions + 2
        self.log_strength = nn.Parameter(torch.zeros(actions))

    def forward(self, matched: Tensor, own: Tensor) -> Tensor:
        """Tallies [..., 1 + A], of the category and, broadcast to them, of all events, to features [..., 2 A + 2]."""
        own = own.expand(matched.shape)
        m, in_category, n, of_all = matched[..., :1], matched[..., 1:], own[..., :1], own[..., 1:]
        strength = self.log_strength.exp()
        rate = (of_all + 0.5) / (n + 1.0)
        with_action, without = in_category + strength * rate, m - in_category + strength * (1.0 - rate)
        logit = rate.log() - (1.0 - rate).log()
        difference = with_action.log() - without.log() - logit
        return torch.cat([difference, 0.25 * logit, 0.25 * m.log1p(), 0.25 * n.log1p()], dim=-1)
