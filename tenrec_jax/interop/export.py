"""A recommender as a folder that `torch_mlu_backend` serves with PyTorch alone, and the way back.

manifest.json          format version, kind, where it came from, SHA-256 of every other file and of the manifest itself; written last
retrieval.safetensors  ranking.safetensors (absent where there is no ranker): weights in PyTorch's names and layout
co_visits.safetensors  order.json (both absent where there are none)
users.safetensors  items.safetensors (with the vectors that retrieval searches)  events.safetensors
ids.json               raw ids, where they are text          rules.json
probe.safetensors      inputs and the outputs that JAX gave for them
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from tenrec_jax import artifact
from tenrec_jax.artifact import Artifact, Catalogue, Identity
from tenrec_jax.co_visits import CoVisits
from tenrec_jax.config import ServingConfig
from tenrec_jax.errors import UserError
from tenrec_jax.files import json_text, read_json, write_json
from tenrec_jax.interop import probe, weights
from tenrec_jax.retrieval.index import IndexConfig, build_index
from tenrec_jax.sealed import KIND, VERSION, Kind, check_files, read_manifest_of, require_types
from tenrec_jax.sealed import seal as seal_folder
from tenrec_jax.workspace import refuse_used, workspace
from torch_mlu_backend import config as mirror_config
from torch_mlu_backend.errors import UserError as MirrorError

FORMAT_VERSION = 6
KINDS = (Kind.EXPORTED_RECOMMENDER, Kind.ORIGINAL_RANKER, Kind.ORIGINAL_TWO_TOWER)
RETRIEVAL, RANKING, PROBE = "retrieval.safetensors", "ranking.safetensors", "probe.safetensors"
USERS, ITEMS, EVENTS = "users.safetensors", "items.safetensors", "events.safetensors"
IDS, RULES, MANIFEST = "ids.json", "rules.json", "manifest.json"
REMEDY = "Copy or export it again."
AGREEMENT = 1e-5


def export(recommender: Path, out: Path) -> Artifact:
    """Write the recommender of a folder for the mirror.

    Returns:
        What was exported.

    Raises:
        UserError: no recommender, one with a setting that the mirror lacks, or `out` is not empty.
    """
    refuse_used(out)
    loaded = artifact.load(recommender)
    _refuse_unsupported(loaded.identity)
    with workspace(out) as folder:
        _write(folder, loaded)
    return loaded


def bring_back(exported: Path, out: Path) -> Artifact:
    """Write a recommender folder from an exported one, whose weights may have been trained further in PyTorch.

    The index is built anew from the item tower. The models here must give the outputs that the folder's probe holds.

    Raises:
        UserError: no exported recommender, a damaged one, other outputs than the probe's, or `out` is not empty.
    """
    refuse_used(out)
    manifest = read_manifest(exported)
    if manifest[KIND] != Kind.EXPORTED_RECOMMENDER:
        raise UserError(
            f"{exported} holds a {manifest[KIND]}, which has no catalogue: there is no recommender to make."
        )
    require_types(manifest, _Facts, exported / MANIFEST)
    with workspace(out) as folder:
        _write_recommender(folder, exported, manifest)
        _check_probe(artifact.load(folder), exported / PROBE)
    return artifact.load(out)


def item_vectors(loaded: Artifact) -> np.ndarray:
    """The item tower's vectors of the items in the index, [N, D], in order of their dense ids."""
    return _item_vectors(loaded.retrieval, loaded.catalogue, np.sort(loaded.index.item_ids_N))


