"""Exported folders: read, checked completely, and written again with weights that were trained further here.

manifest.json          format version, kind, where it came from, SHA-256 of every other file and of the manifest itself; written last
retrieval.safetensors  ranking.safetensors (absent where there is no ranker); model.safetensors where a model of the original system is held
co_visits.safetensors  order.json (both absent where there are none)
users.safetensors  items.safetensors (with the vectors that retrieval searches)  events.safetensors
ids.json               raw ids, where they are text          rules.json
probe.safetensors      inputs and the outputs that they should give
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_mlu_backend import safetensors_file, weights
from torch_mlu_backend.co_visits import CoVisits, Order
from torch_mlu_backend.errors import UserError
from torch_mlu_backend.modules.two_tower import TwoTower

FORMAT_VERSION = 6
RECOMMENDER, ORIGINAL_RANKER, ORIGINAL_TWO_TOWER = "exported_recommender", "original_ranker", "original_two_tower"
KINDS = (RECOMMENDER, ORIGINAL_RANKER, ORIGINAL_TWO_TOWER)
RETRIEVAL, RANKING, MODEL = "retrieval.safetensors", "ranking.safetensors", "model.safetensors"
CO_VISITS, ORDER = "co_visits.safetensors", "order.json"
USERS, ITEMS, EVENTS = "users.safetensors", "items.safetensors", "events.safetensors"
IDS, RULES, PROBE, MANIFEST = "ids.json", "rules.json", "probe.safetensors", "manifest.json"
OWN = "manifest_sha256"
BLOCK = 1 << 20

RawId = int | str


@dataclass(frozen=True)
class Catalogue:
    """What the recommender knows of users and items, on the CPU, by dense id; entry 0 is the unknown one.

    Attributes:
        user_id, item_id: dense id of each raw id. raw_item: raw ids by dense id, None for the unknown one.
        gender, age, trained_user: int32 [U + 1]. category, trained_item: int32 [N + 1].
        offsets: int64 [U + 2], where each user's events begin. item, action: the events, int32 [R] and int8 [R, A].
        indexed, vectors: dense ids of the items that retrieval searches, and their vectors [., D].
    """

    user_id: dict[RawId, int]
    item_id: dict[RawId, int]
    raw_item: list[RawId | None]
    gender: Tensor
    age: Tensor
    trained_user: Tensor
    category: Tensor
    trained_item: Tensor
    offsets: Tensor
    item: Tensor
    action: Tensor
    indexed: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Rules:
    """How answers are made.

    Attributes:
        candidates: items that retrieval hands to ranking.
        action_values: worth of each action. retrieval_weight: b in the score `worth * exp(b * (retrieval - the best candidate's))`.
    """

    candidates: int
    action_values: tuple[float, ...]
    retrieval_weight: float


@dataclass(frozen=True)
class Artifact:
    """A recommender, on the CPU. `ranking` and `co_visits` are None where there are none."""

    manifest: dict[str, Any]
    retrieval: weights.Model
    ranking: weights.Model | None
    co_visits: CoVisits | None
    order: Order
    catalogue: Catalogue
    rules: Rules

    @property
    def actions(self) -> tuple[str, ...]:
        """Names of the actions, in the order of the logits."""
        return tuple(self.manifest["actions"])

    @property
    def max_length(self) -> int:
        """Events that a history may hold."""
        return self.retrieval.description.config.features.max_length


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with all files checked against it.

    Raises:
        UserError: not an exported folder, another format version, or files that are missing, damaged or others; all are named.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is no exported folder: it has no {MANIFEST}. Run tenrec-jax export to make one.")
    try:
        written = path.read_bytes()
        manifest = json.loads(written.decode())
        # The same text too: a lost line end or another spelling of a number is damage as well.
        same_text = written == _text(manifest).encode()
        stated = manifest.pop(OWN)
        files = {name: str(digest) for name, digest in manifest["files"].items()}
        whole = same_text and stated == _digest(manifest) and all(map(_is_inside, files))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Export again.") from error
    if not whole:
        raise UserError(f"{path} is damaged: it is not as it was written. Export again.")
    _check_facts(folder, manifest)
    problems = [
        f"{folder / name} {problem}" for name, digest in files.items() if (problem := _problem(folder / name, digest))
    ]
    if problems:
        raise UserError("\n".join([*(f"{problem}." for problem in problems), "Export again."]))
    return manifest


def load(folder: Path) -> Artifact:
    """Load an exported recommender.

    Raises:
        UserError: as `read_manifest`, or the folder holds a model of the original system, which has no catalogue.
    """
    manifest = read_manifest(folder)
    if manifest["kind"] != RECOMMENDER:
        raise UserError(f"{folder} holds a {manifest['kind']}: it can score given items, but has no catalogue.")
    return Artifact(
        manifest,
        weights.load(folder / RETRIEVAL, weights.TWO_TOWER),
        weights.load(folder / RANKING, weights.RANKER) if RANKING in manifest["files"] else None,
        CoVisits.load(folder / CO_VISITS) if CO_VISITS in manifest["files"] else None,
        Order.load(folder / ORDER) if ORDER in manifest["files"] else Order(),
        _load_catalogue(folder),
        _load_rules(folder / RULES, manifest["actions"]),
    )


def save(folder: Path, out: Path, *, retrieval: nn.Module | None = None, ranking: nn.Module | None = None) -> None:
    """Write an exported recommender again with other weights, a probe of what they give on the CPU, and item vectors to match.

    Args:
        folder: what was exported. out: a new folder.
        retrieval, ranking: trained modules, on any device, of the same configs; None keeps the weights.

    Raises:
        UserError: `folder` is no exported recommender, or `out` is not empty.
    """
    before = load(folder)
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise UserError(f"{out} is not empty: name another folder, or remove this one.")
    # Under another name until it is complete, so that nothing half-written is found under this one.
    place = out.resolve()
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(partial, folder, before, retrieval, ranking)
        partial.rename(place)
        _flush(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(out: Path, folder: Path, before: Artifact, retrieval: nn.Module | None, ranking: nn.Module | None) -> None:
    from torch_mlu_backend.probe import recorded

    for name in before.manifest["files"]:
        shutil.copyfile(folder / name, out / name)
    for name, model, module in ((RETRIEVAL, before.retrieval, retrieval), (RANKING, before.ranking, ranking)):
        if module is not None and model is not None:
            weights.save(out / name, model._replace(module=module))
    items = safetensors_file.read(folder / ITEMS).tensors
    two_tower = cast(TwoTower, weights.load(out / RETRIEVAL, weights.TWO_TOWER).module)
    with torch.no_grad():
        indexed = items["indexed"].long()
        items["vectors"] = two_tower.item_vectors(items["trained"][indexed], items["category"][indexed])
    safetensors_file.write(out / ITEMS, items, {})
    _seal(out, before.manifest)
    safetensors_file.write(out / PROBE, recorded(out), {})
    _seal(out, before.manifest)
    for name in (*before.manifest["files"], MANIFEST):
        _flush(out / name)
    _flush(out)


def _seal(folder: Path, manifest: dict[str, Any]) -> None:
    manifest = manifest | {"files": {name: _sha256(folder / name) for name in manifest["files"]}}
    text = _text(manifest | {OWN: _digest(manifest)})
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _check_facts(folder: Path, manifest: dict[str, Any]) -> None:
    version, kind = manifest.get("format_version"), manifest.get("kind")
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has format version {version!r}; this mirror reads {FORMAT_VERSION}. Export again.")
    if kind not in KINDS:
        raise UserError(f"{folder / MANIFEST} is that of another kind of folder: {kind!r}, not {' or '.join(KINDS)}.")
    if kind == RECOMMENDER:
        actions = manifest.get("actions")
        are_texts = isinstance(actions, list) and all(isinstance(action, str) for action in actions)
        if not are_texts or not isinstance(manifest.get("version"), str):
            raise UserError(f"{folder / MANIFEST} cannot be read: actions or version: missing, or of another type.")


def _problem(path: Path, digest: str) -> str:
    if not os.path.isfile(path):  # of a name that no file can have too
        return "is missing"
    return "" if _sha256(path) == digest else "is damaged, or another one: its SHA-256 is not the manifest's"


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _text_ids(path: Path) -> dict[str, list[str]]:
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        for name, ids in text.items():
            if name not in ("users", "items") or not all(isinstance(raw, str) for raw in ids):
                raise ValueError(f"{name} are no texts")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}). Export again.") from error
    return text


def _load_rules(path: Path, actions: list[str]) -> Rules:
    """Rules that are off, as they are by default, need not be known here."""
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        candidates, rules = stated["candidates"], stated["rules"]
        values = tuple(float(rules["action_values"][action]) for action in actions)
        if type(candidates) is not int or candidates < 1:
            raise ValueError(f"candidates is {candidates!r}")
        weight = float(rules["retrieval_weight"])
        # What is on, and not by default.
        unread = rules.keys() - {"action_values", "retrieval_weight"}
        others = [name for name in unread if bool(rules[name]) != (name == "exclude_seen")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}). Export again.") from error
    if others:
        raise UserError(
            f"{path}: {', '.join(sorted(others))} are set to rules that this package does not have; export without them."
        )
    return Rules(candidates, values, weight)


def _flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _load_catalogue(folder: Path) -> Catalogue:
    text = _text_ids(folder / IDS) if (folder / IDS).exists() else {}
    user_id, item_id = ([] if name in text else ["id"] for name in ("users", "items"))
    users = safetensors_file.read_named(folder / USERS, ["gender", "age", "trained", "offsets", *user_id])
    items = safetensors_file.read_named(folder / ITEMS, ["category", "trained", "indexed", "vectors", *item_id])
    events = safetensors_file.read_named(folder / EVENTS, ["item", "action"])
    raw_user = text["users"] if "users" in text else users["id"][1:].tolist()
    raw_item = text["items"] if "items" in text else items["id"][1:].tolist()
    return Catalogue(
        user_id={raw: dense for dense, raw in enumerate(raw_user, start=1)},
        item_id={raw: dense for dense, raw in enumerate(raw_item, start=1)},
        raw_item=[None, *raw_item],
        gender=users["gender"],
        age=users["age"],
        trained_user=users["trained"],
        category=items["category"],
        trained_item=items["trained"],
        offsets=users["offsets"],
        item=events["item"],
        action=events["action"],
        indexed=items["indexed"],
        vectors=items["vectors"],
    )


def _text(manifest: Any) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            total.update(block)
    return total.hexdigest()
