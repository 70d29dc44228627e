"""The record that travels from the data to the models."""

from typing import Any, NamedTuple

Array = Any  # NumPy on the host, JAX within a step


class Timeline(NamedTuple):
    """Users and their events in time order, padding at the end.

    Shapes: user, gender, age [B]; item, category [B, T]; action [B, T, A] with the labels 0/1; mask [B, T], True on events that later
    ones see. Besides padding, it is False on events that are predicted but held out from the others. Ids are dense; 0 is unknown or
    padding.
    """

    user: Array
    gender: Array
    age: Array
    item: Array
    category: Array
    action: Array
    mask: Array
