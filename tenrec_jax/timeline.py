"""The records that travel from the data to the models."""

from typing import Any, NamedTuple

Array = Any  # NumPy on the host, JAX within a step


class Profile(NamedTuple):
    """What is known of users besides their events, integer arrays of one shape. Ids are dense; 0 is unknown or missing."""

    user: Array
    gender: Array
    age: Array


class Events(NamedTuple):
    """Events in time order.

    Shapes: item, category [B, T]; action [B, T, A] with the labels 0/1; mask [B, T], True on events that later ones see. It is False on
    padding, and on events that are predicted but held out from the others. Ids are dense; 0 is unknown or padding.
    """

    item: Array
    category: Array
    action: Array
    mask: Array


class Timeline(NamedTuple):
    """Rows of T slots into which the timelines of up to U users each are packed, one after the other, padding at the end.

    Shapes: profile [B, U]; start [B, U], the slot of each user's first event, ascending from 0, and T where there is no further user;
    events [B, T]. A user's slots reach to the next user's first one.
    """

    profile: Profile
    start: Array
    events: Events
