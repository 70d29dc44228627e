"""The recommender's folder: both stages' weights, the index, id maps, histories and rules, listed with their hashes in a manifest.

manifest.json          format version, content hash, models, vocabulary, SHA-256 of every other file; written last
retrieval.safetensors  ranking.safetensors (absent where no ranker was trained)
index/                 item vectors, searchable
users.parquet  items.parquet  events.parquet  rules.json
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx
from safetensors.numpy import load_file, save_file

from tenrec_jax.config import RankingConfig, RetrievalConfig, ServingConfig, from_mapping
from tenrec_jax.data.batches import TrainVocabulary
from tenrec_jax.data.interactions import Interactions
from tenrec_jax.errors import UserError
from tenrec_jax.files import read_json, sha256_of, write_json, written_whole
from tenrec_jax.models.features import Vocabulary
from tenrec_jax.models.ranker import Ranker, RankerConfig
from tenrec_jax.models.two_tower import TwoTower, TwoTowerConfig
from tenrec_jax.parameters import assembled, named
from tenrec_jax.retrieval.index import ItemIndex, load_index

FORMAT_VERSION = 1
RETRIEVAL_WEIGHTS, RANKING_WEIGHTS, INDEX = "retrieval.safetensors", "ranking.safetensors", "index"


class Model(NamedTuple):
    """A module taken apart: its structure and its parameters."""

    graphdef: nnx.GraphDef
    parameters: nnx.State

    def merged(self) -> Any:
        """The module itself."""
        return nnx.merge(self.graphdef, self.parameters)


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """What the recommender knows of users and items. Arrays are indexed by dense id; entry 0 is the unknown one.

    Attributes:
        user_id: raw ids [U + 1], int64 or, where ids are text, str objects. item_id: likewise [N + 1].
        gender, age: int32 [U + 1]. category: int32 [N + 1].
        trained_user, trained_item: int32 [U + 1] and [N + 1], the id or 0.
        item, action: the events, int32 [R] and int8 [R, A], one block a user. offsets: int64 [U + 2].
    """

    user_id: np.ndarray
    gender: np.ndarray
    age: np.ndarray
    trained_user: np.ndarray
    item_id: np.ndarray
    category: np.ndarray
    trained_item: np.ndarray
    item: np.ndarray
    action: np.ndarray
    offsets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a recommender was made of: the log's actions and hash, table sizes, and both models' configs (None: no ranker)."""

    actions: tuple[str, ...]
    data_sha256: str
    vocabulary: Vocabulary
    retrieval: TwoTowerConfig
    ranking: RankerConfig | None


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A recommender folder, loaded. `ranking` is None where no ranker was trained; `version` names the content."""

    version: str
    identity: Identity
    retrieval: Model
    ranking: Model | None
    index: ItemIndex
    catalogue: Catalogue
    serving: ServingConfig

    @property
    def actions(self) -> tuple[str, ...]:
        """The log's actions, in the order of the models' logits."""
        return self.identity.actions

    @property
    def max_length(self) -> int:
        """Events that a history may hold."""
        return self.identity.retrieval.features.max_length


def save_weights(path: Path, parameters: nnx.State) -> None:
    """Write parameters as safetensors, named by their dotted path."""
    with written_whole(path) as temporary:
        save_file({name: np.asarray(value, order="C") for name, value in named(parameters).items()}, temporary)


def load_weights(path: Path, like: nnx.State) -> nnx.State:
    """Read parameters written by `save_weights`; `like` gives structure, shapes and dtypes.

    Raises:
        UserError: a parameter is missing, left over or has another shape; all of them are named.
    """
    weights, expected = load_file(path), named(like)
    problems = [f"{name} is missing" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"{name} is left over" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name} is {weights[name].shape}, expected {expected[name].shape}"
        for name in sorted(expected.keys() & weights.keys())
        if weights[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError(f"{path} does not fit the model: {'; '.join(problems)}.")
    return jax.tree.map(jax.numpy.asarray, assembled(like, weights))


def with_weights(model: Model, path: Path) -> Model:
    """A model's structure with the parameters of a file."""
    return model._replace(parameters=load_weights(path, model.parameters))


def two_tower(config: TwoTowerConfig, vocabulary: Vocabulary) -> Model:
    """The structure of a two-tower, with abstract parameters."""
    return Model(*nnx.split(nnx.eval_shape(lambda: TwoTower(config, vocabulary, rngs=nnx.Rngs(0)))))


def ranker(config: RankerConfig, vocabulary: Vocabulary) -> Model:
    """The structure of a ranker, with abstract parameters."""
    return Model(*nnx.split(nnx.eval_shape(lambda: Ranker(config, vocabulary, rngs=nnx.Rngs(0)))))


