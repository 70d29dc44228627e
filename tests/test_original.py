"""The original's modules against its reference outputs, and at other sizes against a float64 restatement in NumPy."""

import json
import math
import os
import pickle  # noqa: TID251  makes files that try to run code
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tenrec_jax.errors import UserError
from tenrec_jax.interop.original import load_encoder, load_paper_attention, load_ranker, load_state, load_two_tower

FIXTURES = Path(__file__).parent / "fixtures"
FILES = ("paper_attention", "tenrec_encoder", "tenrec_ranker", "tenrec_two_tower")
State = dict[str, np.ndarray]


def part(name: str, of: str) -> State:
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as archive:
        return {key.removeprefix(f"{of}/"): archive[key] for key in archive.files if key.startswith(f"{of}/")}


def load_as(name: str, weights: Mapping[str, np.ndarray]) -> Callable:
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as archive:
        meta = json.loads(archive["meta"].tobytes())
    heads = meta["num_heads"]
    if name == "paper_attention":
        return load_paper_attention(weights, num_heads=heads)
    if name == "tenrec_encoder":
        return load_encoder(weights, num_heads=heads, activation=meta["activation"])
    if name == "tenrec_ranker":
        return load_ranker(weights, num_heads=heads)
    return load_two_tower(weights, num_heads=heads, temperature=meta["temperature"])


def assert_close(actual: object, expected: np.ndarray) -> None:
    assert isinstance(actual, jax.Array)
    np.testing.assert_allclose(np.asarray(actual), expected, atol=1e-5, rtol=1e-5)


# The reference: float64, in PyTorch's names and layout.


