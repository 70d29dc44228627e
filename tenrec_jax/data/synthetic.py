"""The synthetic twin of Tenrec: a CSV of exactly its format, and the true probability behind every label.

`twin_model` says how users and items behave. This module turns that into files: ids by first appearance, the real file's
columns in their order and, for `ctr_1m`, the ten history columns with the deletion of rows that goes with them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray
from tqdm import tqdm

from tenrec_jax.data.schema import ACTIONS, NULL, TWIN_KINDS, kind_named
from tenrec_jax.data.twin_model import Catalogue, Ints, Population, draw_catalogue, draw_population
from tenrec_jax.data.twin_play import Intercepts, react, simulate, solve_intercepts, watching_times
from tenrec_jax.data.twin_recipes import Recipe, recipe_of
from tenrec_jax.errors import UserError
from tenrec_jax.files import written_whole

HISTORY = 10
CHUNK_ROWS = 500_000
SMALLEST_LOG = 6_000  # rows for which the catalogue is made at least


@dataclass(frozen=True)
class TwinSummary:
    """What was written: the two files, and the CSV's rows, distinct users and items, and share of clicks."""

    path: Path
    truth: Path
    rows: int
    users: int
    items: int
    click_rate: float


class Chunk(NamedTuple):
    """R rows of some users of a crowd, as written. `history_RS` (0 columns without history) and `item_R` are places in the
    catalogue, -1 in the history for none; `shown_R` holds the items of all exposures, deleted ones included, in order.
    `match_R` is what taste and item made of one another; the crowd is a place in the recipe's.
    """

    user_R: Ints
    item_R: Ints
    labels_RA: NDArray[np.int8]
    truth_RA: NDArray[np.float32]
    watching_R: Ints
    gender_R: Ints
    age_R: Ints
    history_RS: Ints
    shown_R: Ints
    match_R: NDArray[np.float64]
    users: int
    crowd: int


class Twin(NamedTuple):
    """A twin as it is played: what is planted, the intercepts of each crowd, and the rows, chunk by chunk."""

    recipe: Recipe
    catalogue: Catalogue
    intercepts: Sequence[Intercepts]
    chunks: Iterator[Chunk]


def write_twin(path: Path, *, kind: str, rows: int, seed: int, progress: bool = True) -> TwinSummary:
    """Writes a log of Tenrec's format to `path`, and the truth behind it to `path.with_suffix(".truth.parquet")`.

    The same kind, rows and seed give the same bytes. Ids count from 1 by first appearance; the rows of a user stand
    together, in time order. The truth has a row for each row of the CSV: the probability (float32) of click, like, share
    and follow given everything that precedes the exposure, so that P(like) = P(click) P(like | click) + P(no click)
    P(like | no click). Each file is written under another name and renamed when complete.

    `ctr_1m` follows Tenrec's gen_ctr.py: hist_1..hist_10 are a user's oldest ten clicks (all but the last where there are
    ten or fewer), padded with 0 at the end and the same in all rows of the user; a row whose item is among them is
    deleted, after ids were given. `rows` counts the rows that are left: the last user's time line is cut, before the
    history is built, at the first point from which exactly the missing number of rows is left. The deletion takes clicks,
    so the click rate of the file, 0.24, is lower than that of the exposures. The truth is still that of the exposures: as a
    user's clicks up to the tenth are gone, the file has fewer clicks there than the truth says, and agrees with it after
    the eleventh.

    Args:
        path: the CSV; an existing file is replaced, a missing folder is made.
        kind: one of `TWIN_KINDS`: `qb_video` (10 columns) or `ctr_1m` (20 columns).
        rows: rows of the CSV, at least 1.
        seed: at least 0.
        progress: whether to show a progress bar on standard error.

    Raises:
        UserError: there is no twin of this kind, or rows or seed is too small.
    """
    twin = play_twin(kind, rows, seed)
    header, truth = kind_named(kind).header, path.with_suffix(".truth.parquet")
    ids = _Ids(twin.catalogue.topic_N.size)
    users = clicks = 0
    with (
        written_whole(path) as csv_file,
        written_whole(truth) as truth_file,
        csv_file.open("wb") as csv,
        pyarrow.parquet.ParquetWriter(truth_file, _truth_schema(), write_page_checksum=True) as truth_writer,
        tqdm(total=rows, unit="row", unit_scale=True, disable=not progress) as bar,
    ):
        csv.write((",".join(header) + "\n").encode())
        for chunk in twin.chunks:
            _write_csv(csv, header, chunk, twin.catalogue, ids)
            truth_writer.write_table(pa.Table.from_arrays(list(chunk.truth_RA.T.copy()), schema=_truth_schema()))
            users += np.unique(chunk.user_R).size
            clicks += int(chunk.labels_RA[:, 0].sum())
            bar.update(chunk.user_R.size)
    return TwinSummary(path, truth, rows, users, int(ids.written_N.sum()), clicks / rows)


