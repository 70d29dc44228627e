"""Which slot of a packed row belongs to whom."""

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """The slots of packed rows, [B, T] each: the first of a timeline, which timeline, and the place in it."""

    first: Tensor
    segment: Tensor
    place: Tensor


def slots_of(start_BU: Tensor, length: int) -> Slots:
    """The slots of rows of `length` slots whose timelines begin at `start_BU`, ascending from 0; `length` stands for none."""
    slot_T = torch.arange(length, device=start_BU.device)
    start_BU1 = start_BU.long()[..., None]
    first_BT = (start_BU1 == slot_T).any(1)
    begin_BT = torch.where(start_BU1 <= slot_T, start_BU1, 0).amax(1)
    return Slots(first_BT, first_BT.long().cumsum(1) - 1, slot_T - begin_BT)
