"""Ingestion and opening of large logs against pandas and Polars.

Command:  python experiments/benchmarks/data.py [--quick] [--json FILE] [--workdir DIR]
Needs:    the extra `bench`; about 4 GiB of disk for 20 million rows. Linux (peak memory is read from /proc).

The rivals do less: neither checks a value, gives dense ids, lists bad rows or hashes its files. Pandas reads all columns into one frame,
drops incomplete rows, sorts by user and writes Parquet; Polars streams the CSV to Parquet as it stands, ungrouped.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from harness import Result, Usage, measure, median_seconds, parser, report, take_turns

from tenrec_jax.data.schema import KINDS
from tenrec_jax.data.synthetic import write_twin

SIZES, QUICK_SIZES = (5_000_000, 20_000_000), (50_000, 200_000)
FIRST_BATCH, HISTORY = 256, 64


def ours(source: Path, out: Path) -> Callable[[], object]:
    """Validated, grouped and encoded ingestion."""
    from tenrec_jax.data.ingest import ingest

    shutil.rmtree(out, ignore_errors=True)
    return lambda: ingest([source], "qb_video", out, progress=False)


def with_pandas(source: Path, out: Path) -> Callable[[], object]:
    """One frame, cleaned, sorted by user, to Parquet."""
    import pandas as pd

    dtypes = {c.name: "Int8" if c.nulls else c.dtype for c in KINDS["qb_video"].columns}

    def run() -> None:
        frame = pd.read_csv(source, dtype=dtypes, na_values=["\\N"])
        frame = frame.dropna(subset=[name for name in frame.columns if name != "video_category"])
        frame.sort_values("user_id", kind="stable").to_parquet(out.with_suffix(".parquet"))

    return run


def with_polars(source: Path, out: Path) -> Callable[[], object]:
    """CSV to Parquet as a stream, as it stands."""
    import polars as pl

    types = {"int64": pl.Int64, "int32": pl.Int32, "int8": pl.Int8}
    schema = {c.name: types[c.dtype] for c in KINDS["qb_video"].columns}
    return lambda: pl.scan_csv(source, schema=schema, null_values=["\\N"]).sink_parquet(out.with_suffix(".pl.parquet"))


def open_ours(folder: Path) -> Callable[[], object]:
    """Open a table and gather the last events of some users."""
    from tenrec_jax.data.interactions import open_table

    def run() -> int:
        table = open_table(folder)
        users = np.random.default_rng(0).integers(1, table.num_users + 1, FIRST_BATCH)
        stop = table.offsets[users + 1]
        place_BT = stop[:, None] - 1 - np.arange(HISTORY)
        row_BT = np.maximum(place_BT, table.offsets[users][:, None])
        return int(table.item_R[row_BT].sum() + table.labels_RA[row_BT].sum())

    return run


def open_with_pandas(path: Path) -> Callable[[], object]:
    """Read the Parquet file that pandas wrote."""
    import pandas as pd

    return lambda: pd.read_parquet(path)


def compare_ingest(folder: Path, rows: int, rounds: int) -> tuple[list[Result], list[Usage]]:
    """Rows a second against both rivals; also our own runs."""
    source, out = folder / f"{rows}.csv", folder / f"table-{rows}"
    mine, pandas, polars = take_turns(
        rounds,
        partial(measure, ours, source, out),
        partial(measure, with_pandas, source, out),
        partial(measure, with_polars, source, out),
    )
    work, speed = f"ingest of {rows:,} rows, million rows/s", {}
    for name, usages in (("ours", mine), ("pandas", pandas), ("polars", polars)):
        speed[name] = rows / median_seconds(usages) / 1e6
        peak = max(usage.peak_mib for usage in usages)
        print(f"  {name:<8} {speed[name]:6.2f} million rows/s, peak {peak:,.0f} MiB", file=sys.stderr)
    return [
        Result(
            work, "pandas, unvalidated, sorted", speed["ours"], speed["pandas"], speed["ours"] / speed["pandas"], 1.0
        ),
        Result(
            work,
            "Polars, unvalidated, ungrouped",
            speed["ours"],
            speed["polars"],
            speed["ours"] / speed["polars"],
            0.35,
        ),
    ], mine


def compare_memory(small: list[Usage], large: list[Usage], sizes: tuple[int, int]) -> list[Result]:
    """Peak memory against its bound, and against that of a quarter of the rows."""
    few, many = (max(usage.peak_mib for usage in usages) for usages in (small, large))
    return [
        Result(f"ingest of {sizes[1]:,} rows, peak MiB", "1 GiB", many, 1024, 1024 / many, 1.0),
        Result("the same", f"its own at {sizes[0]:,} rows, + 20 %", many, 1.2 * few, 1.2 * few / many, 1.0),
    ]


def compare_opening(folder: Path, rows: int, rounds: int) -> list[Result]:
    """A first batch from a table against reading the Parquet file."""
    table = folder / f"table-{rows}"
    measure(open_ours, table)  # the first opening after ingestion reads from disk, for both
    mine, theirs = take_turns(
        rounds, partial(measure, open_ours, table), partial(measure, open_with_pandas, table.with_suffix(".parquet"))
    )
    seconds = median_seconds(mine), median_seconds(theirs)
    grown = max(usage.growth_mib for usage in mine)
    return [
        Result(f"first batch of {rows:,} rows, s", "pandas.read_parquet", *seconds, seconds[1] / seconds[0], 50.0),
        Result("the same, growth of resident memory, MiB", "200 MiB", grown, 200, 200 / max(grown, 1e-9), 1.0),
    ]


def main() -> None:
    """Run all comparisons."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--workdir", type=Path, help="where to put the files (default: a temporary folder)")
    options = arguments.parse_args()
    sizes = QUICK_SIZES if options.quick else SIZES
    with tempfile.TemporaryDirectory(dir=options.workdir) as name:
        folder = Path(name)
        for rows in sizes:
            print(f"writing a twin of {rows:,} rows", file=sys.stderr)
            write_twin(folder / f"{rows}.csv", kind="qb_video", rows=rows, seed=0)
        small, few = compare_ingest(folder, sizes[0], options.rounds)
        large, many = compare_ingest(folder, sizes[1], options.rounds)
        results = [
            *small,
            *large,
            *compare_memory(few, many, sizes),
            *compare_opening(folder, sizes[1], options.rounds),
        ]
    report(results, options.json)


if __name__ == "__main__":
    main()
