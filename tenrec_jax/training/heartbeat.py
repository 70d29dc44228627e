"""The heartbeat of a worker: a byte a second to the launcher, for as long as the worker gets on."""

import contextlib
import os
import threading
import time
from collections.abc import Mapping

HEARTBEAT = "TENREC_JAX_HEARTBEAT"
INTERVAL_SECONDS = 1.0
# A training step that takes longer than this counts as hung.
STEP_SECONDS = 600.0


class Heartbeat:
    """Beats from a thread of its own, so that compiling or evaluating for an hour is not taken for hanging.

    Between steps of a training loop the main thread has to be heard of too: if no step comes within `step_seconds`, the beats stop.

    Args:
        pipe: to beat into; None in a process that nobody watches.
        step_seconds: what a step may take.
    """

    def __init__(self, pipe: int | None = None, step_seconds: float = STEP_SECONDS) -> None:
        self._pipe, self._step_seconds = pipe, step_seconds
        self._due: float | None = None
        if pipe is not None:
            os.write(pipe, b".")  # at once: from now on silence counts
            threading.Thread(target=self._beat, args=(pipe,), name="heartbeat", daemon=True).start()

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> "Heartbeat":
        """That of this process, whose launcher says in the environment where it listens."""
        return cls(int(environment[HEARTBEAT]) if HEARTBEAT in environment else None)

    def step(self) -> None:
        """A step of a training loop is done; the next one is due."""
        self._due = time.monotonic() + self._step_seconds

    def idle(self) -> None:
        """No step is due: an evaluation or another stage takes as long as it takes."""
        self._due = None

    def _beat(self, pipe: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # the launcher is gone, or listens no more
            while True:
                due = self._due
                if due is None or time.monotonic() < due:
                    os.write(pipe, b".")
                time.sleep(INTERVAL_SECONDS)
