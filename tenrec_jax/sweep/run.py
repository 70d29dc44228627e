"""Running a sweep: its units, ordinary runs in `WORKDIR/units/`, then the leaderboard, then the best one's test part.

1. `sweep.json` is written first. A sweep that differs from it is refused: what was chosen among other units is another choice.
2. A unit is written down before it runs, runs up to the stage `validate`, and is skipped once that is done. An interrupted one goes on.
3. What "tpe" proposes next follows from the results of all rounds before; units that are written down keep their settings. Settings that
   cannot be together are refused in the first round, before anything runs; in a later one they are a unit that fails.
4. The choice hangs on the validation part. The test part of the best unit alone is read, and only after all units have ended well: while
   one has no result yet, the best may still be another.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tenrec_jax import provenance
from tenrec_jax.config import STAGES, RunConfig, refuse_missing_sources
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.tables import interval
from tenrec_jax.files import locked, write_json
from tenrec_jax.sealed import read_stamped, write_stamped
from tenrec_jax.sweep.leaderboard import FILE, Leaderboard, leaderboard, ordered, with_test
from tenrec_jax.sweep.page import write_page
from tenrec_jax.sweep.pool import Done, Job, Pool
from tenrec_jax.sweep.record import RETRIEVAL, Sweep, with_settings
from tenrec_jax.sweep.search import Drawn, Trial, next_round
from tenrec_jax.sweep.units import JUDGED, Unit, new_unit, read_units

logger = logging.getLogger(__name__)

RECORD = "sweep.json"


def run_sweep(
    sweep: Sweep,
    base: RunConfig,
    workdir: Path,
    command: Sequence[str],
    *,
    parallel: int = 1,
    allow_changed: bool = False,
    grace_seconds: float = 30.0,
) -> Leaderboard:
    """Run what of a sweep has not run yet. Call it in the main thread.

    Args:
        sweep: what varies.
        base: configuration of all units, before what varies.
        workdir: of the sweep.
        command: what runs a unit; its settings (`--config.KEY=VALUE`), `--workdir` and `--stages` are put after it.
        parallel: units at a time, each in a process of its own with its share of the cores.
        allow_changed: go on with a sweep that other code began.
        grace_seconds: that units are given to save, once this process is told to stop.

    Returns:
        The leaderboard, which is also written to `leaderboard.json`, and drawn in `report.html`.

    Raises:
        UserError: the workdir holds another sweep; settings that cannot be; a log that is not there; another process in this workdir; no
            unit has a result.
        Stopped: this process was told to stop.
    """
    first_round(sweep, base)
    with (
        locked(workdir / ".lock", f"runs a sweep in {workdir}"),
        Pool.opened(parallel, grace_seconds=grace_seconds) as pool,
    ):
        _begin(sweep, base, workdir, allow_changed=allow_changed)
        units: list[Unit] = []
        for of_round in _rounds(sweep, workdir):
            units += of_round
            _run(pool, sweep, of_round, command, JUDGED)
        finished = [unit for unit in units if unit.finished()]
        if not finished:
            raise UserError(f"No unit of the sweep has a result; their logs are {workdir}/units/*/log.txt.")
        board = leaderboard(sweep, finished, [unit for unit in units if unit not in finished])
        _show(board, workdir)
        if board.failed:
            return board
        best = ordered(sweep, finished)[0]
        _run(pool, sweep, [best], command, STAGES)
        if best.finished(STAGES):
            board = with_test(board, sweep, best)
            _show(board, workdir)
        return board


def _show(board: Leaderboard, workdir: Path) -> None:
    write_json(workdir / FILE, board.to_json())
    write_page(board, workdir)


def first_round(sweep: Sweep, base: RunConfig) -> list[Drawn]:
    """The settings of the units that run first; of a grid and of random search, of all.

    Raises:
        UserError: settings that cannot be, or that leave out what the objective is of.
    """
    drawn = next_round(sweep, ())
    for settings in drawn:
        config = with_settings(base, settings)
        if sweep.of != RETRIEVAL and not config.ranking.enabled:
            raise UserError(
                f"The objective {sweep.objective!r} is of the ranking stage, which is off: set ranking.enabled, or take an objective of "
                f"{RETRIEVAL}."
            )
    return drawn


def _begin(sweep: Sweep, base: RunConfig, workdir: Path, *, allow_changed: bool) -> None:
    """Write the sweep down, or compare it with the one that is."""
    path = workdir / RECORD
    parameters = {key: {type(domain).__name__: vars(domain)} for key, domain in sweep.parameters.items()}
    what = {
        **vars(sweep),
        "parameters": parameters,
        "settings": dict(sweep.settings),
        "config": dataclasses.asdict(base),
    }
    del what["base"]  # its settings count, and not where the file lies
    code = provenance.code()
    if not path.exists():
        refuse_missing_sources(base.data)
        write_stamped(path, {"sweep": what, "code": code})
        return
    before = read_stamped(path, remedy="Restore it, or name another --workdir.")
    changed = provenance.differences(before["sweep"], what, "")
    if changed:
        raise UserError(
            "\n".join([f"{workdir} holds another sweep:", *changed, "Name another --workdir, or remove this one."])
        )
    changed = provenance.differences(before["code"], code, "")
    if changed and not allow_changed:
        remedy = "Name another --workdir, or go on all the same: --allow_changed. The leaderboard will say so."
        raise UserError("\n".join([f"{workdir} holds a sweep that other code began:", *changed, remedy]))


def _rounds(sweep: Sweep, workdir: Path) -> Iterator[list[Unit]]:
    """The units of each round, once those of the rounds before have run."""
    recorded, before = read_units(workdir), list[Unit]()
    while drawn := next_round(sweep, [Trial(unit.settings, _value(sweep, unit)) for unit in before]):
        units = []
        for number, settings in enumerate(drawn, len(before)):
            units.append(recorded[number] if number < len(recorded) else new_unit(workdir, number, settings))
        yield units
        before += units


def _value(sweep: Sweep, unit: Unit) -> float | None:
    return unit.value(sweep)["value"] if unit.finished() else None


def _run(pool: Pool, sweep: Sweep, units: Sequence[Unit], command: Sequence[str], wanted: tuple[str, ...]) -> None:
    """Run those that are not finished. What becomes of each is told."""
    waiting = {unit.name: unit for unit in units if not unit.finished(wanted)}
    if len(waiting) < len(units):
        logger.info("%d of %d units are finished already", len(units) - len(waiting), len(units))
    jobs = [Job(unit.name, unit_command(command, unit, wanted), unit.log) for unit in waiting.values()]
    for place, done in enumerate(pool.run(jobs), 1):
        logger.info(
            "[%d/%d] %s: %s", place, len(jobs), done.job.name, _outcome(done, waiting[done.job.name], sweep, wanted)
        )


def unit_command(command: Sequence[str], unit: Unit, wanted: Sequence[str] = JUDGED) -> tuple[str, ...]:
    """The command of a unit, as a person would type it."""
    settings = (f"--config.{key}={typed(value)}" for key, value in unit.settings.items())
    return (*command, *settings, f"--workdir={unit.workdir}", f"--stages={','.join(wanted)}")


def typed(value: Any) -> str:
    """A setting's value as a command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _outcome(done: Done, unit: Unit, sweep: Sweep, wanted: tuple[str, ...]) -> str:
    if done.code or not unit.finished(wanted):
        return f"FAILED with exit code {done.code}: {_last_line(unit.log)}; see {unit.log}"
    found: Mapping[str, float | None] = unit.value(sweep)
    return f"validation {sweep.objective} {interval(found)} after {done.seconds:,.0f} s"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it printed nothing"
