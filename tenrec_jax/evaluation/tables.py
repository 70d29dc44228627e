"""Numbers and tables as text."""

import math
from collections.abc import Sequence


def number(value: float | None) -> str:
    """Four places; n/a where a number is not defined."""
    return "n/a" if value is None or math.isnan(value) else f"{value:.4f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
