"""A run that is told to stop (SIGTERM, or Ctrl-C) keeps what it has done and ends with exit code 128 + the signal, 143 for SIGTERM.

Between steps the training loop looks whether a stop was asked for; it then saves a checkpoint and leaves by `Stopped`. Everywhere else
there is nothing to save, since a stage that is interrupted is done again or goes on from its checkpoint: there a thread ends the process,
which also works while the main thread compiles, evaluates or waits for another process. `hold` and `release` tell the two apart.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_at_once(number: int, _: FrameType | None) -> None:
    """A signal handler for as long as there is nothing to save."""
    sys.stderr.write(f"\nStopped by {signal.Signals(number).name} before the run began. The same command starts it.\n")
    sys.stderr.flush()
    os._exit(128 + number)


class Stopped(BaseException):
    """The run was told to stop, and everything is saved. Not an `Exception`: nobody recovers from it."""

    def __init__(self, number: signal.Signals, place: str) -> None:
        super().__init__(f"Stopped by {number.name} {place}; everything is saved. The same command goes on from there.")
        self.exit_code = 128 + number


class Stopping:
    """What a process knows of requests to stop. One that was just made hears of none; `installed` listens to signals.

    Attributes:
        place: where the run is, for the message: "in stage data".
        before_exit: called by the thread before it ends the process; waits for a checkpoint that is being written.
    """

    def __init__(self) -> None:
        self.place = "before the first stage"
        self.before_exit: Callable[[], None] = _nothing
        self._asked: signal.Signals | None = None
        self._unsaved, self._held = threading.Lock(), False

    @classmethod
    @contextmanager
    def installed(cls) -> Iterator["Stopping"]:
        """Listen to `SIGNALS`, in the main thread, until the context ends. A second signal ends the process at once."""
        stopping = cls()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        previous = signal.set_wakeup_fd(writer)
        # The handlers do nothing: the byte that arrives in the pipe is read by the thread, whatever the main thread is doing.
        handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=stopping._listen, args=(reader,), name="stopping", daemon=True).start()
        try:
            yield stopping
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous)
            os.close(writer)  # the thread reads the end, and ends

    @property
    def asked(self) -> bool:
        """Whether this process was told to stop."""
        return self._asked is not None

    def hold(self) -> None:
        """From now on there are steps that no checkpoint holds: a stop has to wait for the loop."""
        if not self._held:
            self._unsaved.acquire()
            self._held = True

    def release(self) -> None:
        """From now on there is nothing to save: a stop ends the process, after `before_exit`."""
        if self._held:
            self._held = False
            self._unsaved.release()

    def stopped(self, step: int) -> Stopped:
        """The exception by which the loop leaves after its checkpoint of `step`; in a process that was not asked, another one was."""
        return Stopped(self._asked or signal.SIGTERM, f"{self.place} after step {step}")

    def _listen(self, reader: int) -> None:
        with os.fdopen(reader, "rb", buffering=0) as signals:
            while received := signals.read(1):
                if received[0] not in SIGNALS:
                    continue
                if self.asked:
                    os._exit(128 + received[0])
                self._asked = signal.Signals(received[0])
                threading.Thread(target=self._end, name="ending", daemon=True).start()

    def _end(self) -> None:
        with self._unsaved:
            self.before_exit()
            stopped = Stopped(self._asked or signal.SIGTERM, self.place)
            sys.stdout.flush()
            sys.stderr.write(f"\n{stopped}\n")
            sys.stderr.flush()
            os._exit(stopped.exit_code)


def _nothing() -> None:
    """There is nothing to wait for."""
