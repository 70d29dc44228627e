"""The runs of a sweep on disk: `WORKDIR/units/NNN-SETTINGS/`, each an ordinary workdir with two files more.

unit.json   the unit's number and settings, written before it runs
log.txt     what it printed, all attempts one after the other
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenrec_jax import stages
from tenrec_jax.config import STAGES
from tenrec_jax.errors import UserError
from tenrec_jax.files import read_json, write_json
from tenrec_jax.sealed import DamagedError, require_types
from tenrec_jax.sweep.record import Sweep, slug

UNITS, RECORD, LOG = "units", "unit.json", "log.txt"
# A unit is judged on its validation part; what comes after these reads the test part.
JUDGED = STAGES[: STAGES.index("validate") + 1]


@dataclass(frozen=True)
class Record:
    """The content of `unit.json`."""

    number: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """One run of a sweep: its number, from 0, what it has set beside the others, and its workdir."""

    number: int
    settings: Mapping[str, Any]
    workdir: Path

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.workdir.name

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.workdir / LOG

    def finished(self, wanted: tuple[str, ...] = JUDGED) -> bool:
        """Whether the wanted stages are done, and the last one's files are as it left them."""
        try:
            records = stages.read(self.workdir)
        except DamagedError:
            return False
        return set(wanted) <= set(records) and not stages.damage(self.workdir, wanted[-1], records[wanted[-1]])

    def value(self, sweep: Sweep, part: str = "val") -> Mapping[str, float | None]:
        """The objective with its interval: "value", "low" and "high", None where it is not defined; `part` is "val" or "test".

        Raises:
            UserError: the run has no such metric.
        """
        path = self.workdir / "eval" / f"{part}.json"
        results = read_json(path)
        of_stage = results if sweep.of == "retrieval" else results.get("ranking", {})
        if sweep.of not in of_stage:
            raise UserError(
                f"{path} has nothing of {sweep.of!r}, which the sweep's objective {sweep.objective!r} needs; it has "
                f"{', '.join(['retrieval', *results.get('ranking', {})])}."
            )
        found: Mapping[str, float | None] = of_stage[sweep.of][sweep.metric]
        return found


def new_unit(workdir: Path, number: int, settings: Mapping[str, Any]) -> Unit:
    """Write a unit of a sweep's workdir down, before it runs."""
    unit = Unit(number, settings, workdir / UNITS / f"{number:03d}-{slug(settings) or 'base'}")
    write_json(unit.workdir / RECORD, vars(Record(number, dict(settings))))
    return unit


def read_units(workdir: Path) -> list[Unit]:
    """The units that were written down, in the order of their numbers.

    Raises:
        UserError: a record is damaged, or one is missing between others.
    """
    units = []
    for path in sorted((workdir / UNITS).glob(f"*/{RECORD}")):
        values = read_json(path)
        require_types(values, Record, path)
        # JSON has lists where a setting is a tuple.
        settings = {key: tuple(v) if isinstance(v, list) else v for key, v in values["settings"].items()}
        units.append(Unit(values["number"], settings, path.parent))
    units.sort(key=lambda unit: unit.number)
    if [unit.number for unit in units] != list(range(len(units))):
        raise UserError(
            f"{workdir / UNITS} holds the units {', '.join(str(unit.number) for unit in units)}: one is missing or stands twice. "
            "Restore it, or name another --workdir."
        )
    return units
