"""`eval/predictions.parquet` and `eval/recommendations.parquet`: from them every number of a result can be computed again.

predictions: a row for each row of the evaluated part, in the log's order.

    row                    its number in the table
    user  item             raw ids
    click like ...         the labels, 0 or 1
    score_click ...        the model's probabilities, float32; absent without a ranker
    rank  tied             of a clicked item over the full catalogue: 1 + the items above it, and how many others score the same. Null where
                           nothing is ranked (not clicked, or the user is not in the sample); rank is infinite where the item was taken
                           out of the ranking because the user had seen it. Absent where the model is a ranker alone
    NAME_score_click ...   NAME_rank  NAME_tied       the same of each baseline, and of the oracle on a synthetic twin

recommendations: a row for each evaluated user: `user` and `items`, the raw ids of the model's list, best first.

The schema's metadata say what the numbers are of: `Origin`. Metrics of ties are means over all ways to break them.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tenrec_jax.data.arrow import as_arrow, as_numpy, read_parquet
from tenrec_jax.data.interactions import Interactions
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.evaluator import TargetRanks
from tenrec_jax.evaluation.places import Places
from tenrec_jax.evaluation.scorers import MODEL, Scorer
from tenrec_jax.files import parsed_json, written_whole
from tenrec_jax.sealed import require_types

FORMAT_VERSION = 1
_BLOCK = 1 << 18
_METADATA = b"tenrec_jax"
_REMEDY = "Evaluate the run again."


@dataclass(frozen=True)
class Origin:
    """What predictions are of.

    Attributes:
        part: "validation" or "test".
        protocol, data_sha256, split_sha256: of the split.
        exclude_seen: whether items that a user had seen were taken out of the ranking.
        catalogue: number of items that were ranked.
        actions: in order.
    """

    part: str
    protocol: str
    data_sha256: str
    split_sha256: str
    exclude_seen: bool
    catalogue: int
    actions: tuple[str, ...]
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, eq=False)
class Predictions:
    """The file, read; see the module. `ranked` are the places in it of the rows whose item was ranked, `places` those items' places."""

    origin: Origin
    row: np.ndarray
    user: np.ndarray
    item: np.ndarray
    labels_RA: np.ndarray
    score_RA: np.ndarray | None
    ranked: np.ndarray
    places: Places


def write_predictions(
    path: Path, origin: Origin, table: Interactions, rows: np.ndarray, scorers: Sequence[Scorer]
) -> None:
    """Write the predictions of all scorers on the rows of a part, ascending; block by block, the whole file or none.

    The scorer called `MODEL` writes the columns without a name before them.
    """
    metadata = {_METADATA: json.dumps(dataclasses.asdict(origin)).encode()}
    schema = pa.table(dict(_columns(table, rows[:0], scorers))).schema.with_metadata(metadata)
    with (
        written_whole(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            writer.write_table(pa.table(dict(_columns(table, block, scorers)), schema=schema))


def write_recommendations(
    path: Path, origin: Origin, table: Interactions, users: np.ndarray, ranks: TargetRanks
) -> None:
    """Write the list of each of these dense users."""
    listed = ranks.lists_UK > 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(listed.sum(axis=1))]), pa.int32())
    items = pa.ListArray.from_arrays(offsets, as_arrow(table.items.raw_id[ranks.lists_UK[listed]]))
    columns = {"user": as_arrow(table.users.raw_id[users]), "items": items}
    metadata = {_METADATA: json.dumps(dataclasses.asdict(origin)).encode()}
    listed_by_user = pa.table(columns).replace_schema_metadata(metadata)
    with written_whole(path) as temporary:
        pq.write_table(listed_by_user, temporary, compression="zstd", write_page_checksum=True)


def read_predictions(path: Path) -> Predictions:
    """The model's part of a file of predictions.

    Raises:
        UserError: there is no such file, or it is not one of predictions.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing: the run has not been evaluated on these rows, or by an older version. Run its command again. Units of a "
            "sweep have validation rows alone: --part validation."
        )
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}. {_REMEDY}") from error
    if _METADATA not in (schema.metadata or {}):
        raise UserError(f"{path} holds no predictions of this project: its schema has no metadata named tenrec_jax.")
    values = parsed_json(schema.metadata[_METADATA], f"{path}: metadata")
    require_types(values, Origin, path)
    if values["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path} has format version {values['format_version']}; this code reads {FORMAT_VERSION}.")
    origin = Origin(**values | {"actions": tuple(values["actions"])})
    scores = [f"score_{action}" for action in origin.actions]
    has_scores, has_ranks = scores[0] in schema.names, "rank" in schema.names
    if not (has_scores or has_ranks):
        raise UserError(f"{path} has neither a column rank nor {scores[0]}: it holds no predictions of a model.")
    wanted = ["row", "user", "item", *origin.actions, *["rank", "tied"] * has_ranks, *scores * has_scores]
    table = read_parquet(path, wanted, _REMEDY)
    rank_R = as_numpy(table["rank"], missing=-1) if has_ranks else np.full(len(table), -1.0)
    tied_R = as_numpy(table["tied"], missing=0) if has_ranks else np.zeros(len(table), np.int32)
    ranked = np.flatnonzero(rank_R > 0)
    first = rank_R[ranked]
    return Predictions(
        origin=origin,
        row=as_numpy(table["row"]),
        user=_ids(table["user"]),
        item=_ids(table["item"]),
        labels_RA=np.stack([as_numpy(table[action]) for action in origin.actions], axis=1),
        score_RA=np.stack([as_numpy(table[name]) for name in scores], axis=1) if has_scores else None,
        ranked=ranked,
        places=Places(first, first + tied_R[ranked]),
    )


def _columns(table: Interactions, rows: np.ndarray, scorers: Sequence[Scorer]) -> Iterator[tuple[str, pa.Array]]:
    yield "row", as_arrow(rows.astype(np.int64))
    yield "user", as_arrow(table.users.raw_id[table.user_R[rows]])
    yield "item", as_arrow(table.items.raw_id[table.item_R[rows]])
    for column, action in enumerate(table.actions):
        yield action, as_arrow(table.labels_RA[rows, column])
    for scorer in scorers:
        prefix = "" if scorer.name == MODEL else f"{scorer.name}_"
        if scorer.score is not None:
            score_rA = scorer.score(rows)
            for column, action in enumerate(table.actions):
                yield f"{prefix}score_{action}", as_arrow(score_rA[:, column])
        if scorer.ranks is not None:
            place, target = _of_rows(rows, scorer.ranks.row)
            first, last = (side[target] for side in scorer.ranks.places)
            # A target without a place ties with nothing.
            tied = np.subtract(last, first, out=np.zeros(len(first)), where=np.isfinite(first))
            yield f"{prefix}rank", _sparse(len(rows), place, first)
            yield f"{prefix}tied", _sparse(len(rows), place, tied.astype(np.int32))


def _sparse(size: int, place: np.ndarray, values: np.ndarray) -> pa.Array:
    """A column with values at these places and nulls elsewhere."""
    present, column = np.zeros(size, bool), np.zeros(size, values.dtype)
    present[place], column[place] = True, values
    dense = as_arrow(column)
    return pc.if_else(as_arrow(present), dense, pa.scalar(None, dense.type))


def _of_rows(rows: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of these rows are targets, by place, and which targets these are; both ascending."""
    low, high = np.searchsorted(targets, [rows[0], rows[-1] + 1]) if len(rows) else (0, 0)
    return np.searchsorted(rows, targets[low:high]), np.arange(low, high)


def _ids(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_pylist(), object) if pa.types.is_string(column.type) else as_numpy(column)
