"""A recommender leaves for PyTorch, is served, verified and trained further there, and comes back."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import mirrors
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tenrec_jax import __main__ as tenrec_jax_command
from tenrec_jax.errors import UserError
from tenrec_jax.files import read_json, sha256_of
from tenrec_jax.interop.export import bring_back, export, read_manifest, seal
from tenrec_jax.recommender import Recommender
from tenrec_jax.requests import Rules
from tenrec_jax.sealed import Kind, read_stamped, write_stamped
from torch_mlu_backend import __main__ as mirror_command
from torch_mlu_backend import artifact as mirror_artifact
from torch_mlu_backend.errors import UserError as MirrorError
from torch_mlu_backend.recommender import Recommender as MirrorRecommender
from torch_mlu_backend.verify import verify

CPU = torch.device("cpu")
ITEMS = [13 * i + 1 for i in range(1, 39)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recommender and what was exported of it."""
    root = tmp_path_factory.mktemp("export")
    export(mirrors.write_recommender(root / "recommender"), root / "exported")
    return root / "recommender", root / "exported"


@pytest.fixture
def exported(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the exported folder, to be changed."""
    return Path(shutil.copytree(folders[1], tmp_path / "exported"))


def assert_same_items(found: Any, expected: Any) -> None:
    """Equal lists, ties by score in any order.

    A score has a factor exp(retrieval score): its relative error is the absolute one of the retrieval score.
    """
    score = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose([i.score for i in found], [i.score for i in expected], **score)
    by_id = {item.item_id: item for item in expected}
    tied = {round(item.score, 4) for item in expected if item.item_id not in {i.item_id for i in found}}
    for item in found:
        if item.item_id not in by_id:
            assert round(item.score, 4) in tied
            continue
        other = by_id[item.item_id]
        np.testing.assert_allclose(item.score, other.score, **score)
        np.testing.assert_allclose(item.retrieval_score, other.retrieval_score, atol=1e-4)
        assert item.probabilities.keys() == other.probabilities.keys()
        np.testing.assert_allclose(list(item.probabilities.values()), list(other.probabilities.values()), atol=1e-5)


@pytest.mark.parametrize(("ranked", "co_visits"), [(True, False), (True, True), (False, False), (False, True)])
def test_the_mirror_gives_the_same_recommendations_and_scores(ranked: bool, co_visits: bool, tmp_path: Path) -> None:
    kind = {"ranked": ranked, "co_visits": co_visits}
    export(mirrors.write_recommender(tmp_path / "recommender", **kind), tmp_path / "exported")
    here = Recommender.load(tmp_path / "recommender")
    there = MirrorRecommender.load(tmp_path / "exported", "cpu")
    # The first user has no event.
    asked: list[dict[str, Any]] = [
        {"user_id": 101},
        {"user_id": 505},
        {"history": []},
        {"history": [*ITEMS * 3, 77777]},
    ]
    for who in asked:
        for how in ({"k": 20, "exclude_seen": False}, {"k": 100}):
            rules = Rules(exclude_seen=how.get("exclude_seen", True))
            expected, found = here.recommend(**who, k=how["k"], rules=rules), there.recommend(**who, **how)
            assert len(found.items) == len(expected.items)
            assert_same_items(found.items, expected.items)
            assert found.seen_removed == sum(len(effect.removed) for effect in expected.effects)
            names = ("history_length", "unknown_items", "version")
            assert [getattr(found, name) for name in names] == [getattr(expected, name) for name in names]
        some = ITEMS[3:20:4]
        scored = there.score(some, **who)
        assert [item.item_id for item in scored] == some
        assert_same_items(scored, here.score(some, **who))


def test_text_ids_and_co_visits_travel_too(tmp_path: Path) -> None:
    export(mirrors.write_recommender(tmp_path / "recommender", text_ids=True, co_visits=True), tmp_path / "exported")
    there = MirrorRecommender.load(tmp_path / "exported", "cpu")
    here = Recommender.load(tmp_path / "recommender")
    assert_same_items(there.recommend(user_id="303").items, here.recommend(user_id="303").items)
    bring_back(tmp_path / "exported", tmp_path / "back")
    again = Recommender.load(tmp_path / "back").recommend(user_id="303")
    assert again.items == here.recommend(user_id="303").items


def test_a_score_does_not_depend_on_other_candidates(folders: tuple[Path, Path]) -> None:
    for recommender in (Recommender.load(folders[0]), MirrorRecommender.load(folders[1], "cpu")):
        together = {item.item_id: item.score for item in recommender.score(ITEMS, user_id=404)}
        for raw in ITEMS[:5]:
            np.testing.assert_allclose(
                recommender.score([raw], user_id=404)[0].score, together[raw], rtol=1e-6, atol=1e-6
            )
        with pytest.raises(ValueError, match=r"99999"):
            recommender.score([ITEMS[0], 99999], user_id=404)
        with pytest.raises(ValueError, match=r"no items"):
            recommender.score([], user_id=404)


def test_the_probe_passes_and_an_unchanged_folder_comes_back_as_it_was(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    verdict = verify(folders[1], CPU)
    assert verdict.passed
    assert [d.name for d in verdict.differences] == [
        *("retrieval/layer_00", "retrieval/layer_01", "retrieval/query", "retrieval/scores"),
        *("ranking/layer_00", "ranking/layer_01", "ranking/logits", "ranking/scores"),
    ]
    assert verdict.top == {"retrieval/scores": 1.0, "ranking/scores": 1.0}
    bring_back(folders[1], tmp_path / "back")
    before, after = (read_json(folder / "manifest.json") for folder in (folders[0], tmp_path / "back"))
    assert before == after


@pytest.mark.parametrize("file", ["retrieval", "ranking", "users", "items", "events", "probe"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "absent"])
def test_a_damaged_file_is_named(file: str, damage: str, exported: Path, tmp_path: Path) -> None:
    path = exported / f"{file}.safetensors"
    if damage == "absent":
        path.rename(path.with_suffix(".renamed"))
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: -8 if damage == "truncated" else None])
    with pytest.raises(MirrorError, match=path.name):
        verify(exported, CPU)
    with pytest.raises(UserError, match=path.name):
        bring_back(exported, tmp_path / "back")


def test_every_flipped_bit_of_the_manifest_is_refused(exported: Path) -> None:
    path = exported / "manifest.json"
    text = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(text), 150):
        changed = bytearray(text)
        changed[place] ^= 2
        path.write_bytes(changed)
        with pytest.raises(MirrorError, match=r"manifest\.json is damaged"):
            mirror_artifact.read_manifest(exported)
        with pytest.raises(UserError, match=r"manifest\.json"):
            read_manifest(exported)


def test_a_command_that_was_killed_is_run_again(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """What a kill leaves stands under other names, and gives way to the next run."""
    for name in ("exported", "back", "saved"):
        left = tmp_path / f".{name}.partial"
        left.mkdir()
        shutil.copyfile(folders[1] / "users.safetensors", left / "users.safetensors")
        (left / "half").write_text("written")
    export(folders[0], tmp_path / "exported")
    bring_back(tmp_path / "exported", tmp_path / "back")
    mirror_artifact.save(tmp_path / "exported", tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "exported", "saved"]
    assert read_json(tmp_path / "back" / "manifest.json") == read_json(folders[0] / "manifest.json")
    assert read_manifest(tmp_path / "saved")["files"].keys() == read_manifest(folders[1])["files"].keys()
    for again in (
        lambda: export(folders[0], tmp_path / "exported"),
        lambda: bring_back(tmp_path / "exported", tmp_path / "back"),
    ):
        with pytest.raises(UserError, match=r"is not empty"):
            again()


def test_files_of_another_export_are_refused(exported: Path, tmp_path: Path) -> None:
    for a, b in (("retrieval", "ranking"), ("users", "items")):
        swapped = Path(shutil.copytree(exported, tmp_path / f"{a}_{b}"))
        shutil.copyfile(exported / f"{a}.safetensors", swapped / f"{b}.safetensors")
        shutil.copyfile(exported / f"{b}.safetensors", swapped / f"{a}.safetensors")
        with pytest.raises(MirrorError, match=r"damaged, or another one"):
            verify(swapped, CPU)


def sealed_again(folder: Path) -> None:
    """What somebody would do who changes a file and then the hashes."""
    manifest = read_json(folder / "manifest.json")
    facts = {key: manifest[key] for key in ("version", "log_kind", "actions", "categories", "data_sha256", "index")}
    seal(folder, Kind(manifest["kind"]), facts)


def test_a_probe_altered_by_a_thousandth_fails_though_its_hashes_fit(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arrays = load_file(exported / "probe.safetensors")
    arrays["ranking/logits"][1, 3, 0] += 1e-3
    save_file(arrays, exported / "probe.safetensors")
    sealed_again(exported)
    verdict = verify(exported, CPU)
    assert [d.name for d in verdict.differences if not d.met] == ["ranking/logits"]
    assert not verdict.passed
    assert mirror_command.main(["verify", str(exported), "--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"ranking/logits differs by 0.001"):
        bring_back(exported, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_other_weights_than_the_probes_fail(exported: Path) -> None:
    arrays = load_file(exported / "probe.safetensors")
    del arrays["ranking/layer_01"]
    save_file(arrays, exported / "probe.safetensors")
    sealed_again(exported)
    with pytest.raises(MirrorError, match=r"another model: ranking/layer_01"):
        verify(exported, CPU)


def fine_tuned(module: Any, seed: int = 0) -> torch.nn.Module:
    """A few steps of Adam on random timelines."""
    module = copy.deepcopy(module).train()
    packed = mirrors.random_timeline(np.random.default_rng(seed), 4, 30, users=3)
    label, optimizer = torch.from_numpy(packed.events.action).float(), torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            module.timeline_logits(mirrors.mirrored(packed)), label
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return module.eval()


def test_weights_trained_in_pytorch_come_back(folders: tuple[Path, Path], tmp_path: Path) -> None:
    loaded = mirror_artifact.load(folders[1])
    assert loaded.ranking is not None
    ranker = fine_tuned(loaded.ranking.module)
    mirror_artifact.save(folders[1], tmp_path / "tuned", ranking=ranker)
    assert verify(tmp_path / "tuned", CPU).passed
    bring_back(tmp_path / "tuned", tmp_path / "back")
    here, there = Recommender.load(tmp_path / "back"), MirrorRecommender.load(tmp_path / "tuned", "cpu")
    before = Recommender.load(folders[0]).recommend(user_id=505, k=20)
    assert_same_items(there.recommend(user_id=505, k=20).items, here.recommend(user_id=505, k=20).items)
    assert before.items != here.recommend(user_id=505, k=20).items
    # The other stage is as it was.
    name = "retrieval.safetensors"
    assert sha256_of(tmp_path / "back" / name) == sha256_of(folders[0] / name)


def test_item_vectors_follow_a_trained_item_tower(folders: tuple[Path, Path], tmp_path: Path) -> None:
    two_tower = copy.deepcopy(mirror_artifact.load(folders[1]).retrieval.module)
    with torch.no_grad():
        two_tower.items.id.weight.add_(torch.randn(two_tower.items.id.weight.shape))
    mirror_artifact.save(folders[1], tmp_path / "tuned", retrieval=two_tower)
    bring_back(tmp_path / "tuned", tmp_path / "back")
    here, there = Recommender.load(tmp_path / "back"), MirrorRecommender.load(tmp_path / "tuned", "cpu")
    assert_same_items(there.recommend(user_id=303, k=10).items, here.recommend(user_id=303, k=10).items)


def test_commands_on_both_sides_print_the_same_answer(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    recommender, exported = map(str, folders)

    def output(command: Any, *arguments: str) -> Any:
        assert command.main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    who = ["--user", "404"]
    here = output(tenrec_jax_command, "recommend", "--recommender", recommender, *who)
    there = output(mirror_command, "recommend", exported, "--device", "cpu", *who)
    assert [item["item_id"] for item in here["items"]] == [item["item_id"] for item in there["items"]]
    listed = ["--history", f"{ITEMS[0]},{ITEMS[5]}", "--candidates", f"{ITEMS[1]},{ITEMS[2]}"]
    here = output(tenrec_jax_command, "score", "--recommender", recommender, *listed)
    there = output(mirror_command, "score", exported, "--device", "cpu", *listed)
    np.testing.assert_allclose([i["score"] for i in here], [i["score"] for i in there], atol=1e-5)
    verdict = output(mirror_command, "verify", exported, "--device", "cpu")
    assert verdict["passed"]
    speeds = output(mirror_command, "bench", exported, "--device", "cpu", "--batch", "3")
    assert all(speed["examples_per_second"] > 0 for speed in speeds)
    for arguments in (
        ["recommend", exported, "--user", "5"],
        ["recommend", exported, "--user", "x"],
        ["score", exported, "--user", "404", "--candidates", "1,x"],
        ["verify", str(Path(exported).parent)],
    ):
        assert mirror_command.main([*arguments, "--device", "cpu"]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_autocast_is_reported_and_not_judged(folders: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    verdict = verify(folders[1], CPU, "bfloat16")
    assert not verdict.judged
    assert all(0.5 < share <= 1 for share in verdict.top.values())
    assert max(d.absolute for d in verdict.differences) > verdict.tolerance
    assert mirror_command.main(["verify", str(folders[1]), "--device", "cpu", "--autocast", "bfloat16"]) == 0
    assert "stated, not promised" in capsys.readouterr().out


def test_export_refuses_what_the_mirror_cannot_compute_and_a_folder_in_use(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"is not empty"):
        export(folders[0], folders[1])
    copied = Path(shutil.copytree(folders[0], tmp_path / "bfloat16"))
    manifest = read_stamped(copied / "manifest.json", remedy="")
    manifest["retrieval"]["encoder"]["dtype"] = "bfloat16"
    write_stamped(copied / "manifest.json", manifest)
    with pytest.raises(
        UserError, match=r"mirror cannot compute this recommender: retrieval.encoder.dtype is 'bfloat16'"
    ):
        export(copied, tmp_path / "out")


def test_a_config_of_the_mirror_has_every_field_of_ours() -> None:
    from tenrec_jax.interop import weights
    from torch_mlu_backend import weights as mirror_weights

    def fields(kind: Any) -> dict[str, Any]:
        return {field.name: field.default for field in dataclasses.fields(kind)}

    for name, kind in weights.KINDS.items():
        assert fields(kind.config).keys() == fields(mirror_weights.KINDS[name].config).keys()
    from tenrec_jax.models import blocks, features, heads
    from torch_mlu_backend import config

    for ours, theirs in (
        (blocks.EncoderConfig, config.EncoderConfig),
        (features.FeatureConfig, config.FeatureConfig),
        (heads.HeadsConfig, config.HeadsConfig),
        (features.Vocabulary, config.Vocabulary),
    ):
        assert fields(ours) == fields(theirs)
