"""A recommender as a folder that `torch_mlu_backend` serves with PyTorch alone, and the way back.

manifest.json          format version, kind, where it came from, SHA-256 of every other file and of the manifest itself; written last
retrieval.safetensors  ranking.safetensors (absent where there is no ranker): weights in PyTorch's names and layout
users.safetensors  items.safetensors (with the vectors that retrieval searches)  events.safetensors
ids.json               raw ids, where they are text          rules.json
probe.safetensors      inputs and the outputs that JAX gave for them
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from tenrec_jax import artifact
from tenrec_jax.artifact import Artifact, Catalogue, Identity
from tenrec_jax.config import ServingConfig, from_mapping
from tenrec_jax.errors import UserError
from tenrec_jax.files import json_text, read_json, sha256_of, write_json
from tenrec_jax.interop import probe, weights
from tenrec_jax.retrieval.index import IndexConfig, build_index
from torch_mlu_backend import config as mirror_config
from torch_mlu_backend.errors import UserError as MirrorError

FORMAT_VERSION = 1
RECOMMENDER = "recommender"
RETRIEVAL, RANKING, PROBE = "retrieval.safetensors", "ranking.safetensors", "probe.safetensors"
USERS, ITEMS, EVENTS = "users.safetensors", "items.safetensors", "events.safetensors"
IDS, RULES, MANIFEST = "ids.json", "rules.json", "manifest.json"
AGREEMENT = 1e-5


def export(recommender: Path, out: Path) -> Artifact:
    """Write the recommender of a folder for the mirror.

    Returns:
        What was exported.

    Raises:
        UserError: no recommender, one with a setting that the mirror lacks, or `out` is not empty.
    """
    loaded = artifact.load(recommender)
    identity, catalogue = loaded.identity, loaded.catalogue
    _refuse_unsupported(identity)
    new_folder(out)
    retrieval = weights.Description(weights.TWO_TOWER, identity.retrieval, identity.vocabulary)
    weights.save(out / RETRIEVAL, retrieval, loaded.retrieval.parameters)
    if loaded.ranking is not None:
        ranking = weights.Description(weights.RANKER, identity.ranking, identity.vocabulary)
        weights.save(out / RANKING, ranking, loaded.ranking.parameters)
    _save_catalogue(out, catalogue, np.sort(loaded.index.item_ids_N), item_vectors(loaded))
    write_json(out / RULES, dataclasses.asdict(loaded.serving))
    inputs = probe.draw(loaded)
    save_arrays(out / PROBE, {f"inputs/{k}": v for k, v in inputs._asdict().items()} | probe.outputs(loaded, inputs))
    facts = {
        "version": loaded.version,
        "actions": list(loaded.actions),
        "data_sha256": identity.data_sha256,
        "index": dataclasses.asdict(loaded.index.config),
    }
    seal(out, RECOMMENDER, facts)
    return loaded


def bring_back(exported: Path, out: Path) -> Artifact:
    """Write a recommender folder from an exported one, whose weights may have been trained further in PyTorch.

    The index is built anew from the item tower. The models here must give the outputs that the folder's probe holds.

    Raises:
        UserError: no exported recommender, a damaged one, other outputs than the probe's, or `out` is not empty.
    """
    manifest = read_manifest(exported)
    if manifest["kind"] != RECOMMENDER:
        raise UserError(
            f"{exported} holds a {manifest['kind']}, which has no catalogue: there is no recommender to make."
        )
    new_folder(out)
    retrieval, two_tower = weights.load(exported / RETRIEVAL)
    ranking, ranker = weights.load(exported / RANKING) if RANKING in manifest["files"] else (None, None)
    catalogue, indexed_N = _load_catalogue(exported)
    identity = Identity(
        actions=tuple(manifest["actions"]),
        data_sha256=manifest["data_sha256"],
        vocabulary=retrieval.vocabulary,
        retrieval=retrieval.config,
        ranking=ranking.config if ranking else None,
    )
    artifact.save_weights(out / artifact.RETRIEVAL_WEIGHTS, two_tower.parameters)
    if ranker is not None:
        artifact.save_weights(out / artifact.RANKING_WEIGHTS, ranker.parameters)
    vectors_ND = _item_vectors(two_tower, catalogue, indexed_N)
    index = build_index(vectors_ND, indexed_N, from_mapping(manifest["index"], IndexConfig, "index"))
    index.save(out / artifact.INDEX)
    artifact.seal(out, identity, catalogue, from_mapping(read_json(exported / RULES), ServingConfig, "rules"))
    loaded = artifact.load(out)
    _check_probe(loaded, exported / PROBE)
    return loaded


def item_vectors(loaded: Artifact) -> np.ndarray:
    """The item tower's vectors of the items in the index, [N, D], in order of their dense ids."""
    return _item_vectors(loaded.retrieval, loaded.catalogue, np.sort(loaded.index.item_ids_N))


