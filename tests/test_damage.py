"""Damage to any file of any artefact is told by whatever reads it, and by `verify`, with the file's name."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from faults import FAULTS, apply
from small_artefacts import READERS, kept

from tenrec_jax import stages
from tenrec_jax.__main__ import main
from tenrec_jax.data.interactions import open_table
from tenrec_jax.errors import UserError
from tenrec_jax.sealed import seal
from tenrec_jax.verify import verify
from torch_mlu_backend.errors import UserError as MirrorError


class Damage(NamedTuple):
    """A fault in one file, or in two that changed places."""

    artefact: str
    fault: str
    files: tuple[str, ...]


def drawn(artefacts: Path, count: int, random: np.random.Generator) -> Iterator[Damage]:
    """Faults in turn, so that every artefact has every fault, and, among enough, every file too."""
    pairs = list(product(READERS, FAULTS))
    files = {pair: random.permutation(kept(artefacts / pair[0])).tolist() for pair in pairs}
    for number in range(count):
        artefact, fault = pair = pairs[number % len(pairs)]
        ours = files[pair]
        place = number // len(pairs) % len(ours)
        other = ours[(place + int(random.integers(1, len(ours)))) % len(ours)]
        yield Damage(artefact, fault, (ours[place], other) if fault == "swap" else (ours[place],))


def told(read: Callable[[Path], object], folder: Path, files: tuple[str, ...]) -> bool:
    """Whether a reader refuses the folder and names the files."""
    try:
        read(folder)
    except (UserError, MirrorError) as error:
        return all(name in str(error) for name in files)
    return False


def told_by_verify(folder: Path, files: tuple[str, ...]) -> bool:
    problems = [problem for verdict in verify(folder) for problem in verdict.damaged]
    return all(any(problem.startswith(f"{folder / name} ") for problem in problems) for name in files)


def assert_all_told(artefacts: Path, tmp_path: Path, count: int, tell: Callable[[str], None]) -> None:
    random = np.random.default_rng(count)
    missed: list[tuple[str, Damage]] = []
    for number, damage in enumerate(drawn(artefacts, count, random)):
        folder = tmp_path / str(number) / damage.artefact
        shutil.copytree(artefacts / damage.artefact, folder)
        if damage.artefact == "table":
            open_table(folder)  # the times of its files are noted, and must not hide what comes after
        apply(damage.fault, folder / damage.files[0], folder / damage.files[-1], random)
        # Without its manifest nothing can be said of a folder's other files.
        manifests = tuple(sorted(name for name in damage.files if name.endswith(("manifest.json", "index.json"))))[::-1]
        names = manifests[:1] or damage.files
        missed += [(read.__name__, damage) for read in READERS[damage.artefact] if not told(read, folder, names)]
        if not told_by_verify(folder, manifests or names):
            missed.append(("verify", damage))
        shutil.rmtree(folder.parent)
    lost = len({damage for _, damage in missed})
    tell(f"tables, indexes, recommenders, exports: {count} damages, {count - lost} told by name, {lost} missed")
    assert not missed


def test_three_hundred_damages_are_all_told_by_name(
    artefacts: Path, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    assert_all_told(artefacts, tmp_path, 300, tell)


@pytest.mark.slow
def test_ten_thousand_damages_are_all_told_by_name(
    artefacts: Path, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    assert_all_told(artefacts, tmp_path, 10_000, tell)


def test_what_is_whole_is_called_whole_and_counted(artefacts: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", str(artefacts), "--json"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    found = {Path(verdict["path"]).relative_to(artefacts).as_posix(): verdict for verdict in json.loads(output.out)}
    assert {name: verdict["kind"] for name, verdict in found.items()} == {
        "table": "table",
        "index": "index",
        "recommender": "recommender",
        "recommender/index": "index",
        "exported": "exported_recommender",
    }
    for name, verdict in found.items():
        paths = [artefacts / name / file for file in kept(artefacts / name)]
        assert (verdict["files"], verdict["bytes"]) == (len(paths), sum(path.stat().st_size for path in paths))
        assert verdict["damaged"] == []


def test_damage_gives_exit_code_1_and_a_line_for_each_file(
    artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(artefacts / "table", tmp_path / "table")
    shutil.copytree(artefacts / "index", tmp_path / "index")
    (tmp_path / "table" / "users.arrow").unlink()
    item, times = tmp_path / "table" / "columns" / "item.npy", os.stat(tmp_path / "table" / "columns" / "item.npy")
    item.write_bytes(item.read_bytes()[:-1] + b"\xff")
    os.utime(item, ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "index" / "index.json").unlink()
    assert main(["verify", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"  {tmp_path / 'index' / 'index.json'} is missing"
    assert lines[0].endswith("DAMAGED")
    assert sorted(line.split(" is ")[0].strip() for line in lines[3:]) == [
        str(item),
        str(tmp_path / "table/users.arrow"),
    ]


def test_a_run_is_checked_by_what_its_stages_left(artefacts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(artefacts / "table", run / "table")
    (run / "data.json").write_text("{}")
    stages.write(run, {"data": stages.record(run, "data", 1.0)})
    for step in ("10", "20", "5.set-aside"):
        (run / "checkpoints" / "retrieval" / step).mkdir(parents=True)
        (run / "checkpoints" / "retrieval" / step / "progress.json").write_text(step)
        seal(run / "checkpoints" / "retrieval" / step, {"kind": "checkpoint"}, name="manifest.json")

    def found() -> dict[str, tuple[str, ...]]:
        return {verdict.path.relative_to(run).as_posix(): verdict.damaged for verdict in verify(run)}

    names = [".", "checkpoints/retrieval/10", "checkpoints/retrieval/20", "table"]
    assert found() == dict.fromkeys(names, ())
    (run / "checkpoints" / "retrieval" / "5.set-aside" / "progress.json").write_text("damaged")
    (run / "checkpoints" / "retrieval" / "20" / "progress.json").write_text("damaged")
    (run / "data.json").write_text("{ }")
    (run / "table" / "users.arrow").unlink()
    damaged = found()
    assert [len(damaged[name]) for name in names] == [1, 0, 1, 1]
    assert damaged["."][0].startswith(f"{run / 'data.json'} ")
    (run / "stages.json").write_text("{}")
    assert found()["."][0].startswith(f"{run / 'stages.json'} ")


def test_nothing_to_check_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for path, expected in ((tmp_path, "looks for manifest.json"), (tmp_path / "absent", "is no folder")):
        assert main(["verify", str(path)]) == 2
        assert expected in capsys.readouterr().err
