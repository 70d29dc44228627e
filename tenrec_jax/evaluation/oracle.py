"""The true probabilities of a synthetic twin as a scorer: what no model can beat in expectation.

`data.synthetic` writes them beside the twin, a row for a row of its CSV, each given everything that precedes the exposure. Nothing like
them exists for retrieval: the twin's law of what is shown next is no ranking of the catalogue.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tenrec_jax.data.arrow import as_numpy
from tenrec_jax.data.interactions import Interactions
from tenrec_jax.evaluation.scorers import ORACLE, Scorer


def oracle_scorer(truth: Path, table: Interactions) -> Scorer | str:
    """The scorer, or why there is none."""
    if not truth.is_file():
        return f"{truth.name} is gone, so the twin's true probabilities are not known"
    file = pq.ParquetFile(truth, page_checksum_verification=True)
    if file.metadata.num_rows != table.num_rows:
        return (
            f"{truth.name} has {file.metadata.num_rows:,} rows and the table {table.num_rows:,}: "
            "rows were left out, and which is not known"
        )
    columns = file.read(columns=list(table.actions))
    truth_RA = np.stack([as_numpy(columns[action]) for action in table.actions], axis=1)
    return Scorer(ORACLE, None, lambda rows: truth_RA[rows])
