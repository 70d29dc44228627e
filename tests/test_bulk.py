"""Recommendations to all users: each list is the one that the user alone gets, whatever was interrupted, damaged or done by Ray."""

import json
from pathlib import Path

import mirrors
import pyarrow.parquet as pq
import pytest

from tenrec_jax import __main__ as command_line
from tenrec_jax import bulk
from tenrec_jax.bulk import recommend_all
from tenrec_jax.errors import UserError
from tenrec_jax.files import sha256_of
from tenrec_jax.recommender import Recommender
from tenrec_jax.requests import Rules
from tenrec_jax.sealed import files_in
from tenrec_jax.verify import verify

RULES = Rules(diversity=0.3, exploration=0.2, seed=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mirrors.write_recommender(tmp_path_factory.mktemp("bulk") / "recommender")


@pytest.fixture(scope="module")
def lists(folder: Path) -> Path:
    """All users' lists in parts of two users."""
    out = folder.with_name("lists")
    asked = recommend_all(folder, out, k=4, rules=lambda _: RULES, users_per_part=2, progress=False)
    assert (asked.users, asked.parts) == (5, 3)
    return out


def hashes(out: Path) -> dict[str, str]:
    return {name: sha256_of(out / name) for name in files_in(out)}


def test_every_user_has_the_list_that_the_user_alone_gets(folder: Path, lists: Path) -> None:
    recommender, rows = Recommender.load(folder), pq.read_table(lists / "parts").to_pylist()
    assert list(dict.fromkeys(row["user_id"] for row in rows)) == recommender.user_ids.tolist()
    for user in recommender.user_ids.tolist():
        mine = [row for row in rows if row["user_id"] == user]
        alone = recommender.recommend(user_id=user, k=4, rules=RULES)
        assert [row["rank"] for row in mine] == [1, 2, 3, 4]
        for row, item in zip(mine, alone.items, strict=True):
            assert (row["item_id"], row["category"], row["explored"]) == (item.item_id, item.category, item.explored)
            assert row["score"] == pytest.approx(item.score, abs=2e-5)
            assert row["follow"] == pytest.approx(item.probabilities["follow"], abs=2e-5)


def test_finished_parts_are_kept_and_the_others_made_as_they_were(
    folder: Path, lists: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, made = hashes(lists), []
    write_part = bulk.write_part

    def noted(*arguments) -> int:
        made.append(arguments[2])
        return write_part(*arguments)

    monkeypatch.setattr(bulk, "write_part", noted)

    def again() -> list[int]:
        made.clear()
        recommend_all(folder, lists, k=4, rules=lambda _: RULES, users_per_part=2, progress=False)
        assert hashes(lists) == before
        return made

    assert again() == []
    (lists / "parts/00001.parquet").unlink()
    assert again() == [1]
    damaged = bytearray((lists / "parts/00002.parquet").read_bytes())
    damaged[60] ^= 1
    (lists / "parts/00002.parquet").write_bytes(damaged)
    (verdict,) = verify(lists)
    assert [problem.split()[0] for problem in verdict.damaged] == [str(lists / "parts/00002.parquet")]
    assert again() == [2]
    (lists / "manifest.json").unlink()  # as if killed before the end
    (lists / "parts/00000.parquet").unlink()
    assert again() == [0]
    assert not any(verdict.damaged for verdict in verify(lists))


def test_a_folder_of_another_question_is_refused_with_the_difference(folder: Path, lists: Path) -> None:
    before = hashes(lists)
    with pytest.raises(UserError, match=r"parts/00000\.parquet answers another question: k is 4 there, 5 now\. Name"):
        recommend_all(folder, lists, k=5, rules=lambda _: RULES, users_per_part=2, progress=False)
    with pytest.raises(UserError, match=r"rules\.seed is missing"):
        recommend_all(folder, lists, rules=lambda _: Rules(exploration=0.2), progress=False)
    assert hashes(lists) == before


def test_the_command_says_what_it_did_and_what_it_needs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["recommend", "--recommender", str(folder), "--all"]
    rules = ["--rules", '{"action_values": {"like": 9}, "max_per_category": 2}', "--k", "6"]
    assert command_line.main([*command, "--out", str(tmp_path / "lists"), *rules, "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)
    assert asked["rules"]["action_values"] == {"click": 1.0, "like": 9.0, "share": 4.0, "follow": 3.0}
    rows = pq.read_table(tmp_path / "lists" / "parts").to_pylist()
    counts = [(row["user_id"], row["category"]) for row in rows if row["category"]]
    assert max(map(counts.count, counts)) <= 2
    for wrong, message in (
        ([], "--all and --out go together"),
        (["--out", str(tmp_path / "x"), "--rules", "[]"], "it must be a JSON object"),
        (["--out", str(tmp_path / "x"), "--rules", '{"divresity": 1}'], "Did you mean rules.diversity?"),
        (["--out", str(tmp_path / "x"), "--rules", '{"diversity": 1}'], "rules.diversity is 1"),
    ):
        assert command_line.main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