def finish(
    folder: Path,
    *,
    table: Interactions,
    trained: TrainVocabulary,
    vocabulary: Vocabulary,
    retrieval: RetrievalConfig,
    ranking: RankingConfig,
    serving: ServingConfig,
) -> str:
    """Complete the folder of a run that holds the weights and the index.

    Returns:
        The version, a hash of the content.
    """
    catalogue = Catalogue(
        user_id=table.users.raw_id,
        gender=table.users.gender,
        age=table.users.age,
        trained_user=trained.user,
        item_id=table.items.raw_id,
        category=table.items.category,
        trained_item=trained.item,
        item=table.item_R,
        action=table.labels_RA,
        offsets=table.offsets,
    )
    identity = Identity(
        actions=table.actions,
        data_sha256=table.sha256,
        vocabulary=vocabulary,
        retrieval=retrieval.model,
        ranking=ranking.model if ranking.enabled else None,
    )
    return seal(folder, identity, catalogue, serving)


def seal(folder: Path, identity: Identity, catalogue: Catalogue, serving: ServingConfig) -> str:
    """Add to a folder that holds the weights and the index: id maps, histories, rules and, last, the manifest.

    Returns:
        The version, a hash of the content.
    """
    user_R = np.repeat(np.arange(len(catalogue.user_id), dtype=np.int32), np.diff(catalogue.offsets))
    labels = {action: catalogue.action[:, i] for i, action in enumerate(identity.actions)}
    tables = {
        "users": {
            "id": catalogue.user_id,
            "gender": catalogue.gender,
            "age": catalogue.age,
            "trained": catalogue.trained_user,
        },
        "items": {"id": catalogue.item_id, "category": catalogue.category, "trained": catalogue.trained_item},
        "events": {"user": user_R, "item": catalogue.item, **labels},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", compression="zstd", write_page_checksum=True)
    write_json(folder / "rules.json", dataclasses.asdict(serving))
    files = {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    version = hashlib.sha256("".join(f"{name}:{digest}\n" for name, digest in files.items()).encode()).hexdigest()[:16]
    manifest = {"format_version": FORMAT_VERSION, "version": version, **dataclasses.asdict(identity), "files": files}
    write_json(folder / "manifest.json", manifest)
    return version


def load(folder: Path) -> Artifact:
    """Load a recommender folder.

    Raises:
        UserError: the folder is not a recommender, was written by another format version, or a file is missing or damaged.
    """
    if not (folder / "manifest.json").is_file():
        raise UserError(
            f"{folder} is not a recommender: it has no manifest.json. Run experiments/launch.py to make one."
        )
    manifest = read_json(folder / "manifest.json")
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(f"{folder} has format version {manifest['format_version']}; this code reads {FORMAT_VERSION}.")
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing. Export the recommender again.")
        if sha256_of(folder / name) != digest:
            raise UserError(
                f"{folder / name} is damaged: its SHA-256 is not the manifest's. Export the recommender again."
            )
    identity = Identity(
        actions=tuple(manifest["actions"]),
        data_sha256=manifest["data_sha256"],
        vocabulary=from_mapping(manifest["vocabulary"], Vocabulary, "vocabulary"),
        retrieval=from_mapping(manifest["retrieval"], TwoTowerConfig, "retrieval"),
        ranking=from_mapping(manifest["ranking"], RankerConfig, "ranking") if manifest["ranking"] else None,
    )
    ranking = None
    if identity.ranking is not None:
        ranking = with_weights(ranker(identity.ranking, identity.vocabulary), folder / RANKING_WEIGHTS)
    return Artifact(
        version=manifest["version"],
        identity=identity,
        retrieval=with_weights(two_tower(identity.retrieval, identity.vocabulary), folder / RETRIEVAL_WEIGHTS),
        ranking=ranking,
        index=load_index(folder / INDEX),
        catalogue=_load_catalogue(folder, manifest["actions"]),
        serving=from_mapping(read_json(folder / "rules.json"), ServingConfig, "rules"),
    )


def _load_catalogue(folder: Path, actions: list[str]) -> Catalogue:
    def columns(name: str) -> dict[str, np.ndarray]:
        table = pq.read_table(folder / f"{name}.parquet", page_checksum_verification=True)
        return {column: table[column].to_numpy() for column in table.column_names}

    users, items, events = columns("users"), columns("items"), columns("events")
    return Catalogue(
        user_id=users["id"],
        gender=users["gender"],
        age=users["age"],
        trained_user=users["trained"],
        item_id=items["id"],
        category=items["category"],
        trained_item=items["trained"],
        item=events["item"],
        action=np.stack([events[action] for action in actions], axis=1),
        offsets=np.searchsorted(events["user"], np.arange(len(users["id"]) + 1)),
    )
