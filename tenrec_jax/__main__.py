"""The command line: `tenrec-jax`, the same as `python -m tenrec_jax`."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tenrec_jax import __version__, verify
from tenrec_jax.data.engines import ENGINES, LOCAL
from tenrec_jax.data.id_types import AUTO, ID_TYPES
from tenrec_jax.data.ingest import DUPLICATES, IngestOptions, ingest
from tenrec_jax.data.interactions import RawId
from tenrec_jax.data.leakage import DEFAULT_ALARM
from tenrec_jax.data.logs import KIND_NAMES, parse_columns
from tenrec_jax.data.quarantine import FILE as QUARANTINE_FILE
from tenrec_jax.data.schema import TWIN_KINDS
from tenrec_jax.data.synthetic import write_twin
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation import compare
from tenrec_jax.evaluation.report import write_report
from tenrec_jax.evaluation.side_by_side import write_side_by_side
from tenrec_jax.evaluation.stats_report import JSON_FILE, PAGE_FILE, summary, write_stats
from tenrec_jax.files import json_text
from tenrec_jax.interop import commands as interop
from tenrec_jax.interop.original_scorer import OriginalScorer, is_original
from tenrec_jax.recommender import Recommender
from tenrec_jax.requests import Recommendations, RecommendedItem
from tenrec_jax.serving import commands as serving_commands

EXAMPLES = """examples:
  tenrec-jax synth --kind qb_video --rows 300000 --seed 0 --out twin.csv
  tenrec-jax ingest twin.csv --kind qb_video --out table
  tenrec-jax ingest my.csv.gz --kind custom --columns '{"user": "uid", "item": "vid", "click": "watched"}' --out table2
  tenrec-jax stats table
  tenrec-jax recommend --recommender runs/quickstart/recommender --user 1 --k 10
  tenrec-jax recommend --recommender runs/quickstart/recommender --history 12,7,99 --json
  tenrec-jax score --recommender runs/quickstart/recommender --user 1 --candidates 12,7,99
  tenrec-jax export --recommender runs/quickstart/recommender --out exported
  tenrec-jax import --exported exported --out recommender2
  tenrec-jax import-original ranker.pt --out original
  tenrec-jax report runs/quickstart
  tenrec-jax report runs/before runs/after --out both.html
  tenrec-jax compare runs/before runs/after
  tenrec-jax verify runs/quickstart

Training and evaluation are run from a config: python experiments/launch.py --help
"""


STATS_EXAMPLES = """examples:
  tenrec-jax stats table                                  the default split, written into the table's folder
  tenrec-jax stats table --protocol leave_one_out --out report
  tenrec-jax stats table --json | python -m json.tool     everything, for programs
  tenrec-jax stats table --truth twin.truth.parquet       a synthetic twin beside Tenrec's published numbers
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
    _add_serving(commands)
    serving_commands.add_command(commands)
    interop.add_commands(commands)
    compare.add_command(commands)
    verify.add_command(commands)
    report = commands.add_parser("report", help="write report.html again from a run's files, or a page of several runs")
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="workdir of a run; several stand side by side"
    )
    report.add_argument(
        "--out", type=Path, default=Path("runs.html"), help="page of several runs (default: %(default)s)"
    )
    report.set_defaults(run=_report)
    return parser


def _add_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    synth = commands.add_parser("synth", help="write a synthetic log in Tenrec's format, with its true probabilities")
    synth.add_argument("--kind", choices=TWIN_KINDS, default="qb_video", help="format to write (default: %(default)s)")
    synth.add_argument("--rows", type=int, default=300_000, help="rows to write (default: %(default)s)")
    synth.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: %(default)s)")
    synth.add_argument("--out", type=Path, required=True, help="CSV file to write")
    synth.set_defaults(run=_synth)

    table = commands.add_parser("ingest", help="validate a log and turn it into a table")
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


