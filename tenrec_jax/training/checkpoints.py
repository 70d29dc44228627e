"""Checkpoints of a training stage: written by Orbax, sealed, checked before they are read.

    checkpoints/<stage>/<step>/     state/ (Orbax)  progress.json  logs/ (the run's files as of the step)  manifest.json
    checkpoints/<stage>/<step>.set-aside/   what was found damaged, for a person to look at

A checkpoint is written beside its place, sealed with the SHA-256 of every file, flushed to disk and renamed: it is whole, or absent. Orbax
does the arrays, which it writes well but neither hashes nor replaces by older ones when they are damaged.
"""

import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from tenrec_jax.errors import UserError
from tenrec_jax.files import flush, flush_tree, free_name, full_disk, read_json, write_json
from tenrec_jax.sealed import KIND, VERSION, DamagedError, Kind, open_sealed, seal
from tenrec_jax.training.parallel import DataParallel

logger = logging.getLogger(__name__)

FORMAT, MANIFEST = 1, Kind.CHECKPOINT.manifest
STATE, PROGRESS, LOGS = "state", "progress.json", "logs"
WRITING, ASIDE = ".writing", ".set-aside"
REMEDY = "The same command goes on from an older checkpoint."


class Progress(NamedTuple):
    """What selection has seen so far. `best_value` is larger-is-better, None before the first number."""

    step: int = 0
    best_step: int = 0
    best_value: float | None = None
    evaluations_since_best: int = 0

    def after(self, value: float) -> "Progress":
        """Where selection stands after an evaluation of this step; of equal ones the first stays the best, and NaN is never it."""
        if value == value and (self.best_value is None or value > self.best_value):
            return Progress(self.step, self.step, value, 0)
        return self._replace(evaluations_since_best=self.evaluations_since_best + 1)


class Saved(NamedTuple):
    """What a checkpoint holds beside the state.

    Attributes:
        progress: selection before the evaluation of this step.
        loop: what the loop remembers beside it, JSON.
        logs: by name, the text of the run's files to which lines are appended, as of the step.
    """

    progress: Progress
    loop: dict[str, Any]
    logs: dict[str, str]


