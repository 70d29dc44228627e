"""The command line: `tenrec-jax`, the same as `python -m tenrec_jax`."""

import argparse
import json
import sys
from pathlib import Path

from tenrec_jax import __version__, asking, verify
from tenrec_jax.data.engines import ENGINES, LOCAL
from tenrec_jax.data.id_types import AUTO, ID_TYPES
from tenrec_jax.data.ingest import DUPLICATES, IngestOptions, ingest
from tenrec_jax.data.leakage import DEFAULT_ALARM
from tenrec_jax.data.logs import KIND_NAMES, parse_columns
from tenrec_jax.data.quarantine import FILE as QUARANTINE_FILE
from tenrec_jax.data.schema import TWIN_KINDS
from tenrec_jax.data.synthetic import write_twin
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation import compare, seeds
from tenrec_jax.evaluation.report import write_report
from tenrec_jax.evaluation.side_by_side import write_side_by_side
from tenrec_jax.evaluation.stats_report import JSON_FILE, PAGE_FILE, summary, write_stats
from tenrec_jax.files import json_text
from tenrec_jax.interop import commands as interop
from tenrec_jax.serving import commands as serving_commands

EXAMPLES = """examples:
  tenrec-jax synth --kind qb_video --rows 300000 --seed 0 --out twin.csv
  tenrec-jax ingest twin.csv --kind qb_video --out table
  tenrec-jax ingest my.csv.gz --kind custom --columns '{"user": "uid", "item": "vid", "click": "watched"}' --out table2
  tenrec-jax stats table
  tenrec-jax recommend --recommender runs/quickstart/recommender --user 1 --k 10
  tenrec-jax recommend --recommender runs/quickstart/recommender --history 12,7,99 --json
  tenrec-jax recommend --recommender runs/quickstart/recommender --all --out lists
  tenrec-jax score --recommender runs/quickstart/recommender --user 1 --candidates 12,7,99
  tenrec-jax export --recommender runs/quickstart/recommender --out exported
  tenrec-jax import --exported exported --out recommender2
  tenrec-jax import-original ranker.pt --out original
  tenrec-jax report runs/quickstart
  tenrec-jax report runs/before runs/after --out both.html
  tenrec-jax compare runs/before runs/after
  tenrec-jax seeds runs/seed0 runs/seed1 runs/seed2
  tenrec-jax verify runs/quickstart

Training and evaluation are run from a config: python experiments/launch.py --help
"""

