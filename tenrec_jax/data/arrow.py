"""Between Arrow's columns and NumPy's arrays, without pandas.

Arrow's own `pa.array` and `to_numpy` load pandas wherever that is installed, which takes half a second and 60 MiB.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tenrec_jax.errors import UserError


def read_parquet(path: Path, columns: Sequence[str], remedy: str) -> pa.Table:
    """Columns of a Parquet file, with its pages' checksums compared and its values validated.

    Raises:
        UserError: the file cannot be read, is damaged, or lacks a column; `remedy` says what to do.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            table = file.read(columns=[name for name in columns if name not in missing])
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}. {remedy}") from error
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}. {remedy}")
    return table


def as_numpy(values: pa.Array | pa.ChunkedArray, *, missing: int | None = None) -> np.ndarray:
    """Numbers or booleans as an array; numbers of one chunk without nulls are not copied, so do not write to it.

    Args:
        values: the column.
        missing: what stands for a null.

    Raises:
        TypeError: there are nulls and nothing to stand for them, or other values than numbers and booleans.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
    if pa.types.is_boolean(values.type):
        return as_numpy(values.cast(pa.uint8()), missing=missing).view(bool)
    if not len(values):
        return np.empty(0, values.type.to_pandas_dtype())
    if values.null_count:
        if missing is None:
            raise TypeError(f"a column has {values.null_count} nulls and nothing to stand for them")
        data = pa.Array.from_buffers(values.type, len(values), [None, values.buffers()[1]], offset=values.offset)
        number = np.from_dlpack(data)
        return np.where(as_numpy(values.is_valid()), number, missing).astype(number.dtype)
    return np.from_dlpack(values)


def as_arrow(values: np.ndarray) -> pa.Array:
    """An array of numbers, booleans or, as objects, texts as a column; numbers are not copied, so do not write to them."""
    if values.dtype == object:
        return pa.array(values.tolist(), pa.string())
    if values.dtype == bool:
        return as_arrow(values.view(np.uint8)).cast(pa.bool_())
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, data])
