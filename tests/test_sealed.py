"""Sealed folders: every damage to every file is told, by name."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenrec_jax.errors import UserError
from tenrec_jax.files import parsed_json, read_json, written_whole
from tenrec_jax.sealed import DamagedError, open_sealed, seal

FILES = {"a.bin": bytes(range(100)), "deep/b.bin": b"weights" * 50, "empty": b""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed")
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    seal(folder, {"kind": "test", "sizes": (3, 4)}, name="manifest.json")
    return folder


def opened(folder: Path) -> dict:
    return open_sealed(folder, name="manifest.json", remedy="Make it again.")


def test_a_sealed_folder_opens_and_says_what_it_was_given(folder: Path) -> None:
    manifest = opened(folder)
    assert manifest["kind"] == "test"
    assert manifest["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


@given(st.data())
def test_any_flipped_bit_or_lost_tail_is_told_with_the_name_of_its_file(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["a.bin", "deep/b.bin", "manifest.json"]))
    whole = (folder / name).read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[:place] + bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))]) + whole[place + 1 :]
    for damaged in (flipped, whole[:place]):
        try:
            (folder / name).write_bytes(damaged)
            with pytest.raises(DamagedError, match=name):
                opened(folder)
        finally:
            (folder / name).write_bytes(whole)


def test_all_damaged_files_are_named_at_once(folder: Path, tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    seal(tmp_path, {}, name="manifest.json")
    (tmp_path / "a.bin").unlink()
    (tmp_path / "empty").write_bytes(b"x")
    with pytest.raises(DamagedError) as error:
        opened(tmp_path)
    assert "a.bin is missing" in str(error.value)
    assert "empty is damaged" in str(error.value)
    assert "Make it again." in str(error.value)


def test_a_manifest_that_names_files_outside_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    manifest: dict = {"files": {"../secret": "0" * 64}}
    own = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (tmp_path / "in" / "manifest.json").write_text(json.dumps(manifest | {"manifest_sha256": own}))
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        opened(tmp_path / "in")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{", "\x00", '"\ud800"'.encode("utf-8", "surrogatepass"), "1" * 5000, b"\xff"]
)
def test_hostile_json_is_refused_and_named(text: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"x\.json holds no readable JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="given holds no readable JSON"):
        parsed_json(text, "given")


def test_a_file_whose_writer_fails_is_as_it_was_before(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("before")

    def fail() -> None:
        with written_whole(tmp_path / "kept") as temporary:
            temporary.write_text("half")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert (tmp_path / "kept").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
