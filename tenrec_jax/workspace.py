"""A folder that takes its name when it is complete: nothing half-written is ever found under that name."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tenrec_jax.errors import UserError
from tenrec_jax.files import flush, flush_tree, full_disk, locked


@contextmanager
def workspace(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder beside `out`. Once the block has ended well it is flushed to disk and renamed to `out`; otherwise it is removed.

    What a killed process left there is removed first: the same command can be run again.

    Args:
        out: absent or empty.
        replace: `out` may hold something, which gives way as a whole. A process that is killed leaves the old folder or the new one
            under the name, or, between two renames, none.

    Raises:
        UserError: another process is writing `out`, the place cannot be written to, or the disk is full.
    """
    place = out.resolve()
    folder, before, lock = (place.with_name(f".{place.name}.{end}") for end in ("partial", "replaced", "lock"))
    try:
        with locked(lock, f"is writing {out}"):
            try:
                _clear(folder, before, place)
                folder.mkdir()
                yield folder
                flush_tree(folder)
                if replace and place.exists():
                    place.rename(before)
                folder.rename(place)
                flush(place.parent)
            finally:
                _clear(folder, before, place)
                lock.unlink()
    except OSError as error:
        if full_disk(error):
            raise UserError(
                f"{out} cannot be written: {error.strerror or error}. Nothing was written; make room there or name another place."
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise UserError(f"{out} cannot be written: {error.strerror}. Name another place.") from error
        raise


def _clear(folder: Path, before: Path, place: Path) -> None:
    """Remove what is half-written and what was replaced; what was to be replaced and was not comes back."""
    shutil.rmtree(folder, ignore_errors=True)
    if before.exists() and not place.exists():
        before.rename(place)
    shutil.rmtree(before, ignore_errors=True)


def refuse_used(out: Path) -> None:
    """Refuse a place for a new folder that holds something.

    Raises:
        UserError: it is a file, or a folder that is not empty.
    """
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise UserError(f"{out} is not empty: name another folder, or remove this one.")
