"""Where a run's numbers go: `metrics.jsonl` and `timings.jsonl`, TensorBoard and the console's progress bar.

`metrics.jsonl` holds what the configuration and the data decide: a run that was killed and resumed leaves the same file as one that was
not. `timings.jsonl` holds what the clock and the machine decide.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from tenrec_jax.files import write_text
from tenrec_jax.stages import METRICS

TIMINGS, BAD_BATCHES = "timings.jsonl", "bad_batches.jsonl"
# What a checkpoint keeps a copy of: these files are part of a run's result.
KEPT = (METRICS, BAD_BATCHES)


class MetricsWriter:
    """Appends the numbers of one stage to the two files and to TensorBoard, and its bad steps to `bad_batches.jsonl`.

    Args:
        workdir: of the run.
        stage: name of the stage; written into every line and before every TensorBoard tag.
        resume_from: lines of this stage beyond this step belong to work that will be done again; they are dropped.
        logs: the texts of the files in `KEPT` as of that step, from its checkpoint: they are written anew, whatever has become of the
            files. None in a stage that starts.
    """

    def __init__(self, workdir: Path, stage: str, *, resume_from: int, logs: Mapping[str, str] | None) -> None:
        self._stage, self._workdir = stage, workdir
        if logs is not None:
            for name in KEPT:
                (workdir / name).unlink(missing_ok=True)
            for name, text in logs.items():
                write_text(workdir / name, text)
        self._metrics, self._timings = (_reopened(workdir / name, stage, resume_from) for name in (METRICS, TIMINGS))
        if (workdir / BAD_BATCHES).exists():
            _reopened(workdir / BAD_BATCHES, stage, resume_from).close()
        # It brings PyTorch along where that is installed: seconds, and memory, which only training should pay.
        import tensorboardX

        self._tensorboard = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard" / stage), purge_step=resume_from + 1, flush_secs=10
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of `metrics.jsonl`, and one TensorBoard point a value."""
        self._append(self._metrics, step, values)

    def write_timings(self, step: int, values: Mapping[str, float]) -> None:
        """One line of `timings.jsonl`, and one TensorBoard point a value."""
        self._append(self._timings, step, values)

    def write_bad_batch(self, step: int, examples: Mapping[str, Any]) -> None:
        """One line of `bad_batches.jsonl`; see `Task.examples`."""
        with (self._workdir / BAD_BATCHES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self._stage, "step": step, **examples}) + "\n")

    def logs(self) -> dict[str, str]:
        """The texts of the files in `KEPT` that are there."""
        paths = (self._workdir / name for name in KEPT)
        return {path.name: path.read_text(encoding="utf-8") for path in paths if path.exists()}

    def close(self) -> None:
        """Write out what is buffered."""
        self._metrics.close()
        self._timings.close()
        self._tensorboard.close()

    def _append(self, file: TextIO, step: int, values: Mapping[str, float]) -> None:
        file.write(json.dumps({"stage": self._stage, "step": step, **values}) + "\n")
        file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of `metrics.jsonl` or `timings.jsonl`; none if there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def progress_bar(total: int, description: str, *, initial: int = 0, unit: str = "step", disable: bool = False) -> tqdm:
    """A progress bar with rate and ETA, on standard error; one that shows nothing if `disable`."""
    description = f"{description:<22}"
    return tqdm(
        total=total, initial=initial, desc=description, unit=unit, dynamic_ncols=True, mininterval=0.5, disable=disable
    )


def _reopened(path: Path, stage: str, resume_from: int) -> TextIO:
    """A file to append to, without the stage's lines beyond a step and without a line that a kill cut off."""
    if path.exists():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= resume_from]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return path.open("a", encoding="utf-8")
