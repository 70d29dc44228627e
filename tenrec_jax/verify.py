"""Whether what is kept is as it was written: every file is read and compared with its manifest.

A folder says by its manifest what it is; a run says by `stages.json` what its stages left. Times and sizes are not trusted: what a disk
changed by itself is told too.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tenrec_jax import stages
from tenrec_jax.errors import UserError
from tenrec_jax.files import json_text
from tenrec_jax.sealed import FILES, KIND, DamagedError, Kind, damaged_files, foreign_files, read_manifest

MANIFESTS = sorted({kind.manifest for kind in Kind})
# A complete folder holds one of these, and beside it, or in a folder above, a manifest.
MARKS = {
    "users.arrow": "manifest.json",
    "item_ids.npy": "index.json",
    "probe.safetensors": "manifest.json",
    "rules.json": "manifest.json",
    "progress.json": "manifest.json",
}
# What a run set aside since it was damaged, and what it was writing or removing when it was killed.
UNUSED = ("set-aside", ".writing")
RUN, UNKNOWN = "run", "unknown"

EXAMPLES = """examples:
  tenrec-jax verify runs/quickstart               everything that a run left
  tenrec-jax verify table exported                several at once
  tenrec-jax verify /backup --json                whatever lies below a folder, for programs
"""


@dataclass(frozen=True)
class Verdict:
    """One artefact: a name of `sealed.Kind`, "run", or "unknown" where its manifest is lost; and what is wrong with it.

    Attributes:
        files, bytes: those that were read, the manifest among them.
        damaged: texts that begin with a file's path; empty where all is whole.
    """

    kind: str
    path: Path
    files: int
    bytes: int
    damaged: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Texts, numbers and lists alone."""
        return vars(self) | {"path": str(self.path), "damaged": list(self.damaged)}


def verify(path: Path, *, progress: bool = False) -> list[Verdict]:
    """Check everything that is kept at a path and below it.

    Args:
        progress: whether to show a bar on standard error once it has taken a second.

    Raises:
        UserError: there is nothing to check.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no folder.")
    found = list(_artefacts(path))
    if not found:
        raise UserError(
            f"{path} holds nothing to check. In it and in all folders below, verify looks for manifest.json (tables, recommenders, "
            "exported folders, checkpoints), index.json (indexes) and stages.json (runs)."
        )
    verdicts: list[Verdict] = []
    total = sum(_size(artefact.folder / file) for artefact in found for file in artefact.hashes)
    with tqdm(total=total, unit="B", unit_scale=True, delay=1, leave=False, disable=not progress) as bar:
        for artefact in found:
            problems = list(artefact.problems)
            for file, expected in artefact.hashes.items():
                problems += [problem for _, problem in damaged_files(artefact.folder, {file: expected})]
                bar.update(_size(artefact.folder / file))
            verdicts.append(_verdict(artefact.kind, artefact.folder, [artefact.name, *artefact.hashes], problems))
    named = {problem for verdict in verdicts for problem in verdict.damaged}
    runs = [_run(folder, named) for folder, names in _folders(path) if stages.FILE in names]
    return sorted([*verdicts, *runs], key=lambda verdict: verdict.path)


class _Artefact(NamedTuple):
    """A folder, its kind, its manifest's name, what the manifest says of files, and what is wrong without reading those."""

    folder: Path
    kind: str
    name: str
    hashes: dict[str, str]
    problems: tuple[str, ...] = ()


def _folders(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """The folders at and below a path, parents first, with the names of their files."""
    for folder, below, names in os.walk(path):
        below[:] = sorted(each for each in below if each[0] != "." and not any(mark in each for mark in UNUSED))
        yield Path(folder), names


def _artefacts(path: Path) -> Iterator[_Artefact]:
    sealed: set[Path] = set()
    for folder, names in _folders(path):
        here = [name for name in MANIFESTS if name in names]
        for name in here:
            sealed.add(folder)
            yield _opened(folder, name)
        # What lies below a sealed folder is named by that one.
        if not here and sealed.isdisjoint(folder.parents):
            for name in sorted({MARKS[name] for name in names if name in MARKS}):
                yield _Artefact(folder, UNKNOWN, name, {}, (f"{folder / name} is missing",))


def _opened(folder: Path, name: str) -> _Artefact:
    try:
        manifest = read_manifest(folder, name=name, remedy="")
    except DamagedError as error:
        return _Artefact(folder, UNKNOWN, name, {}, (str(error).strip(),))
    kind, hashes = manifest.get(KIND), manifest[FILES]
    if kind not in list(Kind) or Kind(kind).manifest != name:
        problem = f"{folder / name} is that of another folder, or of another version: its kind is {kind!r}"
        return _Artefact(folder, UNKNOWN, name, hashes, (problem,))
    foreign = foreign_files(folder, manifest, name=name) if kind == Kind.INDEX else []
    return _Artefact(folder, kind, name, hashes, tuple(foreign))


def _run(workdir: Path, named: set[str]) -> Verdict:
    """What `stages.json` says of a run; what is `named` is not named again."""
    try:
        left = {file for record in stages.read(workdir).values() for file in record[FILES]}
    except DamagedError:
        left = set()
    problems = [problem for problem in stages.check(workdir) if problem not in named]
    return _verdict(RUN, workdir, [stages.FILE, *sorted(left)], problems)


def _verdict(kind: str, folder: Path, files: list[str], problems: list[str]) -> Verdict:
    there = [folder / file for file in files if os.path.isfile(folder / file)]
    return Verdict(kind, folder, len(there), sum(map(_size, there)), tuple(problems))


def _size(path: Path) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def text(verdicts: list[Verdict]) -> str:
    """A line an artefact, and one a damaged file."""
    lines = []
    for verdict in verdicts:
        state = "DAMAGED" if verdict.damaged else "whole"
        kind = verdict.kind.replace("_", " ")
        lines.append(f"{kind}  {verdict.path}  {verdict.files:,} files, {verdict.bytes:,} bytes: {state}")
        lines += [f"  {problem}" for problem in verdict.damaged]
    # Names of files need not be text that a terminal can show.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `verify` to the command line."""
    parser = commands.add_parser(
        "verify",
        help="tell damage to tables, runs, recommenders and whatever else is kept",
        description="Reads every file and compares it with its manifest. Exit code: 0 all is whole, 1 something is damaged, "
        "2 there is nothing to check.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a folder; what is below it is found")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    verdicts = [verdict for path in options.paths for verdict in verify(path, progress=True)]
    print(json_text([verdict.to_json() for verdict in verdicts]) if options.json else text(verdicts), end="")
    print(end="" if options.json else "\n")
    return 1 if any(verdict.damaged for verdict in verdicts) else 0
