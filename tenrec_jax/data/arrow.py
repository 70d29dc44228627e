"""From Arrow's columns to NumPy's arrays."""

import numpy as np
import pyarrow as pa


def as_numpy(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Numbers or booleans without nulls as an array; numbers of one chunk are not copied, so do not write to it.

    Arrow's own `to_numpy` loads pandas wherever that is installed, which takes half a second and 60 MiB.

    Raises:
        TypeError: there are nulls, or other values than numbers and booleans.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
    if pa.types.is_boolean(values.type):
        return as_numpy(values.cast(pa.uint8())).view(bool)
    if not len(values):
        return np.empty(0, values.type.to_pandas_dtype())
    return np.from_dlpack(values)
