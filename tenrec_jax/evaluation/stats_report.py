"""The report on a table: `stats.json` for programs, `stats.html` for people; one page that needs nothing else."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenrec_jax.data.interactions import Interactions, open_table
from tenrec_jax.data.leakage import DEFAULT_ALARM, Leakage, find_leaks
from tenrec_jax.data.manifest import Manifest, read_manifest
from tenrec_jax.data.protocols import make_split
from tenrec_jax.data.stats import Distribution, TableStats, table_stats
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.figures import bar_chart, can_draw, log_curve
from tenrec_jax.evaluation.page import bullets, document, facts, heading, paragraph, table
from tenrec_jax.evaluation.twin_targets import Target, twin_targets
from tenrec_jax.files import write_json, write_text

JSON_FILE, PAGE_FILE = "stats.json", "stats.html"


@dataclass(frozen=True)
class TableReport:
    """Everything that `stats.json` holds; `targets` is empty unless the table is a twin whose truth was given."""

    stats: TableStats
    leakage: Leakage
    targets: tuple[Target, ...]

    def to_json(self) -> dict[str, Any]:
        """Nested dictionaries and lists."""
        return dataclasses.asdict(self) | {"flagged_columns": list(self.leakage.flagged)}


def write_stats(
    directory: Path,
    out: Path | None = None,
    *,
    protocol: str = "per_user_order",
    leak_auc: float = DEFAULT_ALARM,
    truth: Path | None = None,
) -> TableReport:
    """Measures the table in `directory` and writes `stats.json` and `stats.html` into `out`, by default the same folder.

    Args:
        directory: a folder that `ingest` wrote.
        out: where to write; made if missing.
        protocol: name of the split whose parts are described.
        leak_auc: AUC of a column alone from which it is flagged, in (0.5, 1].
        truth: file of a twin's true probabilities; with it the twin's targets are judged.

    Raises:
        UserError: no table there, an unknown protocol, a threshold out of range, or a truth that does not fit.
    """
    if not 0.5 < leak_auc <= 1:
        raise UserError(f"leak_auc is {leak_auc:g}: give an AUC above 0.5 (chance) and at most 1.")
    opened, manifest = open_table(directory), read_manifest(directory)
    report = _measure(opened, directory, manifest, protocol, leak_auc, truth)
    out = out or directory
    write_json(out / JSON_FILE, report.to_json())
    write_text(out / PAGE_FILE, stats_page(report, manifest))
    return report


def _measure(
    opened: Interactions, directory: Path, manifest: Manifest, protocol: str, leak_auc: float, truth: Path | None
) -> TableReport:
    split = make_split(protocol, opened)
    stats = table_stats(opened, split, duplicates=manifest.counts["duplicate_rows"])
    leakage = find_leaks(opened, directory, alarm=leak_auc)
    targets = twin_targets(opened, directory, stats, split, truth) if truth else ()
    return TableReport(stats, leakage, targets)


def stats_page(report: TableReport, manifest: Manifest) -> str:
    """The whole page as HTML."""
    stats = report.stats
    sections = {
        "Size": _size(stats, manifest),
        "Actions": _actions(stats),
        "Users and items": _distributions(stats),
        "Side features": _marginals(report.leakage),
        "Repeats": _repeats(stats),
        f"Split {stats.protocol}": _parts(stats),
        "Leakage": _leakage(report.leakage),
    }
    if report.targets:
        sections["Targets of the synthetic twin"] = _targets(report.targets)
    return document(f"Table of kind {stats.kind}", verdict(report), sections)


def verdict(report: TableReport) -> str:
    """What to know before using the table, in one or two sentences."""
    flagged = report.leakage.flagged
    if flagged:
        text = f"{len(flagged)} of {len(report.leakage.columns)} columns must not be inputs: {', '.join(flagged)}."
    else:
        text = f"No column alone reaches a click AUC of {report.leakage.alarm:g}."
    history = report.leakage.history
    if history and history.filled_first_rows > 0.5:
        text += " The history columns are filled from a user's first row on, before the log shows anything he did."
    judged = [target for target in report.targets if target.met is not None]
    if judged:
        text += (
            f" The twin meets {sum(bool(target.met) for target in judged)} of {len(judged)} targets judged at its size."
        )
    return text


def summary(report: TableReport) -> str:
    """The main numbers as text for a console, at most 100 characters wide."""
    stats = report.stats
    rates = ", ".join(f"{action} {percent(rate)}" for action, rate in stats.rates.items())
    lines = [
        f"{stats.rows:,} rows, {stats.users:,} users, {stats.items:,} items; kind {stats.kind}",
        f"actions: {rates}",
        f"rows per user: {_quantiles(stats.rows_per_user)}",
        f"rows per item: {_quantiles(stats.rows_per_item)}; Gini {stats.concentration.gini:.3f}, "
        f"top 1 % of items {percent(stats.concentration.top_1_percent)} of rows",
        f"repeated user and item {percent(stats.repeats.pairs_share)}, exact duplicates "
        f"{percent(stats.repeats.duplicates_share)}, clicked and not clicked {percent(stats.repeats.click_contradictions_share)}",
        f"split {stats.protocol}:",
    ]
    lines += [
        f"  {part.part:<10} {part.rows:>13,} rows, click {percent(part.rates['click'])}, on unseen items "
        f"{percent(part.unseen_rows)}"
        for part in stats.parts
    ]
    lines += [f"flagged: {column.name} ({column.reason})" for column in report.leakage.columns if column.flagged]
    lines += [
        f"missed: {target.name}: {_number(target.got)} instead of {_number(target.target)}"
        for target in report.targets
        if target.met is False
    ]
    return "\n".join(lines)


def percent(share: float) -> str:
    """A share in per cent, n/a for NaN."""
    return "n/a" if share != share else f"{100 * share:.2f} %"


def _number(value: float) -> str:
    return "n/a" if value != value else f"{value:,.4f}" if abs(value) < 10 else f"{value:,.1f}"


def _quantiles(distribution: Distribution) -> str:
    levels = {"median": "0.5", "p90": "0.9", "p99": "0.99", "most": "1.0"}
    return ", ".join(f"{name} {distribution.quantiles[level]:,.0f}" for name, level in levels.items())


def _size(stats: TableStats, manifest: Manifest) -> str:
    values: dict[str, Any] = {"Rows": f"{stats.rows:,}", "Users": f"{stats.users:,}", "Items": f"{stats.items:,}"}
    values["Sources"] = ", ".join(source.name for source in manifest.sources)
    return facts(values | {"Data hash": stats.sha256})


def _actions(stats: TableStats) -> str:
    rows = [[action, percent(rate)] for action, rate in stats.rates.items()]
    joint = [
        ["".join(map(str, cell.labels)), f"{cell.rows:,}", percent(cell.share)]
        for cell in sorted(stats.joint, key=lambda cell: -cell.rows)
    ]
    return table("Rates", ["action", "share of rows"], rows) + table(
        f"Joint table of {', '.join(stats.actions)}", ["labels", "rows", "share"], joint
    )


def _distributions(stats: TableStats) -> str:
    found = {
        "rows per user": stats.rows_per_user,
        "clicks per user": stats.clicks_per_user,
        "rows per item": stats.rows_per_item,
    }
    levels = list(stats.rows_per_user.quantiles)
    rows = [
        [name, f"{entry.mean:,.1f}", *(f"{entry.quantiles[level]:,.0f}" for level in levels)]
        for name, entry in found.items()
    ]
    header = ["", "mean", *(f"p{float(level) * 100:g}" for level in levels)]
    shape = stats.concentration
    values = {
        "Gini coefficient of items": f"{shape.gini:.4f}",
        "Rows on the top 1 % of items": percent(shape.top_1_percent),
        "Rows on the top item": percent(shape.top_item),
    }
    curves = {
        name: {max(1 - float(level), 1e-3): max(value, 0.5) for level, value in entry.quantiles.items()}
        for name, entry in found.items()
    }
    hint = "" if can_draw() else paragraph("Figures need matplotlib: pip install 'tenrec_jax[plot]' shows them.")
    return (
        table("Quantiles", header, rows)
        + facts(values)
        + hint
        + _side_by_side(
            log_curve("counts", "Counts by the share of users or items that have more", curves, "share that has more"),
            log_curve(
                "lorenz",
                "Share of the rows on the most popular items",
                {"items": {float(share): rows for share, rows in shape.lorenz.items()}},
                "share of the items",
            ),
        )
    )


def _marginals(leakage: Leakage) -> str:
    if not leakage.marginals:
        return paragraph("This log has no side features.")
    markup, plots = "", []
    for marginal in leakage.marginals:
        rows = [[value, percent(share)] for value, share in marginal.shares.items()]
        if marginal.other:
            rows.append(["other values", percent(marginal.other)])
        markup += table(marginal.column, ["value", "share of rows"], rows)
        shown = dict(sorted(marginal.shares.items(), key=lambda entry: -entry[1])[:10])
        plots.append(bar_chart(f"marginal-{marginal.column}", f"{marginal.column}: share of rows by value", shown))
    return markup + _side_by_side(*plots)


def _repeats(stats: TableStats) -> str:
    repeats = stats.repeats
    rows = [
        ["user and item stood on an earlier row", f"{repeats.pairs:,}", percent(repeats.pairs_share)],
        ["the same with equal labels", f"{repeats.same_labels:,}", percent(repeats.same_labels_share)],
        ["equal in every column", f"{repeats.duplicates:,}", percent(repeats.duplicates_share)],
        [
            "of pairs with and without a click",
            f"{repeats.click_contradictions:,}",
            percent(repeats.click_contradictions_share),
        ],
    ]
    return table("Rows beyond the first of their pair", ["", "rows", "share of all rows"], rows)


def _parts(stats: TableStats) -> str:
    lines: Sequence[tuple[str, Any]] = (
        ("rows", lambda part: f"{part.rows:,}"),
        ("users", lambda part: f"{part.users:,}"),
        ("items", lambda part: f"{part.items:,}"),
        *(((f"{action} rate", lambda part, action=action: percent(part.rates[action]))) for action in stats.actions),
        ("rows on items that training lacks", lambda part: percent(part.unseen_rows)),
        ("items that training lacks", lambda part: percent(part.unseen_items)),
        ("users that training shares", lambda part: percent(part.shared_users)),
        ("rows of users that training shares", lambda part: percent(part.rows_of_shared_users)),
        ("items that training shares", lambda part: percent(part.shared_items)),
    )
    rows = [[name, *(cell(part) for part in stats.parts)] for name, cell in lines]
    plot = bar_chart(
        "base-rates", "Click rate by part", {part.part: part.rates["click"] for part in stats.parts if part.rows}
    )
    return table("Parts", ["", *(part.part for part in stats.parts)], rows) + _side_by_side(plot)


def _leakage(leakage: Leakage) -> str:
    ordered = sorted(leakage.columns, key=lambda column: -column.auc if column.auc == column.auc else 0)
    rows = [
        [column.name, column.role, f"{column.values:,}", _number(column.auc), column.reading, column.reason or "–"]
        for column in ordered
    ]
    markup = table(
        f"What each column alone says about the click (alarm at {leakage.alarm:g})",
        ["column", "role", "distinct values", "AUC", "read by", "flagged because"],
        rows,
    )
    plot = bar_chart(
        "leaks",
        "AUC of each column alone; the dotted line is the alarm",
        {column.name: column.auc for column in ordered if column.auc == column.auc},
        mark=leakage.alarm,
        low=0.5,
    )
    return markup + _side_by_side(plot) + bullets(_reading_notes(leakage)) + _history(leakage)


def _reading_notes(leakage: Leakage) -> list[str]:
    return [
        "Rate: each value is replaced by its click rate in four fifths of the users and scored on the other fifth; for user ids "
        "the fifths are of rows. Value: the number itself. An AUC below one half counts as one less it.",
        f"The alarm is {leakage.alarm:g}. On Tenrec, models with all honest features reach a click AUC of .76 to .80 on true "
        "exposures: a column that alone reaches .8 knows what a model cannot.",
        "A post-exposure column is flagged whatever its AUC: it is written after the user has reacted, so it is never there "
        "when a list is ranked. watching_times is one: it follows from the click.",
        "Structure is what the order of the rows tells. Position from the end of a block is not known when a list is ranked.",
    ]


def _history(leakage: Leakage) -> str:
    history = leakage.history
    if history is None:
        return ""
    shares = [
        ["rows whose item is in their history", percent(history.target_in_history)],
        ["rows whose history holds a later click", percent(history.future)],
        ["history entries that the log shows clicked", percent(history.logged)],
        ["users with one and the same history", percent(history.static_users)],
        ["users whose first row has a history", percent(history.filled_first_rows)],
    ]
    lengths = [[length, percent(share)] for length, share in history.lengths.items()]
    return (
        heading("History columns")
        + table("What the history columns hold", ["", "share"], shares)
        + paragraph(
            "A history that is there on a user's first row, and is the same on all his rows, was made from clicks of which some "
            "come after the row: such columns leak the future. Where the rows of those clicks were deleted from the log (as in "
            "ctr_data_1M), no later click can be shown, and only these two numbers tell."
        )
        + table("Filled history columns", ["columns", "share of rows"], lengths)
    )


def _targets(targets: tuple[Target, ...]) -> str:
    words = {True: "yes", False: "no", None: "not judged"}
    rows = [
        [
            target.name,
            _number(target.target) if target.bound == "within" else f"{target.bound} {_number(target.target)}",
            _number(target.got),
            f"± {_number(target.tolerance)}" if target.bound == "within" else "–",
            words[target.met],
            target.note or "–",
        ]
        for target in targets
    ]
    return table("Published numbers and the twin's", ["", "target", "got", "tolerance", "met", "note"], rows)


def _side_by_side(*plots: str) -> str:
    return f'<div class="figures">\n{"".join(plots)}</div>\n' if any(plots) else ""