class Checkpoints:
    """The folder of a stage's checkpoints. It keeps the two latest, should one be damaged, and the best step as of each of them.

    In a run of several processes all of them make this object and call its methods alike: each writes its part of the global arrays.

    Args:
        folder: made if absent; one that all processes share.
        parallel: of the run.
        origin: what the checkpoints are of; those of anything else are refused.
        resize: take a state whose arrays have more or fewer rows at their end: those missing are zero. For tables that are padded to a
            multiple of the devices, restored on another number of them. Otherwise other shapes are an error.
    """

    def __init__(
        self, folder: Path, parallel: DataParallel, origin: Mapping[str, Any], *, resize: bool = False
    ) -> None:
        self._folder, self._parallel, self._origin, self._resize = folder.resolve(), parallel, dict(origin), resize
        self._orbax = ocp.StandardCheckpointer()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        if parallel.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left_over in self._folder.glob(f"*{WRITING}"):
                shutil.rmtree(left_over)
        parallel.wait(f"checkpoints of {self._folder.name} opened")

    def save(self, state: Any, saved: Saved) -> None:
        """Save in the background what resuming at `saved.progress.step` needs.

        Args:
            state: as `DataParallel.unreplicate` returns it.
            saved: the rest; the main process's is written.

        Raises:
            UserError: there is no room for this checkpoint or the one before it. Older ones are whole.
        """
        self.finish()
        step = saved.progress.step
        place = self._folder / f"{step}{WRITING}"
        try:
            self._orbax.save(place / STATE, state)
        except (OSError, ValueError) as error:
            raise self._failed(step, error) from error
        self._writing = self._thread.submit(self._complete, place, saved)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is on disk.

        Raises:
            UserError: as for `save`.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def check(self) -> None:
        """Raise what went wrong in the background, without waiting."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def latest(self, like: Any) -> tuple[Any, Saved] | None:
        """The state and the rest of the newest checkpoint that is whole, as is that of the best step before it; None if there is none.

        Damaged ones are set aside and told. `like` gives structure, shapes, dtypes and devices.
        """
        step = int(self._parallel.from_main(self._newest_whole() if self._parallel.is_main else 0))
        return self.restore(step, like) if step else None

    def restore(self, step: int, like: Any) -> tuple[Any, Saved]:
        """The state of `step` and the rest; `like` as for `latest`.

        Raises:
            DamagedError: files are missing or damaged; they are named.
            UserError: the checkpoint is of something else, or does not fit.
        """
        place = self._folder / str(step)
        if self._parallel.is_main:
            self._open(step)
        self._parallel.wait(f"checkpoint {step} opened")  # the main process alone gives it its name
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            state = self._orbax.restore(place / STATE, abstract, strict=not self._resize)
        except ValueError as error:
            raise UserError(f"{place} does not fit this configuration: {error}. Name another --workdir.") from error
        return state, self._saved(step)

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.finish()
        self._thread.shutdown()
        self._orbax.close()

    def _complete(self, place: Path, saved: Saved) -> None:
        """Runs in the background: add the rest, seal, rename, and remove what is no longer kept."""
        step = saved.progress.step
        try:
            self._orbax.wait_until_finished()
            if not self._parallel.is_main:
                return
            write_json(place / PROGRESS, {"progress": saved.progress._asdict(), "loop": saved.loop})
            (place / LOGS).mkdir()
            for name, text in saved.logs.items():
                (place / LOGS / name).write_text(text, encoding="utf-8")
            seal(place, self._facts(step), name=MANIFEST)
            flush_tree(place)
            place.rename(self._folder / str(step))
            flush(self._folder)
        except (OSError, ValueError) as error:
            raise self._failed(step, error) from error
        latest = self._steps()[:2]
        kept = {*latest, *(self._saved(each).progress.best_step for each in latest)}
        for old in set(self._steps()) - kept:
            # By another name first: a removal that is interrupted leaves nothing that looks like a checkpoint.
            going = (self._folder / str(old)).rename(self._folder / f"{old}{WRITING}")
            shutil.rmtree(going)

    def _newest_whole(self) -> int:
        """The newest step from which a run can go on, after others were set aside; 0 if there is none."""
        found = self._steps()
        for step in found:
            best = 0
            try:
                self._open(step)
                best = self._saved(step).progress.best_step
                if best not in (0, step):
                    self._open(best)
            except DamagedError as error:
                # Without its best step a run cannot end as it would have; that one may be an older one in the list.
                self._set_aside(step, error)
                continue
            if step < found[0]:
                _tell_again(found[0] - step, f"step {step}")
            return step
        if found:
            _tell_again(found[0], "the start")
        return 0

    def _set_aside(self, step: int, error: DamagedError) -> None:
        place = free_name(self._folder / f"{step}{ASIDE}")
        (self._folder / str(step)).rename(place)
        flush(self._folder)
        logger.warning("checkpoint %d cannot be used and is kept as %s: %s", step, place, error)

    def _open(self, step: int) -> None:
        place = self._folder / str(step)
        try:
            manifest = open_sealed(place, name=MANIFEST, remedy=REMEDY)
        except FileNotFoundError as error:
            raise DamagedError(f"{place / MANIFEST} is missing. {REMEDY}") from error
        for name, expected in self._facts(step).items():
            if name == "step" and manifest.get(name) != expected:
                raise DamagedError(f"{place} holds the checkpoint of step {manifest.get(name)}. {REMEDY}")
            if manifest.get(name) != expected:
                raise UserError(
                    f"{place} is a checkpoint of another run: its {name} is {manifest.get(name)!r}, this run's {expected!r}. "
                    "Move it away, or name another --workdir."
                )

    def _saved(self, step: int) -> Saved:
        place = self._folder / str(step)
        value = read_json(place / PROGRESS)
        logs = {path.name: path.read_text(encoding="utf-8") for path in (place / LOGS).iterdir()}
        return Saved(Progress(**value["progress"]), value["loop"], logs)

    def _facts(self, step: int) -> dict[str, Any]:
        return {KIND: Kind.CHECKPOINT, VERSION: FORMAT, "step": step, **self._origin}

    def _steps(self) -> list[int]:
        """The steps of which there are checkpoints, newest first."""
        return sorted((int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()), reverse=True)

    def _failed(self, step: int, error: Exception) -> Exception:
        if not full_disk(error):
            return error
        older = ", ".join(map(str, self._steps())) or "none"
        return UserError(
            f"The checkpoint of step {step} could not be written to {self._folder}: {_last_line(error)}. Older ones are whole "
            f"(steps: {older}). Make room there and run the same command: it goes on from the newest."
        )


def _tell_again(steps: int, place: str) -> None:
    logger.warning("going on from %s: %d steps are computed again, with the same result", place, steps)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].rstrip(".")
