"""Columns and arrays against Arrow's own conversions."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenrec_jax.data.arrow import as_arrow, as_numpy

TYPES = (pa.int8(), pa.int32(), pa.int64(), pa.uint8(), pa.float32(), pa.float64())


@settings(deadline=None)  # Arrow's own conversions load pandas first
@given(st.lists(st.integers(0, 100)), st.sampled_from(TYPES), st.integers(0, 5), st.integers(0, 5))
def test_numbers_go_both_ways_also_as_slices_and_in_chunks(
    values: list[int], dtype: pa.DataType, start: int, cut: int
) -> None:
    array = pa.array(values, dtype)[start:]
    for column in (array, pa.chunked_array([array[:cut], array[cut:]], dtype), pa.chunked_array([array], dtype)):
        np.testing.assert_array_equal(as_numpy(column), np.asarray(values[start:]))
        assert as_numpy(column).dtype == dtype.to_pandas_dtype()
    back = as_arrow(np.asarray(values, dtype.to_pandas_dtype()))
    assert back.equals(pa.array(values, dtype))


@settings(deadline=None)
@given(st.lists(st.booleans()))
def test_booleans_go_both_ways(values: list[bool]) -> None:
    assert as_numpy(pa.array(values, pa.bool_())).tolist() == values
    assert as_arrow(np.asarray(values, bool)).to_pylist() == values


@settings(deadline=None)
@given(st.lists(st.none() | st.integers(0, 100), min_size=1), st.integers(0, 3))
def test_a_null_is_refused_or_becomes_what_stands_for_it(values: list[int | None], start: int) -> None:
    array = pa.array(values, pa.int32())[start:]
    expected = [-1 if value is None else value for value in values[start:]]
    assert as_numpy(array, missing=-1).tolist() == expected
    assert as_numpy(array, missing=-1).dtype == np.int32
    if array.null_count:
        with pytest.raises(TypeError, match="null"):
            as_numpy(array)


def test_texts_become_a_column() -> None:
    assert as_arrow(np.asarray(["a", "", "ä"], object)).equals(pa.array(["a", "", "ä"]))


def test_neither_way_loads_pandas() -> None:
    code = (
        "import sys, numpy as np; from tenrec_jax.data.arrow import as_arrow, as_numpy;"
        "as_numpy(as_arrow(np.arange(5))); as_numpy(as_arrow(np.ones(3, bool))); print('pandas' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
