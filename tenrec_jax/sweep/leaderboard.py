"""The runs of a sweep in the order of their objective on the validation part, and which of them really differ from a reference."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenrec_jax import stages
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.compare import compare
from tenrec_jax.evaluation.statistics import Estimate
from tenrec_jax.evaluation.tables import aligned, interval
from tenrec_jax.files import read_json
from tenrec_jax.provenance import ENVIRONMENT
from tenrec_jax.sweep.record import Sweep, short_names
from tenrec_jax.sweep.units import Unit

FILE = "leaderboard.json"
MUST_AGREE = ("protocol", "data_sha256", "split_sha256")


@dataclass(frozen=True)
class Place:
    """A finished unit.

    Attributes:
        unit: its name.
        objective: on the validation part, with its 95 % interval over users.
        less_reference: its objective less the reference's, paired by user; None for the reference itself.
        differs: whether the interval of that difference excludes 0.
        settings: those that vary, by dotted key.
        seconds: of its stages up to the validation.
    """

    unit: str
    objective: Mapping[str, float | None]
    less_reference: Estimate | None
    differs: bool
    settings: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class Leaderboard:
    """The finished units, best first.

    Attributes:
        objective: metric of the validation part. larger_is_better: its direction.
        reference: name of the unit that the others are compared with: the base of an ablation, and else the best.
        rows: "protocol", "data_sha256" and "split_sha256" of what all were measured on, and "users", "rows".
        places: best first; of equal ones the one that was tried first.
        failed: names of units without a result.
        codes: versions of the code that made the units, one in a sweep that was not changed on the way.
        test: of the first unit alone, whose test part was read after all units had been judged: the objective there, and "opened", how
            often it was read; None if it was not.
    """

    objective: str
    larger_is_better: bool
    reference: str
    rows: Mapping[str, Any]
    places: tuple[Place, ...]
    failed: tuple[str, ...]
    codes: tuple[str, ...]
    test: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        places = [
            dataclasses.asdict(place) | {"less_reference": place.less_reference and place.less_reference.to_json()}
            for place in self.places
        ]
        return {"chosen_on": "validation"} | dataclasses.asdict(self) | {"places": places}


def ordered(sweep: Sweep, units: Sequence[Unit]) -> list[Unit]:
    """Finished units by their objective on the validation part, best first; those for which it is not defined last."""

    def key(unit: Unit) -> tuple[bool, float, int]:
        value = unit.value(sweep)["value"]
        sign = -1 if sweep.larger_is_better else 1
        return value is None, 0.0 if value is None else sign * value, unit.number

    return sorted(units, key=key)


def leaderboard(sweep: Sweep, finished: Sequence[Unit], failed: Sequence[Unit]) -> Leaderboard:
    """Compare the finished units of a sweep, of which there is at least one.

    Raises:
        UserError: they were not measured on the same rows: the log has changed on the way.
    """
    order = ordered(sweep, finished)
    results = {unit.name: read_json(unit.workdir / "eval" / "val.json") for unit in order}
    best = order[0]
    for name, found in results.items():
        different = [key for key in MUST_AGREE if found[key] != results[best.name][key]]
        if different:
            raise UserError(
                f"The units {best.name} and {name} differ in {', '.join(different)}, so they cannot be compared: the log has changed "
                "while the sweep ran. Start it in another --workdir."
            )
    rows = {key: results[best.name][key] for key in MUST_AGREE} | results[best.name]["counts"]
    reference = next((unit for unit in order if sweep.search == "ablation" and not unit.settings), best)
    places = tuple(_place(sweep, unit, reference) for unit in order)
    codes = sorted({read_json(unit.workdir / ENVIRONMENT)["code"]["tenrec_jax sources"] for unit in order})
    return Leaderboard(
        sweep.objective,
        sweep.larger_is_better,
        reference.name,
        rows,
        places,
        tuple(unit.name for unit in failed),
        tuple(codes),
    )


def with_test(board: Leaderboard, sweep: Sweep, best: Unit) -> Leaderboard:
    """The leaderboard with the test result of the best unit, which has been evaluated there."""
    opened = read_json(best.workdir / "eval" / "test_opened.json")["times"]
    return dataclasses.replace(board, test={**best.value(sweep, "test"), "opened": opened})


def _place(sweep: Sweep, unit: Unit, reference: Unit) -> Place:
    seconds = sum(record["seconds"] for record in stages.read(unit.workdir).values())
    difference = None if unit is reference else _less(sweep, unit.workdir, reference.workdir)
    differs = difference is not None and (difference.low > 0 or difference.high < 0)
    return Place(unit.name, unit.value(sweep), difference, differs, dict(unit.settings), round(seconds, 1))


def _less(sweep: Sweep, workdir: Path, reference: Path) -> Estimate:
    found = {row.metric: row.difference for row in compare([reference], [workdir], part="validation").metrics}
    difference = found[sweep.objective]
    if difference is None:
        raise AssertionError("compare pairs runs of the same rows")
    return difference


def text(board: Leaderboard) -> str:
    """The leaderboard for a console."""
    return "\n".join([*aligned(table_rows(board)), "", *notes(board)])


def table_rows(board: Leaderboard) -> list[list[str]]:
    """The leaderboard as a table, its header first."""
    names = short_names({key: None for place in board.places for key in place.settings})
    less = f"less {_number(board.reference)}"
    header = ["", "unit", f"validation {board.objective}", less, "", *names.values(), "seconds"]
    table = [header]
    for rank, place in enumerate(board.places, 1):
        settings = [_shown(place.settings.get(key, "")) for key in names]
        difference, mark = _signed(place.less_reference), "real" if place.differs else ""
        told = [str(rank), _number(place.unit), interval(place.objective), difference, mark]
        table.append([*told, *settings, f"{place.seconds:,.0f}"])
    return table


def notes(board: Leaderboard) -> list[str]:
    """What the table means, a line each."""
    best = board.places[0]
    real, direction = sum(place.differs for place in board.places), "larger" if board.larger_is_better else "smaller"
    rows, lines = board.rows, []
    if board.failed:
        lines.append(f"without a result: {', '.join(board.failed)}")
    if len(board.codes) > 1:
        lines.append(
            f"WARNING: the units were made by {len(board.codes)} versions of the code: {', '.join(board.codes)}."
        )
    lines += [
        f"{direction} is better; 95 % intervals over {rows['users']:,} users, {rows['protocol']}, data {rows['data_sha256'][:12]}.",
        f"{real} of {len(board.places) - 1} others really differ from {board.reference}: the interval of the paired difference excludes 0.",
        f"Chosen on the validation part alone: {best.unit}. As the best of {len(board.places)} its value there is too good by chance.",
    ]
    if board.test is None:
        lines.append("No unit's test part was read.")
    else:
        times = f"read {board.test['opened']} time{'s' * (board.test['opened'] > 1)}"
        lines.append(f"test {board.objective} of it, and of no other unit: {interval(board.test)}, {times}.")
    return lines


def _number(unit: str) -> str:
    return unit.partition("-")[0]


def _signed(difference: Estimate | None) -> str:
    if difference is None or not math.isfinite(difference.value):
        return ""
    return f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
