"""What the stages of a run have finished: `stages.json`, with the SHA-256 of every file that each of them left.

A stage is finished if it stands there and its files are what they were. One whose files are missing or damaged is done again: since
everything is a function of configuration, data and seed, it gives the same files, and the stages after it stay finished.
"""

import hashlib
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tenrec_jax.files import flush, free_name, read_json, sha256_of
from tenrec_jax.sealed import FILES, DamagedError, damaged_files, read_stamped, write_stamped

logger = logging.getLogger(__name__)

FILE, METRICS = "stages.json", "metrics.jsonl"
SET_ASIDE = "set-aside"
REMEDY = "Run the command of this run again: it does again what is damaged."
# What a stage leaves beside the lines of metrics.jsonl, in the order of the stages: files, and folders that are sealed, by the name of
# their manifest.
LEFT: dict[str, tuple[str, ...]] = {
    "data": ("data.json", "source/*.truth.parquet"),
    "retrieval": ("recommender/retrieval.safetensors",),
    "index": (),
    "ranking": ("recommender/ranking.safetensors", "recommender/co_visits.safetensors", "recommender/order.json"),
    "validate": ("eval/val.json", "eval/val_*.parquet"),
    "evaluate": ("eval/test*.json", "eval/predictions.parquet", "eval/recommendations.parquet"),
    "export": ("recommender/*.parquet", "recommender/rules.json", "recommender/manifest.json"),
}
SEALED: dict[str, dict[str, str]] = {"data": {"table": "manifest.json"}, "index": {"recommender/index": "index.json"}}


def read(workdir: Path) -> dict[str, Any]:
    """The record of each finished stage, by name; none in a fresh folder.

    Raises:
        DamagedError: the file is not as it was written.
    """
    path = workdir / FILE
    return dict(read_stamped(path, remedy=REMEDY)["stages"]) if path.exists() else {}


def record(workdir: Path, stage: str, seconds: float) -> dict[str, Any]:
    """What `stages.json` says of a stage that has just been finished: its duration, its files' hashes, and that of the metrics so far."""
    paths = (path for pattern in LEFT[stage] for path in workdir.glob(pattern))
    manifests = [workdir / folder / name for folder, name in SEALED.get(stage, {}).items()]
    metrics = workdir / METRICS
    written = metrics.read_bytes() if metrics.exists() else b""
    return {
        "seconds": round(seconds, 2),
        FILES: {path.relative_to(workdir).as_posix(): sha256_of(path) for path in sorted([*paths, *manifests])},
        METRICS: {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()},
    }


def write(workdir: Path, records: dict[str, Any]) -> None:
    """Write `stages.json`."""
    write_stamped(workdir / FILE, {"stages": records})


def damage(workdir: Path, stage: str, left: dict[str, Any]) -> dict[str, str]:
    """The files of a finished stage that are missing or damaged, relative to the workdir, and what is wrong with each."""
    problems = dict(damaged_files(workdir, left[FILES]))
    for folder, name in SEALED.get(stage, {}).items():
        if f"{folder}/{name}" not in problems:
            hashes = read_json(workdir / folder / name)[FILES]  # the manifest is as the stage left it
            problems |= {f"{folder}/{file}": text for file, text in damaged_files(workdir / folder, hashes)}
    metrics, expected = workdir / METRICS, left[METRICS]
    written = metrics.read_bytes()[: expected["bytes"]] if metrics.exists() else b""
    if hashlib.sha256(written).hexdigest() != expected["sha256"]:
        problems[METRICS] = f"{metrics} is damaged: the lines up to stage {stage} are not those that it wrote"
    return problems


def check(workdir: Path) -> list[str]:
    """All files of a run's finished stages that are missing or damaged; `stages.json` itself among them."""
    try:
        records = read(workdir)
    except DamagedError as error:
        return [str(error)]
    return [problem for stage, left in records.items() for problem in damage(workdir, stage, left).values()]


def take_out_damaged(workdir: Path) -> dict[str, Any]:
    """Take finished stages whose files are damaged out of `stages.json`, and those files out of the way.

    Returns:
        What stood there of these stages.
    """
    try:
        records = read(workdir)
    except DamagedError as error:
        logger.warning("%s Every stage is looked at again.", error)
        set_aside(workdir, [FILE])
        return {}
    damaged = {}
    for stage, left in records.items():
        problems = damage(workdir, stage, left)
        if problems:
            damaged[stage] = left
            moved = set_aside(workdir, problems)
            kept = f" What was there is kept in {moved[0].parent}." if moved else ""
            logger.warning("%s\nStage %s is done again.%s", "\n".join(problems.values()), stage, kept)
    if damaged:
        write(workdir, {stage: records[stage] for stage in records if stage not in damaged})
    return damaged


def finish(workdir: Path, stage: str, seconds: float, before: dict[str, Any] | None) -> None:
    """Write a stage down as finished.

    Args:
        before: what stood there of it, if it was damaged and is done again. Of the stages after it, those stay finished whose own files
            hold, if its own are the same again.
    """
    left, records = record(workdir, stage, seconds), read(workdir)
    if before is not None:
        same, order = left[FILES] == before[FILES], list(LEFT)
        records = {
            name: other
            for name, other in records.items()
            if order.index(name) < order.index(stage) or (same and not damage(workdir, name, other))
        }
    write(workdir, records | {stage: left})


def set_aside(workdir: Path, names: Iterable[str]) -> list[Path]:
    """Move files of a run, given relative to it, to `set-aside/`, where nothing reads them; of a sealed folder, the whole folder.

    Returns:
        Where they are now; those that are missing are nowhere.
    """
    folders = [folder for sealed in SEALED.values() for folder in sealed]
    moved = []
    for name in dict.fromkeys(next((f for f in folders if name.startswith(f"{f}/")), name) for name in names):
        if not (workdir / name).exists():
            continue
        place = free_name(workdir / SET_ASIDE / name.replace("/", "_"))
        place.parent.mkdir(exist_ok=True)
        shutil.move(workdir / name, place)
        flush(place.parent)
        moved.append(place)
    return moved
