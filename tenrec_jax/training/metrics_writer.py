"""Where a run's numbers go: `metrics.jsonl`, TensorBoard and the console's progress bar."""

import json
from pathlib import Path
from typing import Any

import tensorboardX
from tqdm import tqdm

# Since the stage's last line, the share of the time in which no step ran because the next batch was not assembled. An upper bound: a wait
# counts in full if the step before has ended by its end.
DATA_WAIT_SHARE = "data_wait_share"


class MetricsWriter:
    """Appends the metrics of one stage to `metrics.jsonl` and to TensorBoard.

    Args:
        workdir: of the run.
        stage: name of the stage; written into every line and before every TensorBoard tag.
        resume_from: lines of this stage beyond this step belong to work that will be done again; they are dropped.
    """

    def __init__(self, workdir: Path, stage: str, *, resume_from: int) -> None:
        self._stage = stage
        path = workdir / "metrics.jsonl"
        if path.exists():
            _drop_lines(path, stage, resume_from)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard" / stage), purge_step=resume_from + 1, flush_secs=10
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of JSON, and one TensorBoard point a value."""
        self._file.write(json.dumps({"stage": self._stage, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
        self._tensorboard.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """All lines of a run's `metrics.jsonl`; none if there is no such file."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def progress_bar(total: int, description: str, *, initial: int = 0, unit: str = "step", disable: bool = False) -> tqdm:
    """A progress bar with rate and ETA, on standard error; one that shows nothing if `disable`."""
    description = f"{description:<22}"
    return tqdm(
        total=total, initial=initial, desc=description, unit=unit, dynamic_ncols=True, mininterval=0.5, disable=disable
    )


def _drop_lines(path: Path, stage: str, resume_from: int) -> None:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    kept = [line for line in lines if line["stage"] != stage or line["step"] <= resume_from]
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
