"""Recommendations for all users of a log at once, as a folder of Parquet parts that any tool reads.

parts/00000.parquet ...  a row an item of a list: user_id, rank (from 1), item_id, category, score, retrieval_score, explored and the
                         probability of each action, in the order of users and ranks; the folder `parts` is one Parquet dataset
manifest.json            what was asked of which recommender, and the SHA-256 of every part; written last

Every part is a function of the recommender, the rules and its number. So the same command again skips the parts that are finished and
makes the rest, a damaged part is made again as it was, and both engines give the same answers.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from tenrec_jax.data.engines import LOCAL, NO_RAY
from tenrec_jax.errors import UserError
from tenrec_jax.files import json_text, locked, written_whole
from tenrec_jax.recommender import Recommender
from tenrec_jax.requests import Recommendations, Request, Rules
from tenrec_jax.sealed import FILES, KIND, VERSION, Kind, damaged_files, read_manifest_of, seal
from tenrec_jax.user_states import BATCH_SIZES

MANIFEST, FORMAT_VERSION = "manifest.json", 1
ASKED = b"asked"
REMEDY = "Name another folder with --out, or remove this one."


@dataclass(frozen=True)
class Question:
    """What is asked for all users: `version` is the recommender's; `users_per_part` users make a part."""

    version: str
    users: int
    users_per_part: int
    k: int
    rules: Rules

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.users // self.users_per_part)

    def to_json(self) -> dict[str, Any]:
        """As it is written down, and compared."""
        return json.loads(json_text(dataclasses.asdict(self)))


def recommend_all(
    folder: Path,
    out: Path,
    *,
    k: int = 20,
    rules: Callable[[Rules], Rules] = lambda own: own,
    users_per_part: int = 4096,
    engine: str = LOCAL,
    progress: bool = True,
) -> Question:
    """Write recommendations for every user of the log.

    Args:
        folder: the recommender. out: folder to write.
        k: number of items. rules: from the recommender's own to those to follow.
        users_per_part: users of a part.
        engine: "local", this process; or "ray", workers of a Ray cluster, which need to see both folders.
        progress: show a bar with the time left.

    Raises:
        UserError: no such recommender, wrong settings, or a folder that holds something else, the differences being named.
    """
    recommender = Recommender.load(folder)
    how = rules(recommender.rules)
    if how.exploration and how.seed is None:
        raise UserError(
            "rules.seed is missing: with exploration the lists are drawn, and a part could not be made again."
        )
    question = Question(recommender.version, len(recommender.user_ids), users_per_part, k, how)
    if users_per_part < 1:
        raise UserError(f"users_per_part is {users_per_part}; it must be at least 1.")
    recommender.recommend(history=[], k=k, rules=how)  # wrong settings are told before any work
    (out / part_name(0)).parent.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", "recommendations"):
        whole = _whole_parts(out, question)
        left = [number for number in range(question.parts) if number not in whole]
        made = _made(left, folder, out, question, recommender, engine)
        for _ in tqdm(made, total=len(left), unit="part", delay=1, leave=False, disable=not progress):
            pass
        if left or not (out / MANIFEST).exists():
            seal(out, {KIND: Kind.RECOMMENDATIONS, VERSION: FORMAT_VERSION, "asked": question.to_json()}, name=MANIFEST)
    return question


def write_part(recommender: Recommender, out: Path, number: int, question: Question) -> int:
    """Write one part, whole or not at all. Returns the number of its users."""
    first = number * question.users_per_part
    users = recommender.user_ids[first : first + question.users_per_part].tolist()
    answers: list[Recommendations] = []
    for start in range(0, len(users), BATCH_SIZES[-1]):
        batch = [
            Request(user_id=user, k=question.k, rules=question.rules) for user in users[start : start + BATCH_SIZES[-1]]
        ]
        for answer in recommender.answer(batch):
            if not isinstance(answer, Recommendations):
                raise answer
            answers.append(answer)
    rows = [
        (user, rank, item)
        for user, answer in zip(users, answers, strict=True)
        for rank, item in enumerate(answer.items, 1)
    ]
    text_users, text_items = recommender.ids_are_text
    names = recommender.actions if recommender.is_ranked else ()
    table = pa.table(
        {
            "user_id": pa.array([user for user, *_ in rows], pa.string() if text_users else pa.int64()),
            "rank": pa.array([rank for _, rank, _ in rows], pa.int32()),
            "item_id": pa.array([item.item_id for *_, item in rows], pa.string() if text_items else pa.int64()),
            "category": pa.array([item.category for *_, item in rows], pa.int32()),
            "score": pa.array([item.score for *_, item in rows], pa.float32()),
            "retrieval_score": pa.array([item.retrieval_score for *_, item in rows], pa.float32()),
            "explored": pa.array([item.explored for *_, item in rows], pa.bool_()),
            **{name: pa.array([item.probabilities[name] for *_, item in rows], pa.float32()) for name in names},
        }
    )
    with written_whole(out / part_name(number)) as temporary:
        stated = table.replace_schema_metadata({ASKED: _stated(number, question)})
        pq.write_table(stated, temporary, compression="zstd", write_page_checksum=True)
    return len(users)


def part_name(number: int) -> str:
    """The file of a part."""
    return f"parts/{number:05}.parquet"


def _made(
    left: list[int], folder: Path, out: Path, question: Question, recommender: Recommender, engine: str
) -> Iterator[int]:
    if not left:
        return
    if engine == LOCAL:
        yield from (write_part(recommender, out, number, question) for number in left)
        return
    try:
        from tenrec_jax.bulk_ray import made_by_ray
    except ImportError as error:
        raise UserError(NO_RAY.format(error=error)) from error
    yield from made_by_ray(left, folder.absolute(), out.absolute(), question)


def _whole_parts(out: Path, question: Question) -> set[int]:
    """The parts that are finished and, once all were, as they were written.

    Raises:
        UserError: one answers another question.
    """
    hashes: dict[str, str] | None = None
    if (out / MANIFEST).exists():
        remedy = f"Remove {MANIFEST}, and the parts are sealed again."
        manifest = read_manifest_of(out, Kind.RECOMMENDATIONS, version=FORMAT_VERSION, name=MANIFEST, remedy=remedy)
        hashes = manifest[FILES]
    return {number for number in range(question.parts) if _is_whole(out, number, question, hashes)}


def _is_whole(out: Path, number: int, question: Question, hashes: Mapping[str, str] | None) -> bool:
    path = out / part_name(number)
    if not path.exists():
        return False
    try:
        with pq.ParquetFile(path) as file:
            stated = (file.schema_arrow.metadata or {}).get(ASKED, b"")
    except (pa.ArrowException, OSError):
        return False  # made again
    if stated != _stated(number, question):
        raise UserError(f"{path} answers another question: {_differences(stated, question)} {REMEDY}")
    return hashes is None or not damaged_files(out, {part_name(number): hashes.get(part_name(number), "")})


def _stated(number: int, question: Question) -> bytes:
    return json_text(question.to_json() | {"part": number}).encode()


def _differences(stated: bytes, question: Question) -> str:
    try:
        before = json.loads(stated)
    except ValueError:
        return "it does not say which."
    now = question.to_json()
    changed = [f"{key} is {before.get(key)!r} there, {now[key]!r} now" for key in now if before.get(key) != now[key]]
    return "; ".join(changed) + "."
