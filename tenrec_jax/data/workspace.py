"""A folder that takes its name when it is complete: nothing half-written is ever found under that name."""

import errno
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tenrec_jax.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, to be renamed to it. What a killed process left there is removed first; afterwards nothing is left.

    Raises:
        UserError: another process is writing `out`, the place cannot be written to, or the disk is full.
    """
    folder, lock = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"Another process is writing {out}. Wait for it, or name another folder.") from None
            try:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink()
    except OSError as error:
        if error.errno in FULL:
            raise UserError(
                f"{out} cannot be written: {error.strerror or error}. No table was written; make room there or name another place."
            ) from error
        if isinstance(error, PermissionError):
            raise UserError(f"{out} cannot be written: {error.strerror}. Name another place.") from error
        raise
