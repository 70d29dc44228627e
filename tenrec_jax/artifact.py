"""The recommender's folder: both stages' weights, the index, id maps, histories and rules, listed with their hashes in a manifest.

manifest.json          format version, content hash, models, vocabulary, SHA-256 of every other file and its own; written last
retrieval.safetensors  ranking.safetensors (absent where no ranker was trained)
co_visits.safetensors  order.json (both absent where the run counts none): the powers by which the candidates are ordered
index/                 item vectors, searchable
users.parquet  items.parquet  events.parquet  rules.json
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tenrec_jax.co_visits import CoVisits
from tenrec_jax.config import RankingConfig, RetrievalConfig, ServingConfig, from_mapping
from tenrec_jax.data.arrow import read_parquet
from tenrec_jax.data.batches import TrainVocabulary
from tenrec_jax.data.interactions import Interactions
from tenrec_jax.errors import UserError
from tenrec_jax.files import read_json, write_json, written_whole
from tenrec_jax.models.features import Vocabulary
from tenrec_jax.models.ranker import Ranker, RankerConfig
from tenrec_jax.models.two_tower import TwoTower, TwoTowerConfig
from tenrec_jax.order import Order
from tenrec_jax.parameters import assembled, named
from tenrec_jax.retrieval.index import ItemIndex, load_index
from tenrec_jax.sealed import FILES, KIND, VERSION, Kind, check_files, read_manifest_of, require_types
from tenrec_jax.sealed import seal as seal_folder

FORMAT_VERSION, MANIFEST = 6, "manifest.json"
REMEDY = "Copy it again, or make it again."
RETRIEVAL_WEIGHTS, RANKING_WEIGHTS, INDEX = "retrieval.safetensors", "ranking.safetensors", "index"
CO_VISITS, ORDER = "co_visits.safetensors", "order.json"
T = TypeVar("T")


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
    """What a recommender was made of: the log's kind, actions, names of categories 1, 2, ... (none where the log names none) and hash,
    table sizes, and both models' configs (None: no ranker)."""

    log_kind: str
    actions: tuple[str, ...]
    categories: tuple[str, ...]
    data_sha256: str
    vocabulary: Vocabulary
    retrieval: TwoTowerConfig
    ranking: RankerConfig | None


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A recommender folder, loaded.

    Attributes:
        version: names the content.
        ranking: None where no ranker was trained. co_visits: None where none were counted. order: of the candidates.
    """

    version: str
    identity: Identity
    retrieval: Model
    ranking: Model | None
    co_visits: CoVisits | None
    order: Order
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
        UserError: no readable file, or a parameter is missing, left over or has another shape; all of them are named.
    """
    try:
        weights, expected = load_file(path), named(like)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as weights: {error}.") from error
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


# The structures of the latest models are kept: one that takes another's place while it serves is most often of the same.
@lru_cache(maxsize=8)
def two_tower(config: TwoTowerConfig, vocabulary: Vocabulary) -> Model:
    """The structure of a two-tower, with abstract parameters."""
    return Model(*nnx.split(nnx.eval_shape(lambda: TwoTower(config, vocabulary, rngs=nnx.Rngs(0)))))


@lru_cache(maxsize=8)
def ranker(config: RankerConfig, vocabulary: Vocabulary) -> Model:
    """The structure of a ranker, with abstract parameters."""
    return Model(*nnx.split(nnx.eval_shape(lambda: Ranker(config, vocabulary, rngs=nnx.Rngs(0)))))


