"""Checkpoints of a training stage: Orbax, keeping the latest and the best."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

METRIC, STEP = "selection", "step"


class Progress(NamedTuple):
    """What selection has seen so far. `best_value` is larger-is-better."""

    step: int
    best_step: int
    best_value: float
    evaluations_since_best: int

    def after(self, step: int, value: float) -> "Progress":
        """Where selection stands after one more evaluation; of equal ones the first stays the best."""
        if value > self.best_value:
            return Progress(step, step, value, 0)
        return self._replace(step=step, evaluations_since_best=self.evaluations_since_best + 1)


class Checkpoints:
    """The folder `checkpoints/<stage>` of a run. A step is written under a temporary name and renamed, so it is whole or absent.

    In a run of several processes all of them make this object and call its methods alike: each writes its part of the global arrays.

    Args:
        folder: made if absent; one that all processes share.
        resize: take a state whose arrays have more or fewer rows at their end: those missing are zero. For tables that are padded to a
            multiple of the devices, restored on another number of them. Otherwise other shapes are an error.
    """

    def __init__(self, folder: Path, *, resize: bool = False) -> None:
        self._resize = resize

        def metric(metrics: dict[str, float]) -> float:
            return metrics[METRIC]

        def first_best(metrics: dict[str, float]) -> tuple[float, float]:
            # Of equal evaluations the first is the best one, for selection too; Orbax alone would keep the last.
            return metrics[METRIC], -metrics[STEP]

        keep = checkpoint_managers.AnyPreservationPolicy(
            [checkpoint_managers.LatestN(1), checkpoint_managers.BestN(get_metric_fn=first_best, n=1)]
        )
        options = ocp.CheckpointManagerOptions(best_fn=metric, best_mode="max", preservation_policy=keep)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, state: Any, progress: Progress, value: float) -> None:
        """Save in the background what resuming at `progress.step` needs; `value` is the selection metric there."""
        self._manager.save(
            progress.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(dict(progress._asdict()))
            ),
            metrics={METRIC: value, STEP: progress.step},
        )

    def latest(self, like: Any) -> tuple[Any, Progress] | None:
        """The newest state and where selection stood; None in a fresh run. `like` gives structure, shapes, dtypes and devices."""
        step = self._manager.latest_step()
        return None if step is None else self.restore(step, like)

    def restore(self, step: int, like: Any) -> tuple[Any, Progress]:
        """The state of `step`; `like` as for `latest`."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract, strict=not self._resize), progress=ocp.args.JsonRestore()
            ),
        )
        return restored.state, Progress(**restored.progress)

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