def play_twin(kind: str, rows: int, seed: int) -> Twin:
    """The twin that `write_twin` writes, with what its files do not tell.

    Raises:
        UserError: there is no twin of this kind, or rows or seed is too small.
    """
    if kind_named(kind).name not in TWIN_KINDS:
        raise UserError(f"There is no synthetic twin of {kind}; choose one of {', '.join(TWIN_KINDS)}.")
    if rows < 1 or seed < 0:
        raise UserError(f"rows is {rows} and seed is {seed}: give at least 1 row and a seed of at least 0.")
    recipe, rng = recipe_of(kind), np.random.default_rng([seed, rows, 0])
    catalogue = draw_catalogue(recipe.popularity, max(rows, SMALLEST_LOG), recipe.item_bias, rng)
    intercepts = [solve_intercepts(catalogue, recipe, crowd, rows, rng) for crowd in recipe.crowds]
    return Twin(recipe, catalogue, intercepts, _chunks(recipe, catalogue, intercepts, rows, seed))


def _chunks(
    recipe: Recipe, catalogue: Catalogue, intercepts: Sequence[Intercepts], rows: int, seed: int
) -> Iterator[Chunk]:
    """Chunks of whole users, numbered on from one chunk to the next, until there are exactly `rows` rows.

    The rows of each crowd come to an end where its share of the log does; its last user's time line is cut there.
    """
    number, users, end, done = 1, 0, 0.0, 0
    for place, (crowd, solved) in enumerate(zip(recipe.crowds, intercepts, strict=True)):
        end += crowd.share
        while done < round(rows * end):
            rng = np.random.default_rng([seed, rows, number])
            chunk = _chunk(recipe, place, catalogue, solved, round(rows * end) - done, rng)
            yield chunk._replace(user_R=chunk.user_R + users)
            number, users, done = number + 1, users + chunk.users, done + chunk.user_R.size


def _chunk(
    recipe: Recipe, place: int, catalogue: Catalogue, intercepts: Intercepts, most: int, rng: np.random.Generator
) -> Chunk:
    """About `CHUNK_ROWS` rows, at most `most`, of the recipe's crowd in this place."""
    crowd = recipe.crowds[place]
    extra = HISTORY if recipe.history else 0
    count = math.ceil(1.1 * min(CHUNK_ROWS, most) / crowd.mean_rows) + 4
    population = draw_population(catalogue, crowd, count, rng, extra_rows=extra)
    enough = np.searchsorted(np.cumsum(population.length_U - extra), most) + 1
    population = Population._make(column[:enough] for column in population)
    exposures = simulate(catalogue, population, recipe, intercepts.click, rng)
    labels_RA, truth_RA = react(exposures, population, intercepts, rng)
    user_R, item_R, click_R = exposures.user_R, exposures.item_R, exposures.click_R
    pair_R = user_R * catalogue.topic_N.size + item_R
    watching_R = watching_times(recipe.watching, pair_R, labels_RA, rng)
    if recipe.history:
        end = end_of_rows(user_R, item_R, click_R, most)
        history_US, keep_R = history_and_kept(user_R[:end], item_R[:end], click_R[:end])
        kept = np.flatnonzero(keep_R)
    else:
        end = min(most, user_R.size)
        history_US, kept = np.empty((population.length_U.size, 0), np.int64), np.arange(end)
    user_R = user_R[kept]
    return Chunk(
        user_R=user_R,
        item_R=item_R[kept],
        labels_RA=labels_RA[kept],
        truth_RA=truth_RA[kept],
        watching_R=watching_R[kept],
        gender_R=population.gender_U[user_R],
        age_R=population.age_U[user_R],
        history_RS=history_US[user_R],
        shown_R=item_R[:end],
        match_R=exposures.match_R[kept],
        users=population.length_U.size,
        crowd=place,
    )


