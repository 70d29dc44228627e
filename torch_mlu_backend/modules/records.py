"""The records that models read. Ids are dense, 0 is unknown or missing; integer tensors are int64 or int32."""

from typing import NamedTuple

from torch import Tensor


class Profile(NamedTuple):
    """What is known of users besides their events, integer tensors of one shape."""

    user: Tensor
    gender: Tensor
    age: Tensor


class Events(NamedTuple):
    """Events in time order.

    Shapes: item, category [B, T]; action [B, T, A] with the labels 0/1; mask [B, T], True on events that later ones see.
    """

    item: Tensor
    category: Tensor
    action: Tensor
    mask: Tensor


class Timeline(NamedTuple):
    """Rows of T slots into which the timelines of up to U users each are packed, padding at the end.

    Shapes: profile [B, U]; start [B, U], the slot of each user's first event, ascending from 0, T where there is no further user; events
    [B, T].
    """

    profile: Profile
    start: Tensor
    events: Events
