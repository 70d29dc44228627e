"""Numbers and tables as text."""

import math
from collections.abc import Mapping, Sequence


def number(value: float | None) -> str:
    """Four places; n/a where a number is not defined."""
    return "n/a" if value is None or math.isnan(value) else f"{value:.4f}"


def percent(share: float | None) -> str:
    """A share in percent; n/a where it is not defined."""
    return "n/a" if share is None else f"{100 * share:.2f} %"


def interval(estimate: Mapping[str, float | None]) -> str:
    """A value with its interval; n/a where there is none."""
    if estimate["value"] is None:
        return "n/a"
    return f"{number(estimate['value'])} [{number(estimate['low'])}, {number(estimate['high'])}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
