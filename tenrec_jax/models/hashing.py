"""Tables of a fixed number of rows for any number of ids: every id has a row in each of k tables, named by hashes of its raw id.

An id that no training row mentions has rows too: those that its hashes name, which have learned from the ids that share them. That keeps
memory bounded and every id apart from most others; it is no knowledge of the id, which only training on it can give. What a log's exact
ids decide stays exact: which items are the same, what is drawn as a negative, which items can be retrieved (those of training rows), and
the biases, of a few numbers an id.

Hash embeddings: Svenstrup, Hansen and Winther, 2017 (arXiv:1709.03933), without their importance weights; for recommenders, Zhang et al.,
2020 (arXiv:2007.14523).
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from tenrec_jax.models.initializers import normal_table
from tenrec_jax.settings import Count, Range, Settings


@dataclass(frozen=True)
class TableConfig(Settings):
    """How ids become rows of an embedding table.

    Attributes:
        kind: "exact" gives every id of the log a row of its own; those that no training row mentions share row 0, "unknown", which learns
            from ids dropped at random (`unknown_rate`). "hashed" gives every id, also one that is not in the log, a row in each of
            `hashes` tables; row 0 of each is the unknown id's, and no other id has it. A user outside the log comes as a history alone,
            and is unknown.
        hashes: k, independent hashes; hashed alone, as what follows.
        rows: M, of each of the k tables, beside row 0.
        combine: an id's vector is the "sum" of its rows, or the rows, each 1/k as wide, one after the other: "concatenate".
    """

    kind: Literal["exact", "hashed"] = "exact"
    hashes: Count = 2
    rows: Annotated[int, Range(at_least=2)] = 100_000
    combine: Literal["sum", "concatenate"] = "sum"

    def conflicts(self) -> Iterator[str]:
        if self.table_rows >= 2**31:
            yield f"hashes is {self.hashes} and rows {self.rows}; together the tables must have fewer rows, below 2^31"

    @property
    def table_rows(self) -> int:
        """Rows of the k tables, which lie one after the other in one array, each with its row 0."""
        return self.hashes * (self.rows + 1)

    @property
    def unknown_k(self) -> np.ndarray:
        """The rows of the unknown id, int32 [k]."""
        return np.arange(self.hashes, dtype=np.int32) * np.int32(self.rows + 1)


class HashedIds(NamedTuple):
    """Where the ids of a log lie in a hashed table.

    Attributes:
        rows_Nk: of each dense id, int32 [N + 1, k]; entry 0 is the unknown id's.
        config: of the table.
    """

    rows_Nk: np.ndarray
    config: TableConfig

    @classmethod
    def of(cls, raw_id: np.ndarray, config: TableConfig) -> "HashedIds":
        """Of raw ids by dense id, [N + 1]; entry 0 is no id."""
        return cls(np.concatenate([config.unknown_k[None], hash_rows(raw_id[1:], config)]), config)


def hash_rows(raw_id: np.ndarray, config: TableConfig) -> np.ndarray:
    """The rows of raw ids, the same in every process and on every machine.

    With `x` the raw id as a number of 64 bits (an integer itself; of text, BLAKE2b of its UTF-8) and `mix` the finaliser of SplitMix64
    (Steele, Lea and Flood, 2014), the row in table j = 0..k-1 is

        j * (M + 1) + 1 + mix(x xor mix(j + 1)) mod M.

    Args:
        raw_id: int64 or str objects, [N].
        config: of the table.

    Returns:
        int32 [N, k].
    """
    table_k = np.arange(config.hashes, dtype=np.uint64)
    hash_Nk = _mixed(_as_number(raw_id)[:, None] ^ _mixed(table_k + np.uint64(1)))
    return (hash_Nk % np.uint64(config.rows) + np.uint64(1)).astype(np.int32) + config.unknown_k


class Collisions(NamedTuple):
    """Shares of ids that others share rows with: `any` of an id's rows, or `all` of them with one and the same other id."""

    any: float
    all: float

    def describe(self, ids: int, config: TableConfig) -> str:
        """Of so many ids in such a table, in words."""
        size = f"{ids:,} in {config.hashes} x {config.rows:,} rows"
        return f"{size}, {self.any:.3%} share a row and {self.all:.3%} share all rows with one other"

    @classmethod
    def counted(cls, rows_Nk: np.ndarray) -> "Collisions":
        """Of ids with these rows, [N, k], N at least 1."""
        code_N, shares_N = np.zeros(len(rows_Nk), np.int64), np.zeros(len(rows_Nk), bool)
        for row_N in rows_Nk.T:
            shares_N |= np.bincount(row_N)[row_N] > 1
            # Equal where all rows so far are equal; below N squared or so, which fits.
            code_N = np.unique(code_N * (int(row_N.max()) + 1) + row_N, return_inverse=True)[1]
        return cls(float(shares_N.mean()), float((np.bincount(code_N)[code_N] > 1).mean()))

    @classmethod
    def expected(cls, ids: int, config: TableConfig) -> "Collisions":
        """Of n ids under uniform hashes: `any` is `1 - (1 - 1/M) ** (k (n - 1))`, `all` is `1 - (1 - M ** -k) ** (n - 1)`."""
        k, rows, others = config.hashes, config.rows, max(0, ids - 1)
        return cls(
            any=-math.expm1(k * others * math.log1p(-1 / rows)),
            all=-math.expm1(others * math.log1p(-(float(rows) ** -k))),
        )


class HashRows(nnx.Variable):
    """The rows of ids in a hashed table: data that travels with a model's parameters, and does not learn."""


class HashedEmbed(nnx.Module):
    """An embedding of ids whose vectors are made of k rows each. Before `rows` is set, every id is unknown.

    Args:
        num_ids: N + 1. width: D.
        config: of the table.
        init_scale: standard deviation of a vector's entries at initialisation.

    Raises:
        ValueError: rows to be concatenated cannot be equally wide.
    """

    def __init__(self, num_ids: int, width: int, config: TableConfig, init_scale: float, *, rngs: nnx.Rngs) -> None:
        self.combine, columns = config.combine, width
        if config.combine == "sum":
            init_scale /= config.hashes**0.5
        else:
            columns = concatenated_width(width, config)
        init = normal_table(init_scale)
        self.embedding = nnx.Param(init(rngs.params(), (config.table_rows, columns), jnp.float32))
        self.rows = HashRows(jnp.broadcast_to(jnp.asarray(config.unknown_k), (num_ids, config.hashes)))

    def __call__(self, ids: Array) -> Array:
        """Integer ids [...] to vectors [..., D]."""
        row_kD = self.embedding[...][self.rows[...][ids]]
        return row_kD.sum(-2) if self.combine == "sum" else row_kD.reshape(*ids.shape, -1)


def concatenated_width(width: int, config: TableConfig) -> int:
    """Of each of k rows that make a vector of `width`; a ValueError if they cannot be equally wide."""
    if width % config.hashes:
        raise ValueError(f"a width of {width} cannot be concatenated from {config.hashes} rows of one width")
    return width // config.hashes


def _as_number(raw_id: np.ndarray) -> np.ndarray:
    if raw_id.dtype != object:
        return raw_id.astype(np.int64).view(np.uint64)
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in raw_id)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