def history_and_kept(user_R: Ints, item_R: Ints, click_R: NDArray[np.bool_]) -> tuple[Ints, NDArray[np.bool_]]:
    """Each user's history, [U, 10] with -1 at the end for none, and which rows stay: those whose item is not in it."""
    clicks = np.flatnonzero(click_R)
    number_U = np.bincount(user_R[clicks], minlength=user_R[-1] + 1)
    nth = np.arange(clicks.size) - np.repeat(np.cumsum(number_U) - number_U, number_U)
    limit_U = np.where(number_U > HISTORY, HISTORY, number_U - 1)
    old = nth < limit_U[user_R[clicks]]
    history_US = np.full((number_U.size, HISTORY), -1)
    history_US[user_R[clicks[old]], nth[old]] = item_R[clicks[old]]
    return history_US, (history_US[user_R] != item_R[:, None]).all(axis=1)


def end_of_rows(user_R: Ints, item_R: Ints, click_R: NDArray[np.bool_], most: int) -> int:
    """The number of leading rows of which, once those in the history are deleted, at most `most` are left.

    One more row of the last user adds one row to what is left, or none, or takes some away (a click that enters the
    history). So where the whole time line leaves too many, some beginning of it leaves exactly the right number.
    """
    left_R = np.cumsum(history_and_kept(user_R, item_R, click_R)[1])
    if left_R[-1] <= most:
        return user_R.size
    last = user_R[np.searchsorted(left_R, most)]
    first, end = np.searchsorted(user_R, [last, last + 1])
    missing = most - (left_R[first - 1] if first else 0)
    for cut in range(first + missing, end):
        block = slice(first, cut)
        if history_and_kept(user_R[block] - last, item_R[block], click_R[block])[1].sum() == missing:
            return cut
    return int(end)


class _Ids:
    """Item ids, given in the order of first appearance; `written_N` marks the items that some row shows."""

    def __init__(self, size: int) -> None:
        self.id_N = np.zeros(size + 1, np.int64)
        self.written_N = np.zeros(size, np.bool_)
        self._given = 0

    def give(self, shown_R: Ints) -> None:
        """Numbers the items that are new here. The entry -1 keeps the id 0."""
        items, first = np.unique(shown_R, return_index=True)
        new = self.id_N[items] == 0
        items = items[new][np.argsort(first[new])]
        self.id_N[items] = self._given + 1 + np.arange(items.size)
        self._given += items.size


def _write_csv(csv: BinaryIO, header: tuple[str, ...], chunk: Chunk, catalogue: Catalogue, ids: _Ids) -> None:
    ids.give(chunk.shown_R)
    ids.written_N[chunk.item_R] = True
    category_R = catalogue.category_N[chunk.item_R]
    history = [f"hist_{k + 1}" for k in range(chunk.history_RS.shape[1])]
    names = ["user_id", "item_id", *ACTIONS, "video_category", "watching_times", "gender", "age", *history]
    columns = [
        chunk.user_R + 1,
        ids.id_N[chunk.item_R],
        *chunk.labels_RA.T.copy(),
        pa.array(category_R - 1, mask=category_R == 0),
        chunk.watching_R,
        chunk.gender_R,
        chunk.age_R,
        *ids.id_N[chunk.history_RS].T.copy(),
    ]
    options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="none", null_string=NULL)
    pyarrow.csv.write_csv(pa.table(columns, names=names).select(list(header)), csv, options)


def _truth_schema() -> pa.Schema:
    return pa.schema([(action, pa.float32()) for action in ACTIONS])
