"""The command line: `python -m torch_mlu_backend verify|recommend|score|bench DIR --device cpu|cuda|mlu|auto`."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from torch_mlu_backend import __version__, artifact
from torch_mlu_backend import device as devices
from torch_mlu_backend.artifact import RawId
from torch_mlu_backend.bench import bench
from torch_mlu_backend.errors import UserError
from torch_mlu_backend.original import OriginalScorer, OriginalScores
from torch_mlu_backend.recommender import RecommendedItem, Recommender
from torch_mlu_backend.verify import report, verify

EXAMPLES = """examples:
  python -m torch_mlu_backend verify exported --device mlu
  python -m torch_mlu_backend recommend exported --user 1 --k 10 --device auto
  python -m torch_mlu_backend score exported --history 12,7,99 --candidates 5,6,8 --json
  python -m torch_mlu_backend bench exported --device cpu --autocast bfloat16
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 another outcome than the probe's, 2 wrong use, a bad file or no such device."""
    options = _parser().parse_args(arguments)
    try:
        resolved = devices.resolve(options.device)
        for note in resolved.notes:
            sys.stderr.write(f"note: passed over {note}\n")
        options.device = str(resolved.device)
        return options.run(options)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_mlu_backend",
        description="Serves what tenrec-jax export wrote, with PyTorch alone.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, what: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, description=what)
        added.add_argument(
            "folder", type=Path, metavar="DIR", help="folder that tenrec-jax export or import-original wrote"
        )
        added.add_argument(
            "--device", default="auto", help="auto, mlu, cuda or cpu, with a number such as mlu:1 (default: auto)"
        )
        added.add_argument("--autocast", choices=devices.AUTOCAST_TYPES, help="compute products in a shorter type")
        added.add_argument("--json", action="store_true", help="machine-readable output")
        return added

    command("verify", "compare this device's outputs with the stored ones").set_defaults(run=_verify)

    recommend = command("recommend", "recommend items to a user, or from a history")
    _add_who(recommend)
    recommend.add_argument("--k", type=int, default=20, help="number of items (default: %(default)s)")
    recommend.add_argument("--include_seen", action="store_true", help="keep items that the user has seen")
    recommend.set_defaults(run=_recommend)

    score = command("score", "score given items for a user")
    _add_who(score)
    score.add_argument("--candidates", required=True, help="raw ids of the items to score, comma-separated")
    score.add_argument("--gender", type=int, default=0, help="of the user; read by the original system's models alone")
    score.add_argument("--age", type=int, default=0, help="likewise")
    score.add_argument("--categories", help="of the candidates, comma-separated; likewise")
    score.set_defaults(run=_score)

    speed = command("bench", "measure examples a second")
    speed.add_argument("--batch", type=int, default=500, help="candidates a user (default: %(default)s)")
    speed.set_defaults(run=_bench)
    return parser


def _add_who(command: argparse.ArgumentParser) -> None:
    command.add_argument("--user", help="raw id of a user")
    command.add_argument(
        "--history", help="raw ids of clicked items, oldest first, comma-separated; '' for nobody known"
    )


def _verify(options: argparse.Namespace) -> int:
    verdict = verify(options.folder, torch.device(options.device), options.autocast)
    print(json.dumps(dataclasses.asdict(verdict)) if options.json else "\n".join(report(verdict)))
    return 0 if verdict.passed or not verdict.judged else 1


def _recommend(options: argparse.Namespace) -> int:
    recommender = Recommender.load(options.folder, options.device, options.autocast)
    user, history = _who(options, *recommender.ids_are_text)
    answer = recommender.recommend(user_id=user, history=history, k=options.k, exclude_seen=not options.include_seen)
    if options.json:
        print(json.dumps(dataclasses.asdict(answer)))
        return 0
    print("\n".join(_table(answer.items)))
    print(f"{answer.history_length} events read, {answer.seen_removed} seen items removed; version {answer.version}")
    return 0


def _score(options: argparse.Namespace) -> int:
    if artifact.read_manifest(options.folder)["kind"] != artifact.RECOMMENDER:
        return _score_with_original(options)
    recommender = Recommender.load(options.folder, options.device, options.autocast)
    user, history = _who(options, *recommender.ids_are_text)
    candidates = _ids(options.candidates, "--candidates", is_text=recommender.ids_are_text[1])
    items = recommender.score(candidates, user_id=user, history=history)
    print(json.dumps([dataclasses.asdict(item) for item in items]) if options.json else "\n".join(_table(items)))
    return 0


def _score_with_original(options: argparse.Namespace) -> int:
    if options.user is None:
        raise UserError("--user is needed: the original's models read an id in any case.")
    candidates, history = (
        _integers(options.candidates, "--candidates"),
        _integers(options.history or "", "--history"),
    )
    found = OriginalScorer.load(options.folder, options.device, options.autocast).score(
        _integer(options.user, "--user"),
        history,
        candidates,
        gender=options.gender,
        age=options.age,
        categories=None if options.categories is None else _integers(options.categories, "--categories"),
    )
    print(json.dumps(dataclasses.asdict(found)) if options.json else "\n".join(_original_table(candidates, found)))
    return 0


def _bench(options: argparse.Namespace) -> int:
    speeds = bench(options.folder, torch.device(options.device), options.batch, options.autocast)
    if options.json:
        print(json.dumps([dataclasses.asdict(speed) for speed in speeds]))
        return 0
    for speed in speeds:
        memory = "" if speed.peak_memory is None else f", {speed.peak_memory / 2**20:.0f} MiB at most"
        print(f"{speed.work}: {speed.examples_per_second:,.0f} a second on {options.device}{memory}")
    return 0


def _who(
    options: argparse.Namespace, users_are_text: bool, items_are_text: bool
) -> tuple[RawId | None, list[RawId] | None]:
    user = options.user if options.user is None or users_are_text else _integer(options.user, "--user")
    history = None if options.history is None else _ids(options.history, "--history", is_text=items_are_text)
    return user, history


def _ids(text: str, flag: str, *, is_text: bool) -> list[RawId]:
    return [part for part in text.split(",") if part.strip()] if is_text else [*_integers(text, flag)]


def _integers(text: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{flag}: {text!r} is not a list of integers.") from None


def _integer(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{flag}: {text!r} is not an integer id.") from None


def _table(items: tuple[RecommendedItem, ...]) -> list[str]:
    actions = list(items[0].probabilities) if items else []
    lines = [f"{'rank':>4}  {'item':>12}  {'score':>9}" + "".join(f"  {a:>8}" for a in actions) + f"  {'retrieval':>9}"]
    for rank, item in enumerate(items, 1):
        probabilities = "".join(f"  {item.probabilities[action]:>8.4f}" for action in actions)
        lines.append(f"{rank:>4}  {item.item_id:>12}  {item.score:>9.4f}{probabilities}  {item.retrieval_score:>9.3f}")
    return lines


def _original_table(candidates: list[int], found: OriginalScores) -> list[str]:
    lines = [f"{'item':>12}  {'score':>9}  logits"]
    for raw, score, logits in zip(candidates, found.scores, found.logits, strict=True):
        lines.append(f"{raw:>12}  {score:>9.4f}  {' '.join(f'{logit:.4f}' for logit in logits)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
