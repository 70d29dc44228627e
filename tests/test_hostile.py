"""Files of a stranger are refused by name wherever they are read, and nothing in them is executed."""

import importlib.util
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_files import Command, hostile, pickled
from small_artefacts import READERS, kept

from tenrec_jax.__main__ import main
from tenrec_jax.data.interactions import read_events
from tenrec_jax.data.split_file import read_parts
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.predictions import read_predictions
from tenrec_jax.retrieval.index import IndexConfig, build_index, load_index
from tenrec_jax.sealed import read_stamped, seal
from torch_mlu_backend import probe
from torch_mlu_backend.errors import UserError as MirrorError

Readers = tuple[Callable[[Path], Any], ...]
# Not read when the artefact is, and tested by themselves below.
SKIPPED = ("probe.safetensors", "events/", "index/")


def seal_again(folder: Path) -> None:
    """What a stranger does who wants hashes that fit."""
    for name in ("index/index.json", "index.json", "manifest.json"):
        path = folder / name
        if path.exists():
            facts = {key: value for key, value in read_stamped(path, remedy="").items() if key != "files"}
            seal(path.parent, facts, name=path.name)


def assert_refused(read: Callable[[Path], Any], folder: Path, file: str, what: str) -> None:
    # An index is told by its folder where ScaNN does not say which file it was.
    named = f"{re.escape(Path(file).name)}|{re.escape(str((folder / file).parent))}"
    with pytest.raises((UserError, MirrorError), match=named):
        pytest.fail(f"{file} with {what} gave {read(folder)}")


def assert_files_are_refused(folder: Path, readers: Readers, tmp_path: Path, *, all_pairs: bool = True) -> None:
    """Put hostile contents in the place of files, with hashes that fit: each in each, or each in one and in each one some."""
    mark, files = tmp_path / "ran", defaultdict(list)
    for file in kept(folder):
        if not file.endswith(("manifest.json", "index.json")) and not file.startswith(SKIPPED):
            files[Path(file).suffix].append(file)
    for suffix, ours in files.items():
        for number, (what, data) in enumerate(hostile(suffix, mark).items()):
            for file in ours if all_pairs else [ours[number % len(ours)]]:
                changed = Path(shutil.copytree(folder, tmp_path / folder.name))
                (changed / file).write_bytes(data)
                seal_again(changed)
                for read in readers:
                    assert_refused(read, changed, file, what)
                shutil.rmtree(changed)
    assert not mark.exists()


@pytest.mark.parametrize("artefact", READERS)
def test_files_of_an_artefact_may_be_hostile_though_their_hashes_fit(
    artefact: str, artefacts: Path, tmp_path: Path
) -> None:
    assert_files_are_refused(
        artefacts / artefact, READERS[artefact], tmp_path, all_pairs=artefact in ("table", "index")
    )


@pytest.mark.slow
@pytest.mark.parametrize("artefact", ["recommender", "exported"])
def test_every_file_of_an_artefact_may_be_hostile_in_every_way(artefact: str, artefacts: Path, tmp_path: Path) -> None:
    assert_files_are_refused(artefacts / artefact, READERS[artefact], tmp_path)


@pytest.fixture(scope="module")
def scann_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("scann") is None:
        pytest.skip("ScaNN is not installed (it exists for Linux)")
    vectors = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    folder = tmp_path_factory.mktemp("scann") / "index"
    build_index(vectors, np.arange(1, 65), IndexConfig("scann", num_leaves=4, leaves_to_search=4)).save(folder)
    return folder


def test_every_file_that_scann_reads_may_be_hostile(scann_folder: Path, tmp_path: Path) -> None:
    assert_files_are_refused(scann_folder, (load_index,), tmp_path)


def test_what_scann_would_unpickle_is_refused_and_not_run(scann_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(scann_folder, tmp_path / "index"))
    (folder / "scann" / "scann_docids.pkl").write_bytes(pickled(tmp_path / "ran"))
    seal_again(folder)
    assert_refused(load_index, folder, "scann/scann_docids.pkl", "a pickle")
    assert not (tmp_path / "ran").exists()