def _add_serving(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    recommend = commands.add_parser("recommend", help="recommend items to a user, or from a history")
    recommend.add_argument("--recommender", type=Path, required=True, help="folder that launch.py wrote")
    who = recommend.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="raw id of a user of the log")
    who.add_argument("--history", help="raw ids of clicked items, oldest first, comma-separated; '' for nobody known")
    recommend.add_argument("--k", type=int, default=20, help="number of items (default: %(default)s)")
    recommend.add_argument("--include_seen", action="store_true", help="keep items that the user has seen")
    recommend.add_argument("--json", action="store_true", help="machine-readable output")
    recommend.set_defaults(run=_recommend)

    score = commands.add_parser("score", help="score given items for a user, or with a model of the original system")
    score.add_argument("--recommender", type=Path, required=True, help="folder that launch.py or import-original wrote")
    score.add_argument("--user", help="raw id of a user")
    score.add_argument("--history", help="raw ids of clicked items, oldest first, comma-separated; '' for nobody known")
    score.add_argument("--candidates", required=True, help="raw ids of the items to score, comma-separated")
    score.add_argument("--gender", type=int, default=0, help="of the user; read by the original system's models alone")
    score.add_argument("--age", type=int, default=0, help="likewise")
    score.add_argument("--categories", help="of the candidates, comma-separated; likewise")
    score.add_argument("--json", action="store_true", help="machine-readable output")
    score.set_defaults(run=_score)


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


def _recommend(options: argparse.Namespace) -> None:
    recommender = Recommender.load(options.recommender)
    user, history = _who(options, *recommender.ids_are_text)
    rules = dataclasses.replace(recommender.rules, exclude_seen=not options.include_seen)
    answer = recommender.recommend(user_id=user, history=history, k=options.k, rules=rules)
    print(json.dumps(dataclasses.asdict(answer)) if options.json else _table(answer, options.k))


def _score(options: argparse.Namespace) -> None:
    if is_original(options.recommender):
        _score_with_original(options)
        return
    recommender = Recommender.load(options.recommender)
    user, history = _who(options, *recommender.ids_are_text)
    candidates = _ids(options.candidates, "--candidates", is_text=recommender.ids_are_text[1])
    items = recommender.score(candidates, user_id=user, history=history)
    if options.json:
        print(json.dumps([dataclasses.asdict(item) for item in items]))
    else:
        print("\n".join(_item_lines(items)))


def _score_with_original(options: argparse.Namespace) -> None:
    if options.user is None:
        raise UserError("--user is needed: the original's models read an id in any case.")

    def integers(text: str, flag: str) -> list[int]:
        return [int(value) for value in _ids(text, flag, is_text=False)]

    candidates = integers(options.candidates, "--candidates")
    found = OriginalScorer.load(options.recommender).score(
        int(_id(options.user, "--user", is_text=False)),
        integers(options.history or "", "--history"),
        candidates,
        gender=options.gender,
        age=options.age,
        categories=None if options.categories is None else integers(options.categories, "--categories"),
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    print(f"{'item':>12}  {'score':>9}  logits")
    for item, score, logits in zip(candidates, found.scores, found.logits, strict=True):
        print(f"{item:>12}  {score:>9.4f}  {' '.join(f'{logit:.4f}' for logit in logits)}")


def _who(
    options: argparse.Namespace, users_are_text: bool, items_are_text: bool
) -> tuple[RawId | None, list[RawId] | None]:
    user = None if options.user is None else _id(options.user, "--user", is_text=users_are_text)
    history = None if options.history is None else _ids(options.history, "--history", is_text=items_are_text)
    return user, history


def _ids(text: str, flag: str, *, is_text: bool) -> list[RawId]:
    return [_id(part, flag, is_text=is_text) for part in text.split(",") if part.strip()]


def _id(text: str, flag: str, *, is_text: bool) -> RawId:
    if is_text:
        return text
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{flag}: {text!r} is not an integer id.") from None


def _item_lines(items: Sequence[RecommendedItem]) -> list[str]:
    actions = list(items[0].probabilities) if items else []
    lines = [f"{'rank':>4}  {'item':>12}  {'score':>9}" + "".join(f"  {a:>8}" for a in actions) + f"  {'retrieval':>9}"]
    for rank, item in enumerate(items, 1):
        probabilities = "".join(f"  {item.probabilities[action]:>8.4f}" for action in actions)
        lines.append(f"{rank:>4}  {item.item_id:>12}  {item.score:>9.4f}{probabilities}  {item.retrieval_score:>9.3f}")
    return lines


def _table(answer: Recommendations, k: int) -> str:
    lines = _item_lines(answer.items)
    if len(answer.items) < k:
        lines.append(f"The catalogue holds only {len(answer.items)} items to recommend to this user.")
    if answer.unknown_items:
        lines.append(f"Not in the catalogue, read as unknown: {', '.join(map(str, answer.unknown_items))}")
    times = ", ".join(f"{name} {value:.1f}" for name, value in answer.milliseconds.items())
    for effect in answer.effects:
        lines.append(f"{effect.rule}: {len(effect.removed)} removed, {len(effect.moved)} moved")
    lines.append(f"{answer.history_length} events; ms: {times}; version {answer.version}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
