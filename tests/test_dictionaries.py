"""Dense ids against a dict of Python's."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from tenrec_jax.data.dictionaries import DIRECT_IDS, IntegerIds

SMALL = st.integers(0, 50) | st.integers(DIRECT_IDS - 2, DIRECT_IDS - 1)
ANY = SMALL | st.integers(-(2**63), 2**63 - 1) | st.sampled_from([-1, DIRECT_IDS])


@given(st.lists(st.lists(SMALL, max_size=20) | st.lists(ANY, max_size=20), max_size=6))
def test_ids_are_numbered_by_first_appearance_whatever_their_range(blocks):
    ids, expected = IntegerIds(), {}
    for block in blocks:
        dense = [expected.setdefault(raw, len(expected) + 1) for raw in block]
        assert ids.encode(pa.array(block, pa.int64())).tolist() == dense
    assert ids.count == len(expected)
    assert ids.raw().to_pylist() == list(expected)
