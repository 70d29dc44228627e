"""What holds on an MLU, real or simulated. `test_mlu` runs these cases in a process of their own: `pytest tests/mlu_cases.py`."""

import copy
import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mirrors
import numpy as np
import pytest
import simulated_mlu
import torch

from tenrec_jax.interop.export import export
from tenrec_jax.interop.original_scorer import import_original
from tenrec_jax.models.crosses import CrossConfig
from torch_mlu_backend import __main__ as command
from torch_mlu_backend import device as devices
from torch_mlu_backend.errors import UserError
from torch_mlu_backend.modules import Events
from torch_mlu_backend.recommender import Recommender

SIMULATED = importlib.util.find_spec("torch_mlu") is None
if SIMULATED:
    simulated_mlu.install()
FIXTURES = Path(__file__).parent / "fixtures"
MLU = devices.resolve("mlu").device
# From codegen/mlu_functions.yaml of Cambricon/torch_mlu, branch r2.4_develop: overloads, and their lines in that file.
NATIVE = {
    simulated_mlu.base_name(line.split("\t")[0])
    for line in (FIXTURES / "torch_mlu_r24_native_ops.tsv").read_text().splitlines()
}
MODELS = {
    "additive, PLE, crosses": mirrors.ranker_description(
        head="ple", crosses=CrossConfig(layers=2, hidden=8), positions="learned"
    ),
    "additive, SwiGLU, MMoE": mirrors.ranker_description(
        dataclasses.replace(mirrors.ENCODER, activation="swiglu", pre_norm=False), "mmoe", positions="sinusoidal"
    ),
    "softmax, ESMM": mirrors.ranker_description(dataclasses.replace(mirrors.ENCODER, attention="softmax"), "esmm"),
    "two-tower": mirrors.two_tower_description(similarity="cosine", item_bias=True),
    "two-tower, softmax": mirrors.two_tower_description(
        dataclasses.replace(mirrors.ENCODER, attention="softmax", activation="relu")
    ),
}


