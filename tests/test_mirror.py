"""The PyTorch mirror computes what the Flax modules compute: outputs, gradients, and the original system's reference outputs."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mirrors
import numpy as np
import onnxruntime
import optax
import pytest
import torch
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tenrec_jax.interop.original import load_encoder, load_paper_attention
from tenrec_jax.models.blocks import EncoderConfig
from tenrec_jax.models.crosses import CrossConfig
from tenrec_jax.timeline import Events, Timeline
from torch_mlu_backend.config import EncoderConfig as MirrorEncoderConfig
from torch_mlu_backend.config import HeadsConfig, RankerConfig, from_mapping
from torch_mlu_backend.errors import UserError
from torch_mlu_backend.modules import FastformerEncoder, PaperAttention

FIXTURES = Path(__file__).parent / "fixtures"
OPTIONS = st.fixed_dictionaries(
    {
        "attention": st.sampled_from(["additive", "softmax"]),
        "activation": st.sampled_from(["gelu", "relu", "swiglu"]),
        "normalize": st.booleans(),
        "pool_residual": st.booleans(),
        "recency_bias": st.booleans(),
        "pre_norm": st.booleans(),
        "feed_forward": st.booleans(),
    }
)


def assert_close(found: torch.Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    """Within the tolerance of unit-scale outputs."""
    expected = np.asarray(expected)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=tolerance * scale)


def serve(model: Any, profile: Any, events: Events, item: np.ndarray, category: np.ndarray) -> jax.Array:
    return model.score(model.extend(model.start(profile), events), item, category)


# Every example compiles: shrinking one that fails would take very long.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    options=OPTIONS,
    layers=st.integers(1, 3),
    # At least 4 wide: a layer norm of two numbers is their order, next to whose jump any rounding shows.
    shape=st.sampled_from([(1, 4), (1, 6), (2, 4), (2, 6), (4, 1), (4, 4), (4, 6)]),
    positions=st.sampled_from(["none", "learned", "sinusoidal"]),
    head=st.sampled_from(["shared_bottom", "mmoe", "ple", "esmm"]),
    crosses=st.builds(
        CrossConfig, layers=st.integers(0, 2), hidden=st.sampled_from([0, 5]), matched_rates=st.booleans()
    ),
    slots=st.sampled_from([1, 5, 32, 33, 70]),
    candidates=st.sampled_from([1, 7]),
    user_id=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_both_stages_compute_what_flax_computes_in_all_modes(
    options: dict, layers: int, shape: tuple[int, int], positions: str, head: str, crosses: CrossConfig, slots: int,
    candidates: int, user_id: bool, seed: int,
) -> None:  # fmt: skip
    random, (heads, head_width) = np.random.default_rng(seed), shape
    encoder = EncoderConfig(layers, heads * head_width, heads, hidden=12, **options)
    features = {"positions": positions, "user_id": user_id, "actions": seed % 4 > 0}
    ranking = mirrors.ranker_description(encoder, head, crosses, **features)
    packed = mirrors.random_timeline(random, 3, slots, users=3)
    profile = mirrors.random_profile(random, 3)
    # Empty, all padding but one event, and full.
    events = mirrors.random_events(random, 3, slots, real=np.array([[0], [1], [slots]]))
    item = random.integers(0, mirrors.VOCABULARY.items, (3, candidates))
    category = random.integers(0, mirrors.VOCABULARY.categories, (3, candidates))

    similarity = "cosine" if seed % 2 else "dot"
    retrieval = mirrors.two_tower_description(encoder, features, similarity=similarity, item_bias=user_id)
    ranker, two_tower = mirrors.random_model(ranking, seed), mirrors.random_model(retrieval, seed)

    @jax.jit
    def outputs(
        packed: Timeline, profile: Any, events: Events, item: jax.Array, category: jax.Array
    ) -> list[jax.Array]:
        return [
            ranker.timeline_logits(packed),
            serve(ranker, profile, events, item, category),
            two_tower.queries(packed),
            two_tower.extend(two_tower.start(profile), events).query_BD,
            two_tower.item_vectors(item, category),
        ]

    expected = outputs(packed, profile, events, item, category)
    ranker, two_tower = mirrors.mirror_of(ranking, ranker), mirrors.mirror_of(retrieval, two_tower)
    history, listed = mirrors.tensors((*profile, *events)), mirrors.tensors((item, category))
    found = [
        ranker.timeline_logits(mirrors.mirrored(packed)),
        ranker(*history, *listed),
        two_tower.queries(mirrors.mirrored(packed)),
        two_tower(*history),
        two_tower.item_vectors(*listed),
    ]
    for of_mirror, of_flax in zip(found, expected, strict=True):
        assert_close(of_mirror, of_flax)


def test_a_users_state_may_be_extended_in_any_stretches() -> None:
    random = np.random.default_rng(0)
    for attention in ("additive", "softmax"):
        encoder, crosses = dataclasses.replace(mirrors.ENCODER, attention=attention), CrossConfig(layers=1)
        description = mirrors.ranker_description(encoder, crosses=crosses)
        mirror = mirrors.mirror_of(description, mirrors.random_model(description))
        profile, events = (
            mirrors.random_profile(random, 2),
            mirrors.random_events(random, 2, 50, np.array([[50], [50]])),
        )
        tensors = mirrors.tensors((*profile, *events))
        candidates = mirrors.tensors((random.integers(0, 40, (2, 5)), random.integers(0, 3, (2, 5))))
        state = mirror.start(type(profile)(*tensors[:3]))
        size = [leaf.shape for leaf in jax.tree.leaves(state)]
        for first, last in ((0, 1), (1, 34), (34, 50)):
            state = mirror.extend(state, Events(*(x[:, first:last] for x in tensors[3:])))
            assert [leaf.shape for leaf in jax.tree.leaves(state)] == size
        assert_close(mirror.score(state, *candidates), mirror(*tensors, *candidates).detach().numpy())


@pytest.mark.parametrize(
    ("attention", "head", "slots", "size"),
    [
        ("additive", "ple", 40, (2, 16, 2)),
        ("softmax", "esmm", 20, (2, 16, 4)),
        pytest.param("additive", "shared_bottom", 20, (12, 512, 8), marks=pytest.mark.slow),
    ],
)
def test_gradients_of_the_loss_agree(attention: str, head: str, slots: int, size: tuple[int, int, int]) -> None:
    layers, width, heads = size
    encoder = EncoderConfig(layers, width, heads, 2 * width, recency_bias=True, attention=attention)
    description = mirrors.ranker_description(encoder, head, CrossConfig(layers=2), positions="sinusoidal")
    model = mirrors.random_model(description)
    packed = mirrors.random_timeline(np.random.default_rng(1), 2, slots, users=2)
    graphdef, parameters = nnx.split(model)

    def loss(parameters: nnx.State) -> jax.Array:
        logits = nnx.merge(graphdef, parameters).timeline_logits(packed)
        return optax.losses.sigmoid_binary_cross_entropy(logits, jnp.asarray(packed.events.action, jnp.float32)).mean()

    mirror = mirrors.mirror_of(description, model)
    logits = mirror.timeline_logits(mirrors.mirrored(packed))
    label = torch.from_numpy(packed.events.action).float()
    torch.nn.functional.binary_cross_entropy_with_logits(logits, label).backward()
    gradient = nnx.merge(graphdef, jax.jit(jax.grad(loss))(parameters))
    expected = mirrors.mirror_of(description, gradient).state_dict()
    largest = max(float(array.abs().max()) for array in expected.values())
    for name, parameter in mirror.named_parameters():
        # The bias of a softmax's logits has no gradient but rounding.
        tolerance = 1e-4 * float(expected[name].abs().max()) + 1e-7 * largest
        assert float((parameter.grad - expected[name]).abs().max()) <= tolerance, name


@pytest.mark.parametrize("layers", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_large_models_agree(layers: int) -> None:
    random = np.random.default_rng(0)
    encoder = EncoderConfig(layers, 512, 8, 1024)
    description = mirrors.ranker_description(encoder)
    model = mirrors.random_model(description)
    inputs = (
        *mirrors.random_profile(random, 2),
        *mirrors.random_events(random, 2, 64, real=np.array([[64], [20]])),
        random.integers(0, mirrors.VOCABULARY.items, (2, 40)),
        random.integers(0, mirrors.VOCABULARY.categories, (2, 40)),
    )

    @jax.jit
    def logits(*inputs: np.ndarray) -> jax.Array:
        return serve(model, mirrors.Profile(*inputs[:3]), Events(*inputs[3:7]), *inputs[7:])

    expected, found = np.asarray(logits(*inputs)), mirrors.mirror_of(description, model)(*mirrors.tensors(inputs))
    assert_close(found, expected)
    # The best 20 by score, so that ties do not matter.
    best = np.sort(expected[..., 0], axis=1)[:, ::-1][:, :20]
    chosen = np.take_along_axis(expected[..., 0], found[..., 0].topk(20).indices.numpy(), axis=1)
    np.testing.assert_allclose(np.sort(chosen, axis=1)[:, ::-1], best, atol=2e-5 * max(1.0, np.abs(best).max()))


def reference(name: str) -> dict[str, Any]:
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as archive:
        entries: dict[str, Any] = {key: archive[key] for key in archive.files}
    return entries | {"meta": json.loads(entries["meta"].tobytes())}


def loaded(module: Any, rows: Any, model: Any) -> Any:
    from tenrec_jax.interop import names
    from tenrec_jax.parameters import named

    in_torch = names.to_torch(rows, named(nnx.state(model)))
    module.load_state_dict({name: torch.from_numpy(array) for name, array in in_torch.items()})
    return module


def test_joint_attention_of_both_variants_gives_the_originals_outputs() -> None:
    from tenrec_jax.interop import names

    golden = reference("paper_attention")
    heads, x = golden["meta"]["num_heads"], torch.from_numpy(golden["inputs/x"])
    real = torch.from_numpy(~golden["inputs/padding_mask"])
    weights = {key.removeprefix("weights/"): array for key, array in golden.items() if key.startswith("weights/")}
    model = load_paper_attention(weights, num_heads=heads).attention
    assert_close(
        loaded(PaperAttention(x.shape[-1], heads), names.PAPER_ATTENTION, model).joint(x, real), golden["outputs/y"]
    )

    golden = reference("tenrec_encoder")
    weights = {key.removeprefix("weights/"): array for key, array in golden.items() if key.startswith("weights/")}
    encoder = load_encoder(weights, num_heads=heads, activation=golden["meta"]["activation"]).encoder
    config = from_mapping(dataclasses.asdict(encoder.config), MirrorEncoderConfig, "encoder")
    mirror = loaded(FastformerEncoder(config).eval(), names.ENCODER, encoder)
    assert_close(mirror.joint(torch.from_numpy(golden["inputs/x"]), real), golden["outputs/y"])
    assert_close(mirror.joint(torch.from_numpy(golden["inputs/x"]), torch.ones_like(real)), golden["outputs/y_no_mask"])


@pytest.fixture(scope="module", params=["additive", "softmax"])
def served(request: pytest.FixtureRequest) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """A ranker in PyTorch and tensors to call it with."""
    random = np.random.default_rng(3)
    encoder = dataclasses.replace(mirrors.ENCODER, attention=request.param)
    description = mirrors.ranker_description(encoder, "mmoe", CrossConfig(layers=1))
    events = mirrors.random_events(random, 2, 40, real=np.array([[40], [3]]))
    inputs = (
        *mirrors.random_profile(random, 2),
        *events,
        random.integers(0, 40, (2, 6)),
        random.integers(0, 3, (2, 6)),
    )
    ranker = mirrors.mirror_of(description, mirrors.random_model(description))
    return ranker.requires_grad_(False), mirrors.tensors(inputs)


def test_a_trace_reproduces_the_module(served: tuple) -> None:
    ranker, inputs = served
    other = [x.flip(0) for x in inputs]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        traced = torch.jit.trace(ranker, inputs)
        for tensors in (inputs, other):
            torch.testing.assert_close(traced(*tensors), ranker(*tensors), rtol=0, atol=1e-6)
        packed = mirrors.mirrored(mirrors.random_timeline(np.random.default_rng(0), 2, 40, users=3))

        def timeline_logits(*flat: torch.Tensor) -> torch.Tensor:
            profile, start, events = flat[:3], flat[3], flat[4:]
            return ranker.timeline_logits(Timeline(mirrors.Profile(*profile), start, Events(*events)))

        flat = (*packed.profile, packed.start, *packed.events)
        other = mirrors.mirrored(mirrors.random_timeline(np.random.default_rng(1), 2, 40, users=3))
        traced = torch.jit.trace(timeline_logits, flat)
        expected = ranker.timeline_logits(other)
        torch.testing.assert_close(traced(*other.profile, other.start, *other.events), expected, rtol=0, atol=1e-6)


def test_onnx_runs_what_the_module_computes(served: tuple, tmp_path: Path) -> None:
    ranker, inputs = served
    path = tmp_path / "ranker.onnx"
    names = [f"input_{i}" for i in range(len(inputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(ranker, inputs, path, input_names=names, dynamo=False, opset_version=17)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for tensors in (inputs, [x.flip(0) for x in inputs]):
        (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, tensors, strict=True)})
        np.testing.assert_allclose(found, ranker(*tensors).detach(), rtol=0, atol=1e-5)


def test_a_setting_that_the_mirror_lacks_is_refused() -> None:
    encoder = dataclasses.asdict(mirrors.ENCODER)
    with pytest.raises(UserError, match=r"encoder\.dtype is 'bfloat16', which this mirror does not support"):
        from_mapping(encoder | {"dtype": "bfloat16"}, MirrorEncoderConfig, "encoder")
    with pytest.raises(UserError, match=r"encoder has settings that this mirror does not know: rotary"):
        from_mapping(encoder | {"rotary": True}, MirrorEncoderConfig, "encoder")
    hashed = {"item_table": {"kind": "hashed", "hashes": 2, "rows": 50, "combine": "sum"}}
    with pytest.raises(UserError, match=r"features\.item_table\.kind is 'hashed', which this mirror does not support"):
        from_mapping({"features": hashed, "encoder": encoder}, RankerConfig, "ranking")
    with pytest.raises(UserError, match=r"ranking lacks encoder, features"):
        from_mapping({"heads": dataclasses.asdict(HeadsConfig())}, RankerConfig, "ranking")
