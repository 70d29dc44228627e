"""The report's figures as `<figure>` elements with inline SVG, drawn by matplotlib; empty where it is not installed.

Ink is `currentColor`, so a figure follows the page into dark mode. Ids carry the figure's name: one page holds several figures.
"""

import importlib.util
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

Estimate = Mapping[str, float | None]

# Colours with a contrast of at least 3:1 to the light and to the dark page; shapes tell them apart without colour.
SERIES = (
    ("#2f7fd1", "o"), ("#c9651a", "s"), ("#2b9367", "^"), ("#a763c4", "D"), ("#c2455b", "v"), ("#7d8590", "P")
)  # fmt: skip
INK = "#010203"
WIDTH = 4.6  # inches: on a telephone the text stays legible


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def interval_plot(
    name: str, title: str, series: Mapping[str, Mapping[str, Estimate]], *, mark: float | None = None
) -> str:
    """Dot and whisker, a row a group: series -> group -> estimate. `mark` is where a vertical line stands, such as chance.

    A series without a name has no entry in the legend.
    """
    groups = list(next(iter(series.values())))

    def draw(axes: Any) -> None:
        for place, (label, estimates) in enumerate(series.items()):
            colour, shape = SERIES[place % len(SERIES)]
            y = [row + 0.18 * (place - (len(series) - 1) / 2) for row in range(len(groups))]
            value, low, high = _parts(estimates.values())
            axes.plot(value, y, color=colour, marker=shape, markersize=4, linestyle="none", label=label or None)
            axes.hlines(y, low, high, color=colour, linewidth=1.5)
        if mark is not None:
            axes.axvline(mark, color=INK, linewidth=0.8, linestyle=":")
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks(range(len(groups)), groups)
        axes.set_ylim(len(groups) - 0.5, -0.5)

    return _drawn(name, title, draw, height=1.2 + (0.24 + 0.18 * len(series)) * len(groups))


def recall_curve(name: str, title: str, series: Mapping[str, Mapping[int, Estimate]]) -> str:
    """Recall against the length k of the list, with the interval as a band: series -> k -> estimate."""

    def draw(axes: Any) -> None:
        for place, (label, estimates) in enumerate(series.items()):
            colour, shape = SERIES[place % len(SERIES)]
            value, low, high = _parts(estimates.values())
            axes.plot(list(estimates), value, color=colour, marker=shape, markersize=4, label=label)
            axes.fill_between(list(estimates), low, high, color=colour, alpha=0.25, linewidth=0)
            axes.set_xscale("log")
            axes.set_xticks(list(estimates), [str(k) for k in estimates])
        axes.minorticks_off()
        axes.set_xlabel("k")
        axes.set_ylim(bottom=0)

    return _drawn(name, title, draw, height=2.8)


def curve_plot(
    name: str, title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], labels: tuple[str, str]
) -> str:
    """Curves in the unit square: series -> x and y, with the diagonal dotted. Nothing where there is no series."""
    if not series:
        return ""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        for place, (label, (x, y)) in enumerate(series.items()):
            colour, shape = SERIES[place % len(SERIES)]
            axes.plot(x, y, color=colour, marker=shape if len(x) <= 20 else None, markersize=4, label=label)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])

    return _drawn(name, title, draw, height=3.4)


def figures(*plots: str) -> str:
    """Figures side by side; nothing where there are none."""
    return f'<div class="figures">\n{"".join(plots)}</div>\n' if any(plots) else ""


def learning_curve(name: str, title: str, series: Mapping[str, Mapping[int, float]]) -> str:
    """Metrics by step: metric -> step -> value."""

    def draw(axes: Any) -> None:
        for place, (label, values) in enumerate(series.items()):
            colour, shape = SERIES[place % len(SERIES)]
            marker = shape if len(values) <= 50 else None
            axes.plot(list(values), list(values.values()), color=colour, marker=marker, markersize=4, label=label)
        axes.set_xlabel("step")

    return _drawn(name, title, draw, height=2.5)


def log_curve(name: str, title: str, series: Mapping[str, Mapping[float, float]], label: str) -> str:
    """Values on two logarithmic axes: series -> x -> y, all above 0; `label` names x."""

    def draw(axes: Any) -> None:
        for place, (entry, values) in enumerate(series.items()):
            colour, shape = SERIES[place % len(SERIES)]
            axes.plot(list(values), list(values.values()), color=colour, marker=shape, markersize=4, label=entry)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.minorticks_off()
        # Powers of ten would be set as formulas.
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_xlabel(label)

    return _drawn(name, title, draw, height=2.8)


def tradeoff_plot(
    name: str,
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: tuple[str, str],
    *,
    mark: float,
) -> str:
    """Points on a linear and a logarithmic axis: series -> x and y, y above 0; a vertical line stands at `mark`."""

    def draw(axes: Any) -> None:
        for place, (label, (x, y)) in enumerate(series.items()):
            colour, shape = SERIES[place % len(SERIES)]
            axes.plot(x, y, color=colour, marker=shape, markersize=4, linestyle="none", label=label)
        axes.axvline(mark, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])

    return _drawn(name, title, draw, height=2.8)


def bar_chart(
    name: str, title: str, values: Mapping[str, float], *, mark: float | None = None, low: float = 0.0
) -> str:
    """A horizontal bar a value, from `low` on; `mark` is where a vertical line stands. Nothing where there is no value."""
    if not values:
        return ""

    def draw(axes: Any) -> None:
        axes.barh(
            range(len(values)), [value - low for value in values.values()], left=low, color=SERIES[0][0], height=0.6
        )
        if mark is not None:
            axes.axvline(mark, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_xlim(left=low)

    return _drawn(name, title, draw, height=0.6 + 0.24 * len(values))


def _parts(estimates: Iterable[Estimate]) -> list[list[float]]:
    """Values and both ends of the intervals; NaN, which is not drawn, where one is not defined."""
    rows = [[estimate[key] for key in ("value", "low", "high")] for estimate in estimates]
    return [[float("nan") if number is None else number for number in column] for column in zip(*rows, strict=True)]


def _drawn(name: str, title: str, draw: Callable[[Any], None], *, height: float) -> str:
    if not can_draw():
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    settings: dict[Any, Any] = dict.fromkeys(inks, INK) | {
        "font.size": 9,
        "font.sans-serif": ["DejaVu Sans"],
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "axes.grid": True,
        "grid.alpha": 0.15,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    buffer = io.StringIO()
    # Settings are global in matplotlib, and put back here.
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = _inline(buffer.getvalue(), name, title)
    return f"<figure>\n{svg}<figcaption>{escape(title)}</figcaption>\n</figure>\n"


def _inline(document: str, name: str, title: str) -> str:
    """An SVG document without what HTML does not need: prologue, namespaces, and a style sheet that would apply to the page."""
    svg = document[document.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    label = f' role="img" aria-labelledby="{name}-title"><title id="{name}-title">{escape(title)}</title>'
    return svg.replace(">", label, 1)