@pytest.fixture(autouse=True)
def native_operators_alone() -> Iterator[None]:
    """Every operator that a case brings to the device has a kernel in torch_mlu: none would fall back to the CPU there."""
    simulated_mlu.CALLS.clear()
    yield
    assert simulated_mlu.operators() <= NATIVE, simulated_mlu.operators() - NATIVE


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mlu")
    export(mirrors.write_recommender(root / "recommender"), root / "exported")
    return root / "exported"


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To the bit on the simulated device, whose kernels are the CPU's; within the vendor's tolerance on a real one."""
    assert found.device.type == "mlu"
    tolerance = 0.0 if SIMULATED else 3e-3 * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=0, atol=tolerance)


def outputs(model: Any, device: str, seed: int) -> list[torch.Tensor]:
    """All modes: a packed timeline, and a state that is started, extended twice and asked."""
    random = np.random.default_rng(seed)
    packed = mirrors.mirrored(mirrors.random_timeline(random, 3, 40, users=3))
    profile = mirrors.tensors(mirrors.random_profile(random, 3))
    events = mirrors.tensors(mirrors.random_events(random, 3, 40, real=np.array([[0], [1], [40]])))
    item = mirrors.tensors(random.integers(0, mirrors.VOCABULARY.items, (3, 6)))
    category = mirrors.tensors(random.integers(0, mirrors.VOCABULARY.categories, (3, 6)))

    def there(record: Any) -> Any:
        return record.to(device) if isinstance(record, torch.Tensor) else type(record)(*map(there, record))

    state = model.start(there(profile))
    for part in (slice(0, 33), slice(33, 40)):
        state = model.extend(state, there(Events(*(x[:, part] for x in events))))
    if hasattr(model, "queries"):
        vectors = model.item_vectors(item.to(device), category.to(device))
        return [model.queries(there(packed)), state.query_BD, vectors]
    return [model.timeline_logits(there(packed)), model.score(state, item.to(device), category.to(device))]


@pytest.mark.parametrize("name", MODELS)
def test_all_modes_are_equal_to_the_cpus_forward_and_backward(name: str) -> None:
    here = mirrors.mirror_of(MODELS[name], mirrors.random_model(MODELS[name]))
    there = copy.deepcopy(here).to(MLU)
    for model, device in ((here, "cpu"), (there, "mlu")):
        sum(output.square().mean() for output in outputs(model, device, 1)).backward()
    for found, expected in zip(outputs(there, "mlu", 1), outputs(here, "cpu", 1), strict=True):
        assert_equal(found, expected)
    on_mlu = dict(there.named_parameters())
    for parameter, expected in here.named_parameters():
        if expected.grad is None:  # retrieval has no target token
            assert parameter == "events.target"
        else:
            assert_equal(on_mlu[parameter].grad, expected.grad)


def test_training_steps_are_equal_to_the_cpus() -> None:
    description = MODELS["additive, PLE, crosses"]
    here = mirrors.mirror_of(description, mirrors.random_model(description)).train()
    there = copy.deepcopy(here).to(MLU)
    for model, device in ((here, "cpu"), (there, "mlu")):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(3):
            loss = torch.nn.functional.softplus(outputs(model, device, step)[0]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for found, expected in zip(there.state_dict().values(), here.state_dict().values(), strict=True):
        assert_equal(found, expected)


def test_the_whole_recommender_answers_as_on_the_cpu(exported: Path) -> None:
    here, there = Recommender.load(exported, "cpu"), Recommender.load(exported, "mlu")
    who: list[dict[str, Any]] = [{"user_id": 101}, {"user_id": 505}, {"history": []}, {"history": [14, 27, 40]}]
    for asked in who:
        expected, found = here.recommend(**asked), there.recommend(**asked)
        pairs = [(found.items, expected.items), (there.score([14, 27], **asked), here.score([14, 27], **asked))]
        for answers in pairs:
            scores = [[item.score for item in items] for items in answers]
            np.testing.assert_allclose(*scores, rtol=0, atol=1e-5 if SIMULATED else 3e-3)
    if SIMULATED:
        assert {"addmm", "native_layer_norm", "embedding", "topk"} <= simulated_mlu.operators()


def test_verify_passes_and_finds_the_device_by_itself(exported: Path, capsys: pytest.CaptureFixture) -> None:
    assert command.main(["verify", str(exported), "--device", "mlu", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["passed"]
    assert (verdict["device"], verdict["tolerance"]) == ("mlu", 3e-3)
    assert devices.resolve("auto").device == MLU
    assert command.main(["bench", str(exported), "--device", "mlu", "--batch", "3"]) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_computes_products_in_the_shorter_type(dtype: Any, exported: Path) -> None:
    found = Recommender.load(exported, "mlu", dtype).recommend(user_id=505)
    expected = Recommender.load(exported, "mlu").recommend(user_id=505)
    assert found.items != expected.items
    best = {item.item_id for item in expected.items}
    assert len(best & {item.item_id for item in found.items}) >= 0.7 * len(best)


@pytest.mark.parametrize("name", ["tenrec_ranker", "tenrec_two_tower"])
def test_models_of_the_original_run_too(name: str, tmp_path: Path) -> None:
    import_original(FIXTURES / f"{name}.npz", tmp_path / "out")
    assert command.main(["verify", str(tmp_path / "out"), "--device", "mlu"]) == 0
    assert command.main(["score", str(tmp_path / "out"), "--user", "5", "--candidates", "1,2", "--device", "mlu"]) == 0


@pytest.mark.skipif(not SIMULATED, reason="a real machine may have more than one")
def test_a_second_device_is_refused() -> None:
    with pytest.raises(UserError, match=r"mlu:1 was asked for, but this machine has 1"):
        devices.resolve("mlu:1")


@pytest.mark.skipif(not SIMULATED, reason="of the simulated device alone")
def test_the_simulation_hides_no_forgotten_transfer_and_no_float64() -> None:
    layer, x = torch.nn.Linear(3, 2), torch.randn(2, 3)
    for mixed in (lambda: layer(x.to("mlu")), lambda: layer.to("mlu")(x), lambda: x + x.to("mlu")):
        with pytest.raises(RuntimeError, match=r"device"):
            mixed()
    for wide in (
        lambda: torch.zeros(2, dtype=torch.float64).to("mlu"),
        lambda: torch.nn.Linear(2, 2).double().to("mlu"),
    ):
        with pytest.raises(TypeError, match=r"32 bits"):
            wide()
