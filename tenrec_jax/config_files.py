"""Config files of experiments, and what each says of itself.

A config file is a program: `get_config` gives its settings; its docstring begins with a line that says what it is, and has the lines
"Command:", "Hardware:", "Time:" and "Expected:". Where `get_config` takes a variant, `VARIANTS` says by name what each of them is.
"""

import re
import runpy
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tenrec_jax.errors import UserError


class Listed(NamedTuple):
    """A config or sweep as a table shows it: FILE.py or FILE.py:VARIANT, and what it is, needs and takes."""

    name: str
    summary: str
    hardware: str
    time: str


def listed(folder: Path) -> list[Listed]:
    """All files of a folder, each variant by itself, in the order of their names.

    Raises:
        UserError: a docstring lacks one of its lines.
    """
    return [entry for path in sorted(folder.glob("*.py")) for entry in _entries(path)]


def unreadable(error: Exception) -> str:
    """Where and how a Python file of settings failed, a sentence."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    file, line = getattr(error, "filename", None) or place.filename, getattr(error, "lineno", None) or place.lineno
    return f"{file}:{line}: {type(error).__name__}: {error}."


def markdown_table(entries: Iterable[Listed], title: str) -> str:
    """The entries as a table that a console shows as well as a page does; `title` heads the column of names."""
    rows = [(title, "what it is", "hardware", "time"), *((f"`{e.name}`", *e[1:]) for e in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line([cell.ljust(width) for cell, width in zip(row, widths, strict=True)]) for row in rows]
    return "\n".join([lines[0], _line(["-" * width for width in widths]), *lines[1:]])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _entries(path: Path) -> Iterable[Listed]:
    values = runpy.run_path(str(path))
    doc = values["__doc__"] or ""
    hardware, time = (_field(doc, name, path) for name in ("Hardware", "Time"))
    kinds = values.get("VARIANTS")
    if not kinds:
        yield Listed(path.name, doc.partition("\n")[0], hardware, time)
        return
    for variant, summary in kinds.items():
        yield Listed(f"{path.name}:{variant}", summary, hardware, time)


def _field(doc: str, name: str, path: Path) -> str:
    """What a line of a docstring says, with the lines that continue it."""
    found = re.search(rf"^{name}:[ ]+(.+(?:\n[ ]+.+)*)", doc, re.MULTILINE)
    if found is None:
        raise UserError(f'{path}: its docstring has no line "{name}: ...": say there what the experiment needs.')
    return " ".join(found[1].split())