def seal(folder: Path, kind: Kind, facts: dict[str, Any]) -> None:
    """Write the manifest: `facts` and the hashes of all files there."""
    seal_folder(folder, {KIND: kind, VERSION: FORMAT_VERSION} | facts, name=MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with all files checked against it.

    Raises:
        UserError: not an exported folder, another format version, or files that are missing or damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is no exported folder: it has no {MANIFEST}. Run tenrec-jax export to make one.")
    manifest = read_manifest_of(folder, *KINDS, version=FORMAT_VERSION, name=MANIFEST, remedy=REMEDY)
    check_files(folder, manifest, remedy=REMEDY)
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


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What the manifest of an exported recommender must say beside its kind."""

    version: str
    log_kind: str
    actions: tuple[str, ...]
    categories: tuple[str, ...]
    data_sha256: str
    index: dict[str, Any]


def _write(out: Path, loaded: Artifact) -> None:
    identity, catalogue = loaded.identity, loaded.catalogue
    retrieval = weights.Description(weights.TWO_TOWER, identity.retrieval, identity.vocabulary)
    weights.save(out / RETRIEVAL, retrieval, loaded.retrieval.parameters)
    if loaded.ranking is not None:
        ranking = weights.Description(weights.RANKER, identity.ranking, identity.vocabulary)
        weights.save(out / RANKING, ranking, loaded.ranking.parameters)
    if loaded.co_visits is not None:
        loaded.co_visits.save(out / artifact.CO_VISITS)
        write_json(out / artifact.ORDER, dataclasses.asdict(loaded.order))
    _save_catalogue(out, catalogue, np.sort(loaded.index.item_ids_N), item_vectors(loaded))
    write_json(out / RULES, dataclasses.asdict(loaded.serving))
    inputs = probe.draw(loaded)
    save_arrays(out / PROBE, {f"inputs/{k}": v for k, v in inputs._asdict().items()} | probe.outputs(loaded, inputs))
    index = dataclasses.asdict(loaded.index.config)
    facts = _Facts(
        loaded.version, identity.log_kind, identity.actions, identity.categories, identity.data_sha256, index
    )
    seal(out, Kind.EXPORTED_RECOMMENDER, dataclasses.asdict(facts))


def _write_recommender(out: Path, exported: Path, manifest: dict[str, Any]) -> None:
    retrieval, two_tower = weights.load(exported / RETRIEVAL, weights.TWO_TOWER)
    ranking, ranker = weights.load(exported / RANKING, weights.RANKER) if RANKING in manifest["files"] else (None, None)
    catalogue, indexed_N = _load_catalogue(exported)
    identity = Identity(
        log_kind=manifest["log_kind"],
        actions=tuple(manifest["actions"]),
        categories=tuple(manifest["categories"]),
        data_sha256=manifest["data_sha256"],
        vocabulary=retrieval.vocabulary,
        retrieval=retrieval.config,
        ranking=ranking.config if ranking else None,
    )
    artifact.save_weights(out / artifact.RETRIEVAL_WEIGHTS, two_tower.parameters)
    if ranker is not None:
        artifact.save_weights(out / artifact.RANKING_WEIGHTS, ranker.parameters)
    if artifact.CO_VISITS in manifest["files"]:
        CoVisits.load(exported / artifact.CO_VISITS).save(out / artifact.CO_VISITS)
        write_json(out / artifact.ORDER, dataclasses.asdict(artifact.load_order(exported / artifact.ORDER)))
    vectors_ND = _item_vectors(two_tower, catalogue, indexed_N)
    config = artifact.settings(manifest["index"], IndexConfig, exported / MANIFEST, "index")
    build_index(vectors_ND, indexed_N, config).save(out / artifact.INDEX)
    rules = artifact.settings(read_json(exported / RULES), ServingConfig, exported / RULES)
    artifact.seal(out, identity, catalogue, rules)


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
    text = _text_ids(exported / IDS) if (exported / IDS).exists() else {}
    user_id, item_id = ([] if name in text else ["id"] for name in ("users", "items"))
    users = weights.arrays(exported / USERS, ["gender", "age", "trained", "offsets", *user_id])
    items = weights.arrays(exported / ITEMS, ["category", "trained", "indexed", "vectors", *item_id])
    events = weights.arrays(exported / EVENTS, ["item", "action"])
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


def _text_ids(path: Path) -> dict[str, list[str]]:
    text = read_json(path)
    fits = isinstance(text, dict) and all(
        name in ("users", "items") and isinstance(ids, list) and all(isinstance(raw, str) for raw in ids)
        for name, ids in text.items()
    )
    if not fits:
        raise UserError(f"{path} holds no raw ids. {REMEDY}")
    return text


def _item_vectors(two_tower: artifact.Model, catalogue: Catalogue, item_N: np.ndarray) -> np.ndarray:
    model = two_tower.merged()
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.item_vectors(catalogue.trained_item[item_N], catalogue.category[item_N]))


def _check_probe(loaded: Artifact, path: Path) -> None:
    arrays = weights.arrays(path, [f"inputs/{field}" for field in probe.Inputs._fields])
    inputs = probe.Inputs(**{field: arrays[f"inputs/{field}"] for field in probe.Inputs._fields})
    for name, found in probe.outputs(loaded, inputs).items():
        if name not in arrays or arrays[name].shape != found.shape:
            raise UserError(f"{path} is that of another model: {name} is missing or misshapen. {REMEDY}")
        worst = float(np.abs(found - arrays[name]).max())
        if not worst <= AGREEMENT * max(1.0, float(np.abs(arrays[name]).max())):
            raise UserError(
                f"{path}: {name} differs by {worst:.2g} from what these weights give here. Save the folder again."
            )
