"""The commands that ask a recommender: `recommend`, for one or for all, and `score`."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from tenrec_jax.bulk import recommend_all
from tenrec_jax.config import from_mapping
from tenrec_jax.data.engines import ENGINES, LOCAL
from tenrec_jax.data.interactions import RawId
from tenrec_jax.errors import UserError
from tenrec_jax.files import parsed_json
from tenrec_jax.interop.original_scorer import OriginalScorer, is_original
from tenrec_jax.recommender import Recommender
from tenrec_jax.requests import Recommendations, RecommendedItem, Rules

RECOMMEND_EXAMPLES = """examples:
  tenrec-jax recommend --recommender runs/quickstart/recommender --user 1 --k 10
  tenrec-jax recommend --recommender runs/quickstart/recommender --history 12,7,99 --json
  tenrec-jax recommend --recommender runs/quickstart/recommender --user 1 --rules '{"diversity": 0.3, "max_per_category": 4}'
  tenrec-jax recommend --recommender runs/quickstart/recommender --all --out lists       all users, as Parquet; again: goes on

rules (those that are not given are the recommender's own, see rules.json in its folder):
  action_values {"click": 1, "like": 2, "share": 4, "follow": 3}, retrieval_weight, exclude_seen, blocked_items, blocked_categories,
  diversity, max_per_category, exploration, seed; tenrec_jax/requests.py says what each does
"""
SCORE_EXAMPLES = """examples:
  tenrec-jax score --recommender runs/quickstart/recommender --user 1 --candidates 12,7,99
  tenrec-jax score --recommender original --user 5 --history 12,7,99 --candidates 3,4,5     a model of the original system
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `recommend` and `score` to the command line."""
    recommend = commands.add_parser(
        "recommend",
        help="recommend items to a user, from a history, or to all users",
        epilog=RECOMMEND_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recommend.add_argument("--recommender", type=Path, required=True, help="folder that launch.py wrote")
    who = recommend.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="raw id of a user of the log")
    who.add_argument("--history", help="raw ids of clicked items, oldest first, comma-separated; '' for nobody known")
    who.add_argument("--all", action="store_true", help="every user of the log; needs --out")
    recommend.add_argument("--k", type=int, default=20, help="number of items (default: %(default)s)")
    recommend.add_argument(
        "--rules", default="{}", metavar="JSON", help="rules that differ from the recommender's; see below"
    )
    recommend.add_argument("--include_seen", action="store_true", help="keep items that the user has seen")
    recommend.add_argument("--json", action="store_true", help="machine-readable output")
    recommend.add_argument("--out", type=Path, help="for --all: folder to write; finished parts there are kept")
    recommend.add_argument(
        "--users_per_part", type=int, default=4096, help="for --all: users of a part (default: %(default)s)"
    )
    recommend.add_argument(
        "--engine", choices=ENGINES, default=LOCAL, help="for --all: this process, or Ray (default: %(default)s)"
    )
    recommend.set_defaults(run=_recommend)

    score = commands.add_parser(
        "score",
        help="score given items for a user, or with a model of the original system",
        epilog=SCORE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.add_argument("--recommender", type=Path, required=True, help="folder that launch.py or import-original wrote")
    score.add_argument("--user", help="raw id of a user")
    score.add_argument("--history", help="raw ids of clicked items, oldest first, comma-separated; '' for nobody known")
    score.add_argument("--candidates", required=True, help="raw ids of the items to score, comma-separated")
    score.add_argument("--gender", type=int, default=0, help="of the user; read by the original system's models alone")
    score.add_argument("--age", type=int, default=0, help="likewise")
    score.add_argument("--categories", help="of the candidates, comma-separated; likewise")
    score.add_argument("--json", action="store_true", help="machine-readable output")
    score.set_defaults(run=_score)


def _recommend(options: argparse.Namespace) -> None:
    if options.all != (options.out is not None):
        raise UserError("--all and --out go together: the lists of all users are written to a folder.")
    if options.all:
        _recommend_all(options)
        return
    recommender = Recommender.load(options.recommender)
    user, history = _who(options, *recommender.ids_are_text)
    rules = _rules(options, recommender.rules)
    answer = recommender.recommend(user_id=user, history=history, k=options.k, rules=rules)
    print(json.dumps(dataclasses.asdict(answer)) if options.json else _table(answer, options.k))


def _recommend_all(options: argparse.Namespace) -> None:
    asked = recommend_all(
        options.recommender,
        options.out,
        k=options.k,
        rules=lambda own: _rules(options, own),
        users_per_part=options.users_per_part,
        engine=options.engine,
    )
    if options.json:
        print(json.dumps(asked.to_json()))
    else:
        print(f"{options.out}: {asked.users:,} users in {asked.parts} parts, by recommender {asked.version}")


def _rules(options: argparse.Namespace, own: Rules) -> Rules:
    """The recommender's own rules, with what --rules and --include_seen change."""
    given = parsed_json(options.rules, "--rules")
    if not isinstance(given, dict):
        raise UserError(f"--rules is {options.rules!r}; it must be a JSON object, for example " + '{"diversity": 0.3}.')
    values = dataclasses.asdict(own) | given
    if isinstance(given.get("action_values"), dict):
        values["action_values"] = dataclasses.asdict(own.action_values) | given["action_values"]
    rules: Rules = from_mapping(values, Rules, "rules")
    return dataclasses.replace(rules, exclude_seen=False) if options.include_seen else rules


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