def finish(
    folder: Path,
    *,
    table: Interactions,
    categories: tuple[str, ...],
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
        log_kind=table.kind,
        actions=table.actions,
        categories=categories,
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
        with written_whole(folder / f"{name}.parquet") as temporary:
            pq.write_table(pa.table(columns), temporary, compression="zstd", write_page_checksum=True)
    write_json(folder / "rules.json", dataclasses.asdict(serving))
    facts: dict[str, Any] = {KIND: Kind.RECOMMENDER, VERSION: FORMAT_VERSION}
    return _version(seal_folder(folder, facts | dataclasses.asdict(identity), name=MANIFEST))


def load(folder: Path) -> Artifact:
    """Load a recommender folder.

    Raises:
        UserError: the folder is not a recommender, was written by another format version, or a file is missing or damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is not a recommender: it has no {MANIFEST}. Run experiments/launch.py to make one.")
    manifest = read_manifest_of(folder, Kind.RECOMMENDER, version=FORMAT_VERSION, name=MANIFEST, remedy=REMEDY)
    require_types(manifest, _Facts, folder / MANIFEST)
    check_files(folder, manifest, remedy=REMEDY)
    identity = _identity(manifest, folder / MANIFEST)
    catalogue = _load_catalogue(folder, identity.actions)
    serving = settings(read_json(folder / "rules.json"), ServingConfig, folder / "rules.json")
    ranking = None
    if identity.ranking is not None:
        ranking = with_weights(ranker(identity.ranking, identity.vocabulary), folder / RANKING_WEIGHTS)
    return Artifact(
        version=_version(manifest),
        identity=identity,
        retrieval=with_weights(two_tower(identity.retrieval, identity.vocabulary), folder / RETRIEVAL_WEIGHTS),
        ranking=ranking,
        co_visits=CoVisits.load(folder / CO_VISITS) if CO_VISITS in manifest[FILES] else None,
        order=load_order(folder / ORDER) if ORDER in manifest[FILES] else Order(),
        index=load_index(folder / INDEX),
        catalogue=catalogue,
        serving=serving,
    )


def load_order(path: Path) -> Order:
    """The powers that a run has fitted.

    Raises:
        UserError: the file does not hold them.
    """
    return settings(read_json(path), Order, path)


def settings(values: Any, kind: type[T], path: Path, name: str = "") -> T:
    """A dataclass from the values of a file, which may be of any kind; `name` is the dotted name of `values` in it.

    Raises:
        UserError: they are not its fields.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path} cannot be read: {name or 'it'} holds no settings. {REMEDY}")
    try:
        return from_mapping(values, kind, f"{path}: {name}" if name else str(path))
    except TypeError as error:
        raise UserError(f"{path} cannot be read: {error}. {REMEDY}") from error


class _Facts(NamedTuple):
    """What the manifest must say of an `Identity`."""

    log_kind: str
    actions: tuple[str, ...]
    categories: tuple[str, ...]
    data_sha256: str
    vocabulary: dict[str, Any]
    retrieval: dict[str, Any]
    ranking: dict[str, Any] | None


def _identity(manifest: Mapping[str, Any], path: Path) -> Identity:
    ranking = manifest["ranking"]
    return Identity(
        log_kind=manifest["log_kind"],
        actions=tuple(manifest["actions"]),
        categories=tuple(manifest["categories"]),
        data_sha256=manifest["data_sha256"],
        vocabulary=settings(manifest["vocabulary"], Vocabulary, path, "vocabulary"),
        retrieval=settings(manifest["retrieval"], TwoTowerConfig, path, "retrieval"),
        ranking=None if ranking is None else settings(ranking, RankerConfig, path, "ranking"),
    )


def _version(manifest: Mapping[str, Any]) -> str:
    files = "".join(f"{name}:{digest}\n" for name, digest in manifest[FILES].items())
    return hashlib.sha256(files.encode()).hexdigest()[:16]


def _load_catalogue(folder: Path, actions: Sequence[str]) -> Catalogue:
    users = _columns(folder / "users.parquet", ("id", "gender", "age", "trained"))
    items = _columns(folder / "items.parquet", ("id", "category", "trained"))
    events = _columns(folder / "events.parquet", ("user", "item", *actions))
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


def _columns(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of integers; the ids may be texts."""
    table = read_parquet(path, names, REMEDY)
    columns = {name: table[name].to_numpy() for name in names}
    wrong = [name for name, column in columns.items() if column.dtype.kind not in ("iO" if name == "id" else "i")]
    if wrong:
        raise UserError(f"{path} cannot be read: {', '.join(wrong)} must be integers without nulls. {REMEDY}")
    return columns
