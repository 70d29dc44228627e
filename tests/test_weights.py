"""Weights go both ways unchanged, and a file that is damaged or of another model is named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import mirrors
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from tenrec_jax.errors import UserError
from tenrec_jax.interop import names, weights
from tenrec_jax.interop.original import load_ranker, load_state, load_two_tower
from tenrec_jax.parameters import named
from torch_mlu_backend import safetensors_file
from torch_mlu_backend import weights as mirror_weights
from torch_mlu_backend.errors import UserError as MirrorError

FIXTURES = Path(__file__).parent / "fixtures"
EVERYTHING = dataclasses.replace(mirrors.ENCODER, activation="swiglu", num_layers=3)
DESCRIPTIONS = {
    "ranker, PLE": mirrors.ranker_description(EVERYTHING, "ple", positions="learned"),
    "ranker, MMoE": mirrors.ranker_description(head="mmoe", positions="sinusoidal", user_id=False),
    "ranker, softmax": mirrors.ranker_description(dataclasses.replace(EVERYTHING, attention="softmax", pre_norm=False)),
    "two-tower": mirrors.two_tower_description(EVERYTHING, item_bias=True, similarity="cosine"),
}


@pytest.fixture(params=DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def description(request: pytest.FixtureRequest) -> weights.Description:
    return request.param


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert np.asarray(left[name]).tobytes() == np.asarray(right[name]).tobytes(), name


def test_jax_to_torch_to_jax_changes_no_bit(description: weights.Description, tmp_path: Path) -> None:
    model = mirrors.random_model(description)
    weights.save(tmp_path / "jax.safetensors", description, nnx.state(model))
    mirror_weights.save(tmp_path / "torch.safetensors", mirror_weights.load(tmp_path / "jax.safetensors"))
    found, loaded = weights.load(tmp_path / "torch.safetensors")
    assert found == description
    assert_same(named(loaded.parameters), named(nnx.state(model)))


def test_torch_to_jax_to_torch_changes_no_bit(description: weights.Description, tmp_path: Path) -> None:
    model = mirrors.random_model(description)
    mirror = mirrors.mirror_of(description, model)
    for parameter in mirror.parameters():
        torch.nn.init.normal_(parameter)
    weights.save(tmp_path / "any.safetensors", description, nnx.state(model))
    described = mirror_weights.load(tmp_path / "any.safetensors").description
    mirror_weights.save(tmp_path / "torch.safetensors", mirror_weights.Model(described, mirror))
    found, loaded = weights.load(tmp_path / "torch.safetensors")
    weights.save(tmp_path / "jax.safetensors", found, loaded.parameters)
    returned = mirror_weights.load(tmp_path / "jax.safetensors").module.state_dict()
    assert_same({k: v.numpy() for k, v in mirror.state_dict().items()}, {k: v.numpy() for k, v in returned.items()})


@pytest.mark.parametrize("name", ["tenrec_ranker", "tenrec_two_tower"])
def test_models_of_the_original_go_both_ways_too(name: str, tmp_path: Path) -> None:
    from tenrec_jax.interop.original_scorer import describe

    state = load_state(FIXTURES / f"{name}.npz")
    ranker = name == "tenrec_ranker"
    model: Any = load_ranker(state, num_heads=4) if ranker else load_two_tower(state, num_heads=4, temperature=0.07)
    weights.save(tmp_path / "jax.safetensors", describe(model), nnx.state(model))
    mirror_weights.save(tmp_path / "torch.safetensors", mirror_weights.load(tmp_path / "jax.safetensors"))
    assert_same(named(weights.load(tmp_path / "torch.safetensors")[1].parameters), named(nnx.state(model)))


def test_the_header_says_what_the_numbers_depend_on(tmp_path: Path) -> None:
    description = DESCRIPTIONS["two-tower"]
    weights.save(tmp_path / "w.safetensors", description, nnx.state(mirrors.random_model(description)))
    header, arrays = weights.read(tmp_path / "w.safetensors")
    assert header["format_version"] == "1"
    assert header["model"] == "two_tower"
    assert json.loads(header["config"]) == dataclasses.asdict(description.config)
    assert json.loads(header["vocabulary"]) == dataclasses.asdict(mirrors.VOCABULARY)
    assert (float(header["layer_norm_eps"]), header["gelu"]) == (1e-6, "erf")
    assert header["sha256"] == weights.digest(arrays)
    assert header["sha256"] == safetensors_file.digest({k: torch.from_numpy(v.copy()) for k, v in arrays.items()})


def test_a_missing_surplus_misshapen_or_unknown_parameter_is_named() -> None:
    description = DESCRIPTIONS["ranker, PLE"]
    like = named(nnx.state(mirrors.random_model(description)))
    rows = weights.KINDS[description.kind].names
    in_torch = names.to_torch(rows, like)
    shape = in_torch["encoder.blocks.1.ffn.up.weight"].shape
    del in_torch["head.levels.0.gates.kernel"]
    in_torch["extra.weight"] = np.zeros(3, np.float32)
    in_torch["encoder.blocks.1.ffn.up.weight"] = np.zeros(shape[::-1], np.float32)
    in_torch["users.bias"] = np.full_like(in_torch["users.bias"], np.nan)
    with pytest.raises(UserError) as caught:
        names.to_flax(rows, in_torch, like)
    for part in (
        "head.levels.0.gates.kernel is missing",
        "extra.weight is left over",
        "encoder.blocks.1.ffn.up.weight is float32 (16, 24), expected float32 (24, 16)",
        "users.bias holds NaN",
    ):
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"no name for new.kernel: add a row"):
        names.to_torch(rows, like | {"new.kernel": np.zeros(2)})


def test_the_mirror_names_what_does_not_fit(tmp_path: Path) -> None:
    description = DESCRIPTIONS["two-tower"]
    weights.save(tmp_path / "w.safetensors", description, nnx.state(mirrors.random_model(description)))
    header, arrays = weights.read(tmp_path / "w.safetensors")
    arrays["users.renamed"] = arrays.pop("users.bias")
    save_file(arrays, tmp_path / "w.safetensors", header | {"sha256": weights.digest(arrays)})
    for load in (weights.load, mirror_weights.load):
        with pytest.raises(ValueError, match=r"users.bias is missing; users.renamed is left over"):
            load(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "damage", ["truncated", "lengthened", "flipped", "other version", "other eps", "absent", "empty"]
)
def test_a_damaged_file_is_refused_on_both_sides(damage: str, tmp_path: Path) -> None:
    path, description = tmp_path / "w.safetensors", DESCRIPTIONS["two-tower"]
    weights.save(path, description, nnx.state(mirrors.random_model(description)))
    whole = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(whole[:-4])
    elif damage == "lengthened":
        path.write_bytes(whole + b"0000")
    elif damage == "flipped":
        whole[-100] ^= 1
        path.write_bytes(whole)
    elif damage == "absent":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        header, arrays = weights.read(path)
        changed = {"format_version": "2"} if damage == "other version" else {"layer_norm_eps": "1e-05"}
        save_file(arrays, path, header | changed)
    with pytest.raises(UserError, match=r"w\.safetensors"):
        weights.load(path)
    with pytest.raises(MirrorError, match=r"w\.safetensors"):
        mirror_weights.load(path)


def test_files_are_what_the_safetensors_library_reads_and_writes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "matrix": random.normal(size=(3, 5)).astype(np.float32),
        "scalar": np.array(3, np.float32),
        "none": np.zeros((0, 4), np.int32),
        "ids": np.array([2**40, -1]),
        "bits": np.array([True, False, True]),
        "small": np.array([[1], [-7]], np.int8),
    }
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    transposed = tensors | {"matrix": torch.from_numpy(arrays["matrix"].T.copy()).T}
    safetensors_file.write(tmp_path / "ours.safetensors", transposed, {"a": "b"})
    assert_same(load_file(tmp_path / "ours.safetensors"), arrays)
    save_file(arrays, tmp_path / "theirs.safetensors", {"a": "b"})
    for name in ("ours", "theirs"):
        metadata, found = safetensors_file.read(tmp_path / f"{name}.safetensors")
        assert metadata == {"a": "b"}
        assert_same({k: v.numpy() for k, v in found.items()}, arrays)
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in tensors.items()}