SYNTH_EXAMPLES = """examples:
  tenrec-jax synth --kind qb_video --rows 300000 --seed 0 --out twin.csv     and twin.truth.parquet, the true probabilities
  tenrec-jax synth --kind ctr_1m --rows 300000 --out ctr_twin.csv
"""
INGEST_EXAMPLES = """examples:
  tenrec-jax ingest twin.csv --kind qb_video --out table
  tenrec-jax ingest log.txt --kind sequences --out table2              one user a line, or one event
  tenrec-jax ingest my.csv.gz --kind custom --columns '{"user": "uid", "item": "vid", "click": "watched"}' --out table3
  tenrec-jax ingest shards --kind qb_video --out table4                a folder of Parquet files, from Spark for example
  tenrec-jax ingest twin.csv --kind qb_video --max_bad_fraction 0.001 --duplicates drop_exact --out table5
"""
STATS_EXAMPLES = """examples:
  tenrec-jax stats table                                  the default split, written into the table's folder
  tenrec-jax stats table --protocol leave_one_out --out report
  tenrec-jax stats table --json | python -m json.tool     everything, for programs
  tenrec-jax stats table --truth twin.truth.parquet       a synthetic twin beside Tenrec's published numbers
"""
REPORT_EXAMPLES = """examples:
  tenrec-jax report runs/quickstart                               report.html of the run, written again
  tenrec-jax report runs/before runs/after --out both.html        runs side by side
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 damage that `verify` found, 2 wrong use or bad input."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tenrec-jax",
        description="A two-stage recommender for the Tenrec benchmark.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_data(commands)
    _add_stats(commands)
    asking.add_commands(commands)
    serving_commands.add_command(commands)
    interop.add_commands(commands)
    compare.add_command(commands)
    seeds.add_command(commands)
    verify.add_command(commands)
    report = commands.add_parser(
        "report",
        help="write report.html again from a run's files, or a page of several runs",
        epilog=REPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="workdir of a run; several stand side by side"
    )
    report.add_argument(
        "--out", type=Path, default=Path("runs.html"), help="page of several runs (default: %(default)s)"
    )
    report.set_defaults(run=_report)
    return parser


def _add_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    synth = commands.add_parser(
        "synth",
        help="write a synthetic log in Tenrec's format, with its true probabilities",
        epilog=SYNTH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    synth.add_argument("--kind", choices=TWIN_KINDS, default="qb_video", help="format to write (default: %(default)s)")
    synth.add_argument("--rows", type=int, default=300_000, help="rows to write (default: %(default)s)")
    synth.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: %(default)s)")
    synth.add_argument("--out", type=Path, required=True, help="CSV file to write")
    synth.set_defaults(run=_synth)

    table = commands.add_parser(
        "ingest",
        help="validate a log and turn it into a table",
        epilog=INGEST_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    table.add_argument(
        "sources",
        type=Path,
        nargs="+",
        metavar="SOURCE",
        help="files of the log, in order: text (also .gz, .zst), Parquet files or folders of them; for movielens its folder or zip",
    )
    table.add_argument("--kind", choices=KIND_NAMES, required=True, help="format of the log")
    table.add_argument("--out", type=Path, required=True, help="folder to write")
    table.add_argument(
        "--columns",
        metavar="MAP",
        help="for --kind custom: which column stands for what, as JSON or the name of a JSON file, for example "
        '\'{"user": "uid", "item": "vid", "click": "watched", "time": "at"}\'; also like, share, follow, gender, age, category',
    )
    table.add_argument(
        "--duplicates",
        choices=DUPLICATES,
        default="keep",
        help="what to do with rows that equal an earlier one in every column (default: %(default)s)",
    )
    table.add_argument(
        "--max_bad_fraction",
        type=float,
        default=0.0,
        help="share of damaged rows up to which they are left out and listed in quarantine.csv (default: none may be)",
    )
    table.add_argument(
        "--allow_post_event_features",
        action="store_true",
        help="for --kind custom: let a column that is known only after the exposure, such as watching_times, be a feature",
    )
    table.add_argument(
        "--ids",
        choices=ID_TYPES,
        default=AUTO,
        help="for --kind custom and sequences: what ids are; auto takes them to be what the first one is (default: %(default)s)",
    )
    table.add_argument(
        "--engine",
        choices=ENGINES,
        default=LOCAL,
        help="what does the work: this process, or Ray (the cluster that RAY_ADDRESS names, or one on this machine; "
        'pip install "tenrec_jax[ray]"); the table is the same (default: %(default)s)',
    )
    table.set_defaults(run=_ingest)


def _add_stats(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stats = commands.add_parser(
        "stats",
        help="describe a table: sizes, distributions, repeats, the split and what leaks",
        description="Writes stats.json and stats.html, a page of its own, and prints the main numbers.",
        epilog=STATS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stats.add_argument("directory", type=Path, metavar="DIR", help="folder that tenrec-jax ingest wrote")
    stats.add_argument("--out", type=Path, metavar="DIR2", help="folder to write to (default: DIR)")
    stats.add_argument("--protocol", default="per_user_order", help="split to describe (default: %(default)s)")
    stats.add_argument(
        "--leak_auc",
        type=float,
        default=DEFAULT_ALARM,
        help="flag a column that alone reaches this click AUC (default: %(default)s, the best that sound models reach on Tenrec)",
    )
    stats.add_argument("--truth", type=Path, metavar="FILE", help="a twin's .truth.parquet: judge the twin's targets")
    stats.add_argument("--json", action="store_true", help="machine-readable output")
    stats.set_defaults(run=_stats)


def _stats(options: argparse.Namespace) -> None:
    out = options.out or options.directory
    report = write_stats(
        options.directory, out, protocol=options.protocol, leak_auc=options.leak_auc, truth=options.truth
    )
    if options.json:
        print(json_text(report.to_json()), end="")
    else:
        print(f"{summary(report)}\nwritten: {out / JSON_FILE}, {out / PAGE_FILE}")


def _synth(options: argparse.Namespace) -> None:
    summary = write_twin(options.out, kind=options.kind, rows=options.rows, seed=options.seed)
    print(f"{summary.path}: {summary.rows:,} rows, {summary.users:,} users, {summary.items:,} items")
    print(f"true probabilities: {summary.truth}")


def _ingest(options: argparse.Namespace) -> None:
    how = IngestOptions(
        _columns(options.columns),
        options.duplicates,
        options.max_bad_fraction,
        options.engine,
        options.ids,
        options.allow_post_event_features,
    )
    manifest = ingest(options.sources, options.kind, options.out, how)
    done = "written" if manifest.is_new else "holds these sources already, nothing to do"
    print(f"{options.out}: {done}; {json.dumps(dict(manifest.counts))}")
    for note in manifest.notes:
        print(f"note: {note}")
    if manifest.counts["bad_rows"]:
        print(f"note: {manifest.counts['bad_rows']:,} bad rows were left out; see {options.out / QUARANTINE_FILE}")


def _report(options: argparse.Namespace) -> None:
    several = len(options.runs) > 1
    print(write_side_by_side(options.runs, options.out) if several else write_report(options.runs[0]))


def _columns(text: str | None) -> dict[str, str] | None:
    """The mapping that --columns gives, itself or in a file."""
    if text is None:
        return None
    if text.lstrip().startswith("{"):
        return parse_columns(text, "--columns")
    try:
        mapping = Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--columns: {text} cannot be read: {error}") from error
    return parse_columns(mapping, text)


if __name__ == "__main__":
    sys.exit(main())
