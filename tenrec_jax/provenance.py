"""What decides a run's result beside chance: its configuration, its data and the code. A workdir tells when one of them has changed."""

import dataclasses
import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tenrec_jax import __version__, stages
from tenrec_jax.config import RunConfig
from tenrec_jax.data.logs import source_files
from tenrec_jax.data.manifest import read_manifest
from tenrec_jax.errors import UserError
from tenrec_jax.files import flat, read_json, sha256_of

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pyarrow", "scann")
CONFIG, ENVIRONMENT = "config.json", "env.json"


def code() -> dict[str, str]:
    """The versions of what computes: this package, a hash of its sources, and the packages that it computes with."""
    root = Path(__file__).parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    installed = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    versions = {name: metadata.version(name) for name in PACKAGES if name in installed}
    return {"tenrec_jax": __version__, "tenrec_jax sources": total.hexdigest()[:16], **versions}


def changed_config(config: RunConfig, workdir: Path) -> list[str]:
    """The settings that differ from those of the run in a workdir, a line each."""
    path = workdir / CONFIG
    if path.exists():
        return differences(_kept(path), dataclasses.asdict(config), "config.")
    if (workdir / stages.FILE).exists():
        raise UserError(f"{path} is missing, so this run's configuration is unknown. Name another --workdir.")
    return []


def changed_code(workdir: Path) -> list[str]:
    """The versions that differ from those with which the run in a workdir began, a line each."""
    path = workdir / ENVIRONMENT
    return differences(_kept(path).get("code", {}), code(), "") if path.exists() else []


def changed_data(config: RunConfig, workdir: Path) -> list[str]:
    """The source files that are no longer those of the run's table, a line each. Sources that are gone do not matter: the table has all."""
    if not config.data.path or not Path(config.data.path).exists():
        return []
    try:
        before = read_manifest(workdir / "table").sources
    except UserError:
        return []  # the table is damaged or gone: the run tells, and makes it again
    now = source_files([Path(config.data.path)], config.data.kind).content
    if len(before) != len(now):
        return [f"  {config.data.path}: {len(before)} files in the workdir's table, {len(now)} now"]
    return [
        f"  {path}: SHA-256 {source.sha256[:12]} in the workdir's table, {sha256[:12]} now"
        for source, path, sha256 in ((source, path, sha256_of(path)) for source, path in zip(before, now, strict=True))
        if sha256 != source.sha256
    ]


def _kept(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}), so it is unknown how this run was made. Restore the file, or name another --workdir."
        ) from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> list[str]:
    """The entries of nested mappings that differ, a line each; `prefix` stands before their dotted keys."""
    old, new = flat(before), flat(now)
    return [
        f"  {prefix}{key}: {old.get(key, '(absent)')!r} in the workdir, {new.get(key, '(absent)')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