def new_folder(out: Path) -> None:
    """Make a folder.

    Raises:
        UserError: it exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: name another folder, or remove this one.")
    out.mkdir(parents=True, exist_ok=True)


def seal(folder: Path, kind: str, facts: dict[str, Any]) -> None:
    """Write the manifest: `facts` and the hashes of all files there."""
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    manifest = {"format_version": FORMAT_VERSION, "kind": kind, **facts, "files": files}
    write_json(folder / MANIFEST, manifest | {"sha256": _digest(manifest)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with all files checked against it.

    Raises:
        UserError: not an exported folder, another format version, or a file that is missing or damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is no exported folder: it has no {MANIFEST}. Run tenrec-jax export to make one.")
    try:
        manifest = read_json(folder / MANIFEST)
        version, stated, files = manifest["format_version"], manifest.pop("sha256"), manifest["files"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({error}). Export again.") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has format version {version}; this code reads {FORMAT_VERSION}.")
    if stated != _digest(manifest):
        raise UserError(f"{folder / MANIFEST} is damaged: its SHA-256 is another. Export again.")
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing. Export again.")
        if sha256_of(folder / name) != digest:
            raise UserError(
                f"{folder / name} is damaged, or another one: its SHA-256 is not the manifest's. Export again."
            )
    return manifest


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write plain arrays as safetensors."""
    save_file({name: np.array(array, order="C", copy=True) for name, array in arrays.items()}, path)


def _refuse_unsupported(identity: Identity) -> None:
    for config, kind, path in (
        (identity.retrieval, mirror_config.TwoTowerConfig, "retrieval"),
        (identity.ranking, mirror_config.RankerConfig, "ranking"),
    ):
        if config is not None:
            try:
                mirror_config.from_mapping(json.loads(json_text(dataclasses.asdict(config))), kind, path)
            except MirrorError as error:
                raise UserError(f"the PyTorch mirror cannot compute this recommender: {error}") from None


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _save_catalogue(out: Path, catalogue: Catalogue, indexed_N: np.ndarray, vectors_ND: np.ndarray) -> None:
    raw = {"users": catalogue.user_id, "items": catalogue.item_id}
    text = {name: ids[1:].tolist() for name, ids in raw.items() if ids.dtype == object}
    if text:
        write_json(out / IDS, text)
    ids = {name: {} if name in text else {"id": array} for name, array in raw.items()}
    users = {"gender": catalogue.gender, "age": catalogue.age, "trained": catalogue.trained_user}
    items = {"category": catalogue.category, "trained": catalogue.trained_item}
    save_arrays(out / USERS, users | ids["users"] | {"offsets": catalogue.offsets})
    save_arrays(out / ITEMS, items | ids["items"] | {"indexed": indexed_N, "vectors": vectors_ND})
    save_arrays(out / EVENTS, {"item": catalogue.item, "action": catalogue.action})


def _load_catalogue(exported: Path) -> tuple[Catalogue, np.ndarray]:
    (_, users), (_, items), (_, events) = (weights.read(exported / name) for name in (USERS, ITEMS, EVENTS))
    text = read_json(exported / IDS) if (exported / IDS).exists() else {}
    for name, arrays in {"users": users, "items": items}.items():
        if name in text:
            arrays["id"] = np.array(["", *text[name]], object)
    catalogue = Catalogue(
        user_id=users["id"],
        gender=users["gender"],
        age=users["age"],
        trained_user=users["trained"],
        item_id=items["id"],
        category=items["category"],
        trained_item=items["trained"],
        item=events["item"],
        action=events["action"],
        offsets=users["offsets"],
    )
    return catalogue, items["indexed"]


def _item_vectors(two_tower: artifact.Model, catalogue: Catalogue, item_N: np.ndarray) -> np.ndarray:
    model = two_tower.merged()
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.item_vectors(catalogue.trained_item[item_N], catalogue.category[item_N]))


def _check_probe(loaded: Artifact, path: Path) -> None:
    _, arrays = weights.read(path)
    inputs = probe.Inputs(**{field: arrays[f"inputs/{field}"] for field in probe.Inputs._fields})
    for name, found in probe.outputs(loaded, inputs).items():
        worst = float(np.abs(found - arrays[name]).max())
        if not worst <= AGREEMENT * max(1.0, float(np.abs(arrays[name]).max())):
            raise UserError(
                f"{path}: {name} differs by {worst:.2g} from what these weights give here. Save the folder again."
            )
