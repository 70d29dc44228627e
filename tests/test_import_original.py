"""A checkpoint of the original system becomes a folder that scores raw ids, here and in the mirror."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tenrec_jax import __main__ as tenrec_jax_command
from tenrec_jax.errors import UserError
from tenrec_jax.interop import original_scorer
from tenrec_jax.interop.original import load_state
from tenrec_jax.interop.original_scorer import import_original
from torch_mlu_backend import __main__ as mirror_command
from torch_mlu_backend import original as mirror_original
from torch_mlu_backend import weights as mirror_weights
from torch_mlu_backend.verify import verify

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("tenrec_ranker", "tenrec_two_tower")


def golden(name: str, of: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as archive:
        return {key.removeprefix(f"{of}/"): archive[key] for key in archive.files if key.startswith(f"{of}/")}


@pytest.fixture(scope="module", params=NAMES)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of the reference file, and the folder made of its weights, saved as the original does after DDP."""
    root = tmp_path_factory.mktemp(request.param)
    state = {f"module.{k}": torch.from_numpy(v) for k, v in load_state(FIXTURES / f"{request.param}.npz").items()}
    torch.save({"epoch": 3, "model_state_dict": state}, root / "checkpoint.pt")
    assert tenrec_jax_command.main(["import-original", str(root / "checkpoint.pt"), "--out", str(root / "out")]) == 0
    return request.param, root / "out"


def test_the_mirror_reproduces_the_originals_outputs(imported: tuple[str, Path]) -> None:
    name, folder = imported
    inputs, outputs = golden(name, "inputs"), golden(name, "outputs")
    model = mirror_weights.load(folder / "model.safetensors").module
    with torch.no_grad():
        found = model(**{key: torch.from_numpy(array) for key, array in inputs.items()})
    by_name = {"logits": found, "scores": found[..., 0]} if isinstance(found, torch.Tensor) else found._asdict()
    assert by_name.keys() == outputs.keys()
    for key, expected in outputs.items():
        np.testing.assert_allclose(by_name[key].numpy(), expected, atol=1e-5, rtol=1e-5)


def test_the_folder_verifies_layer_by_layer(imported: tuple[str, Path]) -> None:
    verdict = verify(imported[1], torch.device("cpu"))
    assert verdict.passed
    assert {"layer_00", "layer_01", "logits", "scores"} <= {difference.name for difference in verdict.differences}


def unhashed(row: int, rows: int) -> int:
    """A raw id that is looked up in a given row."""
    return next(raw for raw in range(10_000_000, 10_001_000) if raw * 2654435761 % (rows - 1) + 1 == row)


def test_raw_ids_give_the_originals_outputs(imported: tuple[str, Path]) -> None:
    name, folder = imported
    inputs, outputs = golden(name, "inputs"), golden(name, "outputs")
    user_key = "user_id" if name == "tenrec_ranker" else "user_ids"
    prefix = "" if name == "tenrec_ranker" else "user_"
    sides: list[Any] = [original_scorer.OriginalScorer.load(folder), mirror_original.OriginalScorer.load(folder, "cpu")]
    # Rows that begin with their events: padding in front would put these at other positions.
    real_BS = inputs["history_item_ids"] != 0
    rows = [row for row, real_S in enumerate(real_BS) if real_S[0] and real_S[: real_S.sum()].all()]
    assert rows
    for row in rows:
        real_S = real_BS[row]
        arguments: dict[str, Any] = {
            "user": unhashed(int(inputs[user_key][row]), 12),
            "history": [unhashed(int(i), 24) for i in inputs["history_item_ids"][row][real_S]],
            "candidates": [unhashed(int(i), 24) for i in inputs["candidate_item_ids"][row]],
            "gender": int(inputs[f"{prefix}gender"][row]),
            "age": int(inputs[f"{prefix}age"][row]),
            "categories": inputs["candidate_categories"][row].tolist(),
        }
        if name == "tenrec_two_tower":
            arguments["history_actions"] = inputs["history_actions"][row][real_S].tolist()
        for scorer in sides:
            found = scorer.score(**arguments)
            np.testing.assert_allclose(found.scores, outputs["scores"][row], atol=1e-5, rtol=1e-5)
            np.testing.assert_allclose(found.logits, outputs["logits"][row], atol=1e-5, rtol=1e-5)


def test_both_sides_score_alike_from_the_command_line(
    imported: tuple[str, Path], capsys: pytest.CaptureFixture
) -> None:
    who = ["--user", "123456789012", "--history", "5,999999999999,7", "--candidates", "8,9,10", "--age", "3", "--json"]
    assert tenrec_jax_command.main(["score", "--recommender", str(imported[1]), *who]) == 0
    here = json.loads(capsys.readouterr().out)
    assert mirror_command.main(["score", str(imported[1]), "--device", "cpu", *who]) == 0
    there = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(here["logits"], there["logits"], atol=1e-5)
    for command, start in (
        (tenrec_jax_command, ["score", "--recommender", str(imported[1])]),
        (mirror_command, ["score", str(imported[1]), "--device", "cpu"]),
    ):
        for wrong in (
            ["--candidates", "1"],
            ["--user", "1", "--candidates", ",".join("123456789")],
            ["--user", "1", "--candidates", "1", "--age", "99"],
        ):
            assert command.main([*start, *wrong]) == 2
            assert capsys.readouterr().err.startswith("error: ")
    assert mirror_command.main(["recommend", str(imported[1]), "--user", "1", "--device", "cpu"]) == 2
    assert "has no catalogue" in capsys.readouterr().err


def test_hashes_are_the_first_of_the_originals_scheme() -> None:
    for side in (original_scorer, mirror_original):
        for raw, table in ((0, 10), (1, 10), (123, 100_000), (2**31 - 1, 99_991)):
            assert side.hashed(raw, table + 1) == int(np.int64(raw) * (0 + 1) * np.int64(2654435761) % table) + 1
        assert side.hashed(10**30, 101) == (10**30 * 2654435761) % 100 + 1


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"weight": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"neither the original's ranker nor its two-tower"):
        import_original(tmp_path / "other.safetensors", tmp_path / "out")
    state = load_state(FIXTURES / "tenrec_ranker.npz")
    del state["output_norm.bias"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"missing: output_norm.bias"):
        import_original(tmp_path / "part.safetensors", tmp_path / "out")
