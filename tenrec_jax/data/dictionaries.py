"""What ingestion learns of users and items while rows stream by: dense ids by first appearance, and features."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tenrec_jax.data.arrow import as_arrow, as_numpy
from tenrec_jax.data.schema import Column

# Raw ids below this are looked up in an array: 32 MiB, of which pages that hold no id take no memory.
DIRECT_IDS = 1 << 23


class IntegerIds:
    """Dense ids 1, 2, ... of raw int64 ids, in order of first appearance.

    As long as all raw ids lie in 0..`DIRECT_IDS` - 1, as those of most logs do, an array tells the dense id of each. From the first other
    one on, the known ids lie in sorted runs, 12 bytes an id, each at least twice as long as the next (a log-structured merge), so that a
    block of new ids costs no pass over all known ones.
    """

    def __init__(self) -> None:
        self._direct: np.ndarray | None = np.zeros(DIRECT_IDS, np.int32)
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        self._raw: list[np.ndarray] = []
        self.count = 0

    def encode(self, raw_R: pa.Array) -> np.ndarray:
        """Dense ids of raw ids, int32 [R]; new ones are numbered on."""
        raw = as_numpy(raw_R)
        if self._direct is not None and len(raw) and not 0 <= raw.min() <= raw.max() < DIRECT_IDS:
            self._direct = None
            if self.count:
                self._add_run(as_numpy(self.raw()), np.arange(1, self.count + 1, dtype=np.int32))
        return self._encode_by_runs(raw_R) if self._direct is None else self._encode_directly(raw, self._direct)

    def _encode_directly(self, raw_R: np.ndarray, dense_of: np.ndarray) -> np.ndarray:
        dense_R = dense_of[raw_R]
        is_new_R = dense_R == 0
        if is_new_R.any():
            new = as_numpy(as_arrow(raw_R[is_new_R]).unique())
            dense_of[new] = self._number(new)
            dense_R[is_new_R] = dense_of[raw_R[is_new_R]]
        return dense_R

    def _encode_by_runs(self, raw_R: pa.Array) -> np.ndarray:
        encoded = raw_R.dictionary_encode()
        distinct_D = as_numpy(encoded.dictionary)
        dense_D = self._find(distinct_D)
        is_new_D = dense_D == 0
        new = distinct_D[is_new_D]
        if len(new):
            dense_D[is_new_D] = dense = self._number(new)
            self._add_run(new, dense)
        return dense_D[as_numpy(encoded.indices)]

    def _number(self, new: np.ndarray) -> np.ndarray:
        """The dense ids of raw ids that are new, each once."""
        self._raw.append(new)
        self.count += len(new)
        return np.arange(self.count + 1 - len(new), self.count + 1, dtype=np.int32)

    def raw(self) -> pa.Array:
        """Raw ids of the dense ids 1, 2, ..."""
        return as_arrow(np.concatenate([np.empty(0, np.int64), *self._raw]))

    def _find(self, raw_D: np.ndarray) -> np.ndarray:
        dense_D = np.zeros(len(raw_D), np.int32)
        for raw, dense in self._runs:
            place_D = np.minimum(np.searchsorted(raw, raw_D), len(raw) - 1)
            found_D = raw[place_D] == raw_D
            dense_D[found_D] = dense[place_D[found_D]]
        return dense_D

    def _add_run(self, raw: np.ndarray, dense: np.ndarray) -> None:
        order = np.argsort(raw)
        raw, dense = raw[order], dense[order]
        while self._runs and len(self._runs[-1][0]) < 2 * len(raw):
            raw, dense = (np.concatenate(pair) for pair in zip(self._runs.pop(), (raw, dense), strict=True))
            order = np.argsort(raw, kind="stable")
            raw, dense = raw[order], dense[order]
        self._runs.append((raw, dense))


class TextIds:
    """Dense ids of raw ids that are text; as `IntegerIds`, in the memory of a dict of strings."""

    def __init__(self) -> None:
        self._dense: dict[str, int] = {}

    @property
    def count(self) -> int:
        """Number of ids."""
        return len(self._dense)

    def encode(self, raw_R: pa.Array) -> np.ndarray:
        """Dense ids of raw ids, int32 [R]; new ones are numbered on."""
        encoded = raw_R.dictionary_encode()
        dense_D = [self._dense.setdefault(raw, len(self._dense) + 1) for raw in encoded.dictionary.to_pylist()]
        return np.asarray(dense_D, np.int32)[as_numpy(encoded.indices)]

    def raw(self) -> pa.Array:
        """Raw ids of the dense ids 1, 2, ..."""
        return pa.array(list(self._dense), pa.string())


def make_ids(dtype: pa.DataType) -> IntegerIds | TextIds:
    """An empty dictionary for raw ids of a type."""
    return IntegerIds() if pa.types.is_integer(dtype) else TextIds()


class Feature:
    """A feature of users or items: the first value of each id that is not missing."""

    def __init__(self, column: Column) -> None:
        self._column, self._code = column, np.zeros(1, np.int32)
        self._names = TextIds() if column.form == "text" else None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values 1, 2, ... of a feature that is text."""
        return tuple(self._names.raw().to_pylist()) if self._names else ()

    def update(self, id_R: np.ndarray, values: pa.Array, count: int) -> np.ndarray:
        """Take note of rows: their dense ids, up to `count`, and values. Returns which rows contradict the id's value, bool [R]."""
        code_R = self._codes(values)
        if count >= len(self._code):
            self._code = np.concatenate([self._code, np.zeros(max(count + 1, len(self._code)), np.int32)])
        known_R, given_R = self._code[id_R], code_R != 0
        fresh = np.flatnonzero(given_R & (known_R == 0))[::-1]
        if len(fresh):  # what is complete may be read-only
            self._code[id_R[fresh]] = code_R[fresh]  # from the last row to the first, which stays
            known_R[fresh] = self._code[id_R[fresh]]
        return given_R & (code_R != known_R)

    def codes(self, count: int) -> np.ndarray:
        """Codes of the dense ids 1..count, int32."""
        code = np.zeros(count, np.int32)
        known = self._code[1 : count + 1]
        code[: len(known)] = known
        return code

    def _codes(self, values: pa.Array) -> np.ndarray:
        if self._names is not None:
            code_R = np.zeros(len(values), np.int32)
            given_R = as_numpy(pc.is_valid(values))
            code_R[given_R] = self._names.encode(values.drop_null())
            return code_R
        codes = values.cast(pa.int32())
        return as_numpy(codes, missing=-1) + np.int32(1) if self._column.nulls else as_numpy(codes)
