"""Steps whose loss or gradient was not finite: counted, their examples written down, and after some in a row the run stopped."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from tenrec_jax.errors import UserError
from tenrec_jax.training.parallel import STEPS_BEHIND


class BadSteps:
    """Follows the steps of a stage. `Optimizer.update` has seen to it that a bad one moves nothing.

    Args:
        file: where the examples of bad steps go, for the message.
        limit: bad steps in a row after which the run stops.
        in_a_row: at the start.
        read: a number that is the same on all devices.
        write: told each bad step.
    """

    def __init__(
        self, file: Path, limit: int, in_a_row: int, read: Callable[[Any], Any], write: Callable[[int], None]
    ) -> None:
        self._file, self._limit, self.in_a_row, self._read, self._write = file, limit, in_a_row, read, write
        self._under_way: deque[tuple[int, jax.Array]] = deque()

    def add(self, step: int, bad: jax.Array) -> None:
        """A step was dispatched; `bad` will be 1 if it was bad, 0 if not.

        Raises:
            UserError: too many steps in a row were bad.
        """
        self._under_way.append((step, bad))
        if len(self._under_way) > STEPS_BEHIND:
            self._look()

    def settle(self) -> None:
        """Look at all steps so far, waiting for them; raises as `add` does."""
        while self._under_way:
            self._look()

    def _look(self) -> None:
        step, bad = self._under_way.popleft()
        if not int(self._read(bad)):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self._write(step)
        if self.in_a_row >= self._limit:
            raise UserError(
                f"{self.in_a_row} steps in a row, the last one {step + 1}, had a loss or gradient that is not finite. Their updates were "
                f"not applied, and the checkpoints are sound. {self._file} lists their examples: look at these, or lower the learning "
                "rate. train.max_bad_steps says how many in a row are borne."
            )