def linear(w: State, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def layer_norm(w: State, name: str, x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    return norm(x, eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    weight = np.exp(x - x.max(1, keepdims=True))
    return weight / weight.sum(1, keepdims=True)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def activate(x: np.ndarray, activation: str) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) if activation == "gelu" else np.maximum(x, 0)


def attention(w: State, name: str, x: np.ndarray, padding: np.ndarray, heads: int) -> np.ndarray:
    query, key, value = (
        linear(w, f"{name}.{kind}", x).reshape(*x.shape[:2], heads, -1) for kind in ("query", "key", "value")
    )

    def pool(kind: str, of: np.ndarray) -> np.ndarray:
        logit = np.where(padding[..., None], -1e4, linear(w, f"{name}.{kind}_weight", x))
        return unit((np.maximum(softmax(logit), 1e-9)[..., None] * of).sum(1))

    pooled = pool("key", key * pool("query", query)[:, None])
    mixed = (value * pooled[:, None] + query).reshape(x.shape)
    return np.clip(linear(w, f"{name}.out_proj", mixed), -100, 100)


def encode(w: State, name: str, x: np.ndarray, padding: np.ndarray, heads: int, activation: str) -> np.ndarray:
    layer = 0
    while f"{name}layers.{layer}.norm1.weight" in w:
        block = f"{name}layers.{layer}"
        x = x + attention(w, f"{block}.attention", layer_norm(w, f"{block}.norm1", x), padding, heads)
        hidden = activate(linear(w, f"{block}.ffn.0", layer_norm(w, f"{block}.norm2", x)), activation)
        x = x + linear(w, f"{block}.ffn.3", hidden)
        layer += 1
    return layer_norm(w, f"{name}final_norm", x)


def paper(w: State, x: np.ndarray, padding: np.ndarray, heads: int) -> np.ndarray:
    query, key = linear(w, "query", x), linear(w, "key", x)

    def pool(name: str, of: np.ndarray) -> np.ndarray:
        logit = linear(w, name, of) / math.sqrt(x.shape[-1] // heads)
        weight = softmax(logit + np.where(padding, -10000.0, 0.0)[..., None])
        return (np.repeat(weight, x.shape[-1] // heads, axis=-1) * of).sum(1, keepdims=True)

    return linear(w, "transform", pool("key_att", key * pool("query_att", query)) * query) + query


def rank(w: State, inputs: State, heads: int) -> np.ndarray:
    def table(name: str, of: str) -> np.ndarray:
        return w[f"{name}_embedding.weight"][inputs[of]]

    history, candidates = inputs["history_item_ids"], inputs["candidate_item_ids"]
    position, segment = w["pos_encoding.pe"][0], w["segment_embedding.embedding.weight"]
    user = table("user", "user_id") + table("gender", "gender") + table("age", "age") + segment[0]
    events = table("item", "history_item_ids") + position[: history.shape[1]] + segment[1]
    targets = table("item", "candidate_item_ids") + table("category", "candidate_categories")
    targets = targets + position[: candidates.shape[1]] + segment[2]
    x = np.concatenate([user[:, None], events, targets], axis=1)
    padding = np.zeros(x.shape[:2], bool)
    padding[:, 1 : 1 + history.shape[1]] = history == 0
    y = encode(w, "encoder.", x, padding, heads, "gelu")[:, 1 + history.shape[1] :]
    return linear(w, "unembedding", layer_norm(w, "output_norm", y, 1e-5))


def two_towers(w: State, inputs: State, heads: int, temperature: float) -> State:
    def table(name: str, of: str) -> np.ndarray:
        return w[f"{name}_embedding.weight"][inputs[of]]

    history = inputs["history_item_ids"]
    action = np.clip(norm(linear(w, "user_tower.action_projection", inputs["history_actions"])), -10, 10)
    x = np.concatenate([table("user_tower.item", "history_item_ids"), action], axis=-1)
    x = x + w["user_tower.pos_encoding.pe"][0, : history.shape[1]]
    padding = history == 0
    padding[padding.all(1), 0] = False
    y = encode(w, "user_tower.transformer.", x, padding, heads, "relu")
    mean = np.stack([row[~mask].mean(0) for row, mask in zip(y, padding, strict=True)])
    user = table("user_tower.user", "user_ids") + table("user_tower.gender", "user_gender")
    user = unit(user + table("user_tower.age", "user_age") + linear(w, "user_tower.output_projection", mean))
    item = table("item_tower.item", "candidate_item_ids") + table("item_tower.category", "candidate_categories")
    hidden = np.maximum(linear(w, "item_tower.mlp.0", item), 0)
    item = unit(item + linear(w, "item_tower.mlp.3", hidden))
    scores = (user[:, None] * item).sum(-1) / temperature
    logits = linear(w, "unembedding", layer_norm(w, "output_norm", user[:, None] * item, 1e-5))
    logits[..., 0] += scores
    return {"user_repr": user, "candidate_repr": item, "scores": scores, "logits": np.clip(logits, -100, 100)}


# Random weights of any size.


class Maker:
    """Weights of float32 precision, drawn so that activations stay near unit scale."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.weights: State = {}

    def draw(self, name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> None:
        self.weights[name] = (mean + scale * self.random.normal(size=shape)).astype(np.float32)

    def linear(self, name: str, out: int, width: int) -> None:
        self.draw(f"{name}.weight", out, width, scale=width**-0.5)
        self.draw(f"{name}.bias", out, scale=0.1)

    def norm(self, name: str, width: int) -> None:
        self.draw(f"{name}.weight", width, scale=0.1, mean=1.0)
        self.draw(f"{name}.bias", width, scale=0.1)

    def encoder(self, prefix: str, layers: int, width: int, heads: int, hidden: int) -> None:
        for layer in range(layers):
            block = f"{prefix}layers.{layer}"
            for name in ("query", "key", "value", "out_proj"):
                self.linear(f"{block}.attention.{name}", width, width)
            for name in ("query_weight", "key_weight"):
                self.linear(f"{block}.attention.{name}", heads, width)
            self.linear(f"{block}.ffn.0", hidden, width)
            self.linear(f"{block}.ffn.3", width, hidden)
            self.norm(f"{block}.norm1", width)
            self.norm(f"{block}.norm2", width)
        self.norm(f"{prefix}final_norm", width)

    def double(self) -> State:
        return {name: array.astype(np.float64) for name, array in self.weights.items()}


def ranker_weights(seed: int, layers: int, width: int, heads: int) -> Maker:
    maker = Maker(seed)
    rows = {"user": 7, "item": 31, "action": 5, "gender": 4, "age": 6, "category": 9}
    for name, count in rows.items():
        maker.draw(f"{name}_embedding.weight", count, width)
    maker.draw("segment_embedding.embedding.weight", 3, width)
    maker.draw("pos_encoding.pe", 1, 12, width)
    maker.encoder("encoder.", layers, width, heads, 3 * width)
    maker.norm("output_norm", width)
    maker.linear("unembedding", 4, width)
    return maker


def two_tower_weights(seed: int, layers: int, width: int, heads: int) -> Maker:
    maker = Maker(seed)
    for name, count in {"user": 7, "item": 31, "gender": 4, "age": 6}.items():
        maker.draw(f"user_tower.{name}_embedding.weight", count, width)
    maker.linear("user_tower.action_projection", width, 4)
    maker.draw("user_tower.pos_encoding.pe", 1, 12, 2 * width)
    maker.encoder("user_tower.transformer.", layers, 2 * width, heads, 40)
    maker.linear("user_tower.output_projection", width, 2 * width)
    maker.draw("item_tower.item_embedding.weight", 31, width)
    maker.draw("item_tower.category_embedding.weight", 9, width)
    maker.linear("item_tower.mlp.0", 24, width)
    maker.linear("item_tower.mlp.3", width, 24)
    maker.norm("output_norm", width)
    maker.linear("unembedding", 4, width)
    return maker


def history(random: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """Items of a padded history: one row is empty, one full."""
    lengths = np.concatenate([[0, length], random.integers(1, length + 1, batch - 2)])
    return np.where(np.arange(length) < lengths[:, None], random.integers(1, 31, (batch, length)), 0)


def padded_tokens(seed: int, batch: int, length: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    padding = random.random((batch, length)) < 0.4
    padding[0], padding[-1] = True, False
    return random.normal(size=(batch, length, width)).astype(np.float32), padding


# Agreement.


@pytest.mark.parametrize("name", FILES)
def test_reproduces_the_reference_outputs(name: str) -> None:
    model, inputs, outputs = load_as(name, part(name, "weights")), part(name, "inputs"), part(name, "outputs")
    if "x" in inputs:
        assert_close(model(inputs["x"], inputs["padding_mask"]), outputs["y"])
    else:
        found = model(inputs)
        assert found.keys() == outputs.keys()
        for key, expected in outputs.items():
            assert_close(found[key], expected)


def test_encoder_without_a_mask_reproduces_the_reference_outputs() -> None:
    model = load_as("tenrec_encoder", part("tenrec_encoder", "weights"))
    assert_close(model(part("tenrec_encoder", "inputs")["x"]), part("tenrec_encoder", "outputs")["y_no_mask"])


@pytest.mark.parametrize(
    ("layers", "width", "heads", "hidden", "length", "activation"),
    [
        (1, 16, 4, 32, 9, "gelu"),
        (2, 24, 8, 40, 1, "relu"),
        (4, 64, 4, 64, 70, "gelu"),
    ],
)
def test_encoder_of_any_size_equals_the_float64_restatement(
    layers: int, width: int, heads: int, hidden: int, length: int, activation: str
) -> None:
    maker = Maker(layers)
    maker.encoder("", layers, width, heads, hidden)
    x, padding = padded_tokens(width, 4, length, width)
    model = load_encoder(maker.weights, num_heads=heads, activation=activation)
    assert_close(model(x, padding), encode(maker.double(), "", x.astype(np.float64), padding, heads, activation))


def test_attention_output_is_clamped_at_100() -> None:
    maker = Maker(1)
    maker.encoder("", 1, 16, 4, 32)
    maker.weights["layers.0.attention.out_proj.weight"] *= 100
    maker.weights["layers.0.attention.out_proj.bias"] += 1000 * np.eye(16, dtype=np.float32)[3]
    x, padding = padded_tokens(1, 4, 9, 16)
    double = maker.double()
    attended = attention(double, "layers.0.attention", layer_norm(double, "layers.0.norm1", x), padding, 4)
    assert (np.abs(attended) == 100).mean() > 0.1
    model = load_encoder(maker.weights, num_heads=4, activation="gelu")
    assert_close(model(x, padding), encode(double, "", x.astype(np.float64), padding, 4, "gelu"))


@pytest.mark.parametrize(("width", "heads", "length"), [(16, 4, 1), (24, 3, 9), (64, 1, 40)])
def test_paper_attention_of_any_size_equals_the_float64_restatement(width: int, heads: int, length: int) -> None:
    maker = Maker(width)
    for name in ("query", "key", "transform"):
        maker.linear(name, width, width)
    for name in ("query_att", "key_att"):
        maker.linear(name, heads, width)
    x, padding = padded_tokens(width, 5, length, width)
    # At -10000 float32 resolves 1e-3, so a row that is all padding agrees with the original's float32 alone.
    padding[0, 0] = False
    model = load_paper_attention(maker.weights, num_heads=heads)
    assert_close(model(x, padding), paper(maker.double(), x.astype(np.float64), padding, heads))


def test_ranker_of_other_sizes_equals_the_float64_restatement() -> None:
    heads = 8
    maker = ranker_weights(3, layers=3, width=32, heads=heads)
    random = np.random.default_rng(3)
    inputs = {
        "user_id": random.integers(0, 7, 4),
        "history_item_ids": history(random, 4, 5),
        "candidate_item_ids": random.integers(0, 31, (4, 6)),
        "gender": random.integers(0, 4, 4),
        "age": random.integers(0, 6, 4),
        "candidate_categories": random.integers(0, 9, (4, 6)),
    }
    inputs["candidate_item_ids"][:, -1] = 0
    found = load_ranker(maker.weights, num_heads=heads)(inputs)
    expected = rank(maker.double(), inputs, heads)
    assert_close(found["logits"], expected)
    assert_close(found["scores"], expected[..., 0])


def test_two_tower_of_other_sizes_equals_the_float64_restatement() -> None:
    heads, temperature = 16, 2e-3
    maker = two_tower_weights(1, layers=1, width=24, heads=heads)
    random = np.random.default_rng(4)
    inputs = {
        "user_ids": random.integers(0, 7, 4),
        "history_item_ids": history(random, 4, 5),
        "history_actions": random.integers(0, 2, (4, 5, 4)).astype(np.float32),
        "candidate_item_ids": random.integers(0, 31, (4, 6)),
        "user_gender": random.integers(0, 4, 4),
        "user_age": random.integers(0, 6, 4),
        "candidate_categories": random.integers(0, 9, (4, 6)),
    }
    found = load_two_tower(maker.weights, num_heads=heads, temperature=temperature)(inputs)
    expected = two_towers(maker.double(), inputs, heads, temperature)
    for key in ("user_repr", "candidate_repr"):
        assert_close(found[key], expected[key])
    assert_close(found["scores"] * temperature, expected["scores"] * temperature)
    assert_close(found["logits"], expected["logits"])
    assert 0.1 < (np.abs(expected["logits"][..., 0]) == 100).mean() < 1


def test_blocks_are_stacked_on_the_leading_axis_and_linear_weights_transposed() -> None:
    maker = Maker(5)
    maker.encoder("", 3, 16, 4, 24)
    blocks = load_encoder(maker.weights, num_heads=4, activation="relu").encoder.blocks
    for layer in range(3):
        name = f"layers.{layer}.attention.query_weight"
        # Softmax ignores this bias, so outputs cannot tell it from another.
        np.testing.assert_array_equal(blocks.attention.query_weight.bias[...][layer], maker.weights[f"{name}.bias"])
        np.testing.assert_array_equal(
            blocks.attention.query_weight.kernel[...][layer], maker.weights[f"{name}.weight"].T
        )


def test_forward_is_pure_and_compiles() -> None:
    model, inputs = load_as("paper_attention", part("paper_attention", "weights")), part("paper_attention", "inputs")
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, x, mask: nnx.merge(graphdef, state).forward(x, mask))
    y = forward(state, jnp.asarray(inputs["x"]), jnp.asarray(~inputs["padding_mask"]))
    assert_close(y, part("paper_attention", "outputs")["y"])


# Entries that do not fit.


@pytest.mark.parametrize("name", FILES)
def test_every_missing_entry_is_named(name: str) -> None:
    weights = part(name, "weights")
    for entry in weights:
        with pytest.raises(UserError) as error:
            load_as(name, {key: array for key, array in weights.items() if key != entry})
        assert f"missing: {entry}\n" in f"{error.value}\n"


@pytest.mark.parametrize("name", FILES)
def test_every_misshapen_entry_is_named(name: str) -> None:
    weights = part(name, "weights")
    for entry, array in weights.items():
        for wrong in (np.concatenate([array, array[..., :1]], axis=-1), array[None], array[..., :0]):
            with pytest.raises(UserError, match="misshapen") as error:
                load_as(name, weights | {entry: wrong})
            assert entry in str(error.value)


def test_all_problems_are_reported_at_once() -> None:
    weights = part("tenrec_encoder", "weights")
    del weights["final_norm.bias"]
    weights["layers.0.ffn.0.weight"] = weights["layers.0.ffn.0.weight"].T
    weights["layers.1.norm1.weight"] = weights["layers.1.norm1.weight"] * np.nan
    weights["layers.1.norm1.bias"] = weights["layers.1.norm1.bias"].astype(int)
    weights["layers.1.norm3.bias"] = weights["layers.1.norm2.bias"]
    with pytest.raises(UserError) as error:
        load_as("tenrec_encoder", weights)
    assert set(str(error.value).split("\n  ")[1:]) == {
        "missing: final_norm.bias",
        "surplus: layers.1.norm3.bias",
        "misshapen: layers.0.ffn.0.weight has shape (16, 32), expected [F, D] = (32, 16)",
        "not finite: layers.1.norm1.weight",
        "not a float array: layers.1.norm1.bias is int64",
    }


def test_a_block_out_of_sequence_is_surplus() -> None:
    weights = part("tenrec_encoder", "weights")
    with pytest.raises(UserError, match=r"surplus: layers\.999999999\.norm1\.bias"):
        load_as("tenrec_encoder", weights | {"layers.999999999.norm1.bias": weights["layers.0.norm1.bias"]})


@pytest.mark.parametrize("heads", [0, 3, 8])
def test_heads_that_do_not_fit_are_refused(heads: int) -> None:
    with pytest.raises(UserError) as error:
        load_encoder(part("tenrec_encoder", "weights"), num_heads=heads, activation="gelu")
    message = str(error.value)
    expected = {0: "at least 1", 3: "no multiple of num_heads = 3", 8: "layers.0.attention.query_weight.weight"}
    assert expected[heads] in message


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UserError, match="swish"):
        load_encoder({}, num_heads=4, activation="swish")  # type: ignore[arg-type]
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="temperature"):
            load_two_tower({}, num_heads=4, temperature=temperature)


# Inputs that do not fit.

BAD_RANKER_INPUTS = {
    "id above": ("user_id", lambda x: x + 12, r"user_id\[0\] is 17, outside the table's 0\.\.11 \(3 such values\)"),
    "id below": ("candidate_item_ids", lambda x: x * -1, "candidate_item_ids.*outside"),
    "huge id": ("history_item_ids", lambda x: x + 2**33, "history_item_ids.*outside"),
    "category": ("candidate_categories", lambda x: x + 1, "candidate_categories.*is 8"),
    "float ids": ("age", lambda x: x * 1.0, "age is float64, expected integers"),
    "other batch": ("gender", lambda x: x[:2], r"gender has shape \(2,\)"),
    "too long": ("history_item_ids", lambda x: np.repeat(x, 2, 1), "12 long, but the weights hold 8 positions"),
    "empty": ("history_item_ids", lambda x: x[:, :0], "none of them 0"),
    "flat": ("candidate_item_ids", lambda x: x[0], "candidate_item_ids has shape"),
}


@pytest.mark.parametrize("case", BAD_RANKER_INPUTS)
def test_ranker_refuses_inputs_that_do_not_fit(case: str) -> None:
    name, change, message = BAD_RANKER_INPUTS[case]
    inputs = part("tenrec_ranker", "inputs")
    model = load_as("tenrec_ranker", part("tenrec_ranker", "weights"))
    with pytest.raises(UserError, match=message):
        model(inputs | {name: change(inputs[name])})


def test_missing_inputs_and_actions_that_are_not_finite_are_refused() -> None:
    inputs = part("tenrec_two_tower", "inputs")
    model = load_as("tenrec_two_tower", part("tenrec_two_tower", "weights"))
    inputs["history_actions"][0, 0, 0] = np.inf
    del inputs["user_age"]
    with pytest.raises(UserError, match="history_actions must hold finite numbers; user_age is missing"):
        model(inputs)
    with pytest.raises(UserError, match=r"history_actions has shape \(3, 6, 3\)"):
        model(inputs | {"user_age": inputs["user_gender"], "history_actions": np.zeros((3, 6, 3))})


def test_encoder_refuses_tokens_and_masks_that_do_not_fit() -> None:
    model = load_as("tenrec_encoder", part("tenrec_encoder", "weights"))
    x = np.zeros((2, 5, 16), np.float32)
    with pytest.raises(UserError, match="x has shape"):
        model(x[..., :8])
    with pytest.raises(UserError, match="padding_mask is"):
        model(x, np.zeros((2, 4), bool))
    with pytest.raises(UserError, match="expected bool"):
        model(x, np.zeros((2, 5)))


# Files.


class Command:
    """Unpickling this would run a shell command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.mark}'",)


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_reads_safetensors_and_npz(tmp_path: Path) -> None:
    weights = part("paper_attention", "weights")
    assert_same(load_state(FIXTURES / "paper_attention.npz"), weights)
    np.savez(tmp_path / "plain.npz", **weights)
    assert_same(load_state(tmp_path / "plain.npz"), weights)
    save_file({f"module.{name}": array for name, array in weights.items()}, tmp_path / "ddp.safetensors")
    assert_same(load_state(str(tmp_path / "ddp.safetensors")), weights)


@pytest.mark.parametrize("key", [None, "model_state_dict", "state_dict", "model"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_reads_a_torch_checkpoint(tmp_path: Path, key: str | None, suffix: str) -> None:
    torch = pytest.importorskip("torch")
    weights = part("paper_attention", "weights")
    state = {f"module.{name}": torch.from_numpy(array) for name, array in weights.items()}
    path = tmp_path / f"model{suffix}"
    torch.save(state if key is None else {"epoch": 3, "optimizer": {"state": {}}, key: state}, path)
    assert_same(load_state(path), weights)


def test_bfloat16_weights_become_float32(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch_file

    state = {name: torch.from_numpy(array).bfloat16() for name, array in part("paper_attention", "weights").items()}
    torch.save(state, tmp_path / "half.pt")
    save_torch_file(state, tmp_path / "half.safetensors")
    x = part("paper_attention", "inputs")["x"]
    for suffix in (".pt", ".safetensors"):
        weights = load_state(tmp_path / f"half{suffix}")
        assert {array.astype(np.float32).tobytes() for array in weights.values()} == {
            tensor.float().numpy().tobytes() for tensor in state.values()
        }
        assert load_as("paper_attention", weights)(x).dtype == np.float32


@pytest.mark.parametrize("writer", ["torch", "torch legacy", "pickle 2", "pickle 5"])
def test_a_checkpoint_that_would_run_code_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    torch = pytest.importorskip("torch")
    mark, path = tmp_path / "ran", tmp_path / "evil.pt"
    content = {"model_state_dict": {"query.weight": torch.ones(2, 2), "query.bias": Command(mark)}}
    if writer.startswith("torch"):
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    else:
        path.write_bytes(pickle.dumps({"query.bias": Command(mark)}, protocol=int(writer[-1])))
    with pytest.raises(UserError, match=r"evil\.pt: refused"):
        load_state(path)
    assert not mark.exists()


def test_an_npz_with_objects_is_refused_and_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.npz"
    np.savez(path, **{"weights/query.bias": np.array([Command(mark)], dtype=object)})
    with pytest.raises(UserError, match=r"evil\.npz"):
        load_state(path)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / f"model{suffix}"
    weights = part("paper_attention", "weights")
    if suffix == ".npz":
        np.savez(path, **weights)
    elif suffix == ".pt":
        torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, path)
    else:
        save_file(weights, path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"user_id,item_id\n", "truncated": whole[: len(whole) // 2]}[damage])
    with pytest.raises(UserError, match=f"model\\{suffix}"):
        load_state(path)


def test_paths_that_are_no_state_dict_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(UserError, match="no such file"):
        load_state(tmp_path / "absent.npz")
    with pytest.raises(UserError, match=r"model\.bin: not a state dict by its name"):
        load_state(tmp_path / "model.bin")
    np.savez(tmp_path / "none.npz")
    with pytest.raises(UserError, match="holds no arrays"):
        load_state(tmp_path / "none.npz")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list"):
        load_state(tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    with pytest.raises(UserError, match="entry epoch is a int"):
        load_state(tmp_path / "epoch.pt")


def test_without_pytorch_a_checkpoint_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"install tenrec_jax\[torch\]"):
        load_state(tmp_path / "model.pt")


def test_a_pytorch_whose_weights_only_can_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    (tmp_path / "model.pt").write_bytes(b"")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(UserError, match=r"PyTorch 2\.6 or newer, 2\.5\.1"):
        load_state(tmp_path / "model.pt")