def test_leaves_that_there_are_not_are_refused(scann_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(scann_folder, tmp_path / "index"))
    leaf_N = np.load(folder / "scann" / "datapoint_to_token.npy")
    leaf_N[3] = 2**30
    np.save(folder / "scann" / "datapoint_to_token.npy", leaf_N)
    seal_again(folder)
    assert_refused(load_index, folder, "scann/datapoint_to_token.npy", "another leaf")


def test_a_hostile_probe_is_refused_on_both_sides(artefacts: Path, tmp_path: Path) -> None:
    exported = Path(shutil.copytree(artefacts / "exported", tmp_path / "exported"))
    for what, data in hostile(".safetensors", tmp_path / "ran").items():
        if what == "other entries":
            continue
        (exported / "probe.safetensors").write_bytes(data)
        with pytest.raises(MirrorError, match=r"probe\.safetensors"):
            probe.stored(exported)
    seal_again(exported)
    assert_refused(READERS["exported"][0], exported, "probe.safetensors", what)


def test_parquet_of_a_stranger_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, table = tmp_path / "log.parquet", tmp_path / "table"
    (tmp_path / "broken" / "events").mkdir(parents=True)
    for what, data in hostile(".parquet", tmp_path / "ran").items():
        path.write_bytes(data)
        for kind in (["qb_video"], ["custom", "--columns", '{"user": "uid", "item": "vid"}']):
            assert main(["ingest", str(path), "--out", str(table), "--kind", *kind]) == 2, what
            assert str(path) in capsys.readouterr().err
        with pytest.raises(UserError, match=r"log\.parquet"):
            read_parts(path, 4, {"train": 0})
        with pytest.raises(UserError, match=r"log\.parquet"):
            read_predictions(path)
        shutil.copyfile(path, tmp_path / "broken" / "events" / "part-00000.parquet")
        with pytest.raises(UserError, match=r"part-00000\.parquet"):
            list(read_events(tmp_path / "broken", ["user"]))


@pytest.mark.parametrize("metadata", [b"[" * 100_000, b"[]", b'{"format_version": 1}', b"\xff"])
def test_predictions_whose_metadata_lie_are_refused(metadata: bytes, tmp_path: Path) -> None:
    table = pa.table({"rank": [1]}).replace_schema_metadata({b"tenrec_jax": metadata})
    pq.write_table(table, tmp_path / "predictions.parquet")
    with pytest.raises(UserError, match=r"predictions\.parquet"):
        read_predictions(tmp_path / "predictions.parquet")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_checkpoint_of_a_stranger_is_refused(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, mark = tmp_path / f"model{suffix}", tmp_path / "ran"
    for what, data in hostile(suffix, mark).items():
        path.write_bytes(data)
        assert main(["import-original", str(path), "--out", str(tmp_path / "out")]) == 2, what
        assert str(path) in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_mapping_of_columns_of_a_stranger_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log, path = tmp_path / "log.csv", tmp_path / "map.json"
    log.write_text("uid,vid\na,b\n")
    command = ["ingest", str(log), "--kind", "custom", "--out", str(tmp_path / "table"), "--columns"]
    for what, data in hostile(".json", tmp_path / "ran").items():
        path.write_bytes(data)
        assert main([*command, str(path)]) == 2, what
        assert "map.json" in capsys.readouterr().err
    whole: dict[str, Any] = {"user": "uid", "item": "vid"}
    for wrong in ({"user": "\ud800"}, {"gender": []}, {"user": {}}, {"\udfff": "uid"}, {"gender": "\0"}):
        assert main([*command, json.dumps(whole | wrong)]) == 2
    assert main([*command, "\0"]) == 2


def test_the_marks_of_these_tests_would_be_made(tmp_path: Path) -> None:
    """What is pickled here does run where it is unpickled."""
    command, arguments = Command(tmp_path / "ran").__reduce__()
    assert command(*arguments) == 0
    assert (tmp_path / "ran").exists()
