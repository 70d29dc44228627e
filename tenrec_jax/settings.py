"""Settings that say which values they may have: the range stands in a field's type, and is checked wherever a config is made."""

import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tenrec_jax.errors import UserError


@dataclass(frozen=True)
class Range:
    """Finite numbers within bounds; `above` and `below` are no members themselves."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value lies within."""
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = [f"{name.replace('_', ' ')} {bound:g}" for name, bound in vars(self).items() if bound is not None]
        return " and ".join(words) or "a finite number"


Count = Annotated[int, Range(at_least=1)]
Natural = Annotated[int, Range(at_least=0)]
Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]
# Of a whole, none to all of it.
Fraction = Annotated[float, Range(at_least=0, at_most=1)]
# Shares and rates of which the whole makes no sense, such as dropout; and those that must not be none either.
Share = Annotated[float, Range(at_least=0, below=1)]
InnerShare = Annotated[float, Range(above=0, below=1)]


class SettingsError(UserError):
    """A config that cannot be.

    Attributes:
        problems: pairs of a field, or "" where several do not go together, and what is wrong, without the field's name.
    """

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{name} {text}".strip() for name, text in self.problems))


class Settings:
    """A frozen dataclass of settings. It cannot be made with values that its fields' ranges, or `conflicts`, refuse."""

    def __post_init__(self) -> None:
        problems = list(out_of_range(self)) or [("", text) for text in self.conflicts()]
        if problems:
            raise SettingsError(problems)

    def conflicts(self) -> Iterable[str]:
        """What is wrong with values that are in range each, but do not go together or are no known names: sentences."""
        return ()


def out_of_range(settings: Settings) -> Iterable[tuple[str, str]]:
    """The fields whose values lie outside their range, and what is wrong with each."""
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        if typing.get_origin(hint) is tuple:
            (entry, *_), values = typing.get_args(hint), {f"{name}[{place}]": each for place, each in enumerate(value)}
        else:
            entry, values = hint, {name: value}
        if typing.get_origin(entry) is Literal and value not in typing.get_args(entry):
            yield name, f"is {value!r}; it must be one of {', '.join(map(repr, typing.get_args(entry)))}"
        for bounds in getattr(entry, "__metadata__", ()):
            yield from _outside(bounds, values)


def _outside(bounds: Range, values: dict[str, Any]) -> Iterable[tuple[str, str]]:
    return ((name, f"is {value}; it must be {bounds}") for name, value in values.items() if not bounds.holds(value))
