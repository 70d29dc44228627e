"""The ranker's heads against plain restatements of the papers' formulas in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tenrec_jax.models.heads import HeadsConfig, action_logits, entire_space_logits, make_head, modelled_rates
from tenrec_jax.models.losses import action_losses

ACTIONS, WIDTH = 3, 6
CONFIG = HeadsConfig(experts=2, expert_width=5)
X = jax.random.normal(jax.random.key(0), (2, 4, WIDTH))
KINDS = [("shared_bottom", 1), ("mmoe", 1), ("ple", 1), ("ple", 3), ("esmm", 1)]


def trained_head(kind: str, levels: int) -> nnx.Module:
    """A head none of whose parameters is zero."""
    head = make_head(dataclasses.replace(CONFIG, kind=kind, levels=levels), WIDTH, ACTIONS, rngs=nnx.Rngs(0))
    state = nnx.state(head)
    leaves, structure = jax.tree.flatten(state)
    random = [jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
    nnx.update(head, jax.tree.unflatten(structure, random))
    return head


def softmax(x: np.ndarray) -> np.ndarray:
    weight = np.exp(x - x.max())
    return weight / weight.sum()


def array(parameter: nnx.Param) -> np.ndarray:
    return np.asarray(parameter[...], np.float64)


def tower(head: nnx.Module, action: int, mixed_W: np.ndarray) -> float:
    return float(array(head.towers.kernel)[action] @ mixed_W + array(head.towers.bias)[action])


def mmoe(head: nnx.Module, x_D: np.ndarray) -> list[float]:
    experts, width = CONFIG.experts, CONFIG.expert_width
    logits = []
    for action in range(ACTIONS):
        gate = softmax(x_D @ array(head.gates.kernel)[:, action * experts : (action + 1) * experts])
        mixed_W = np.zeros(width)
        for i in range(experts):
            part = slice(i * width, (i + 1) * width)
            hidden = x_D @ array(head.experts.kernel)[:, part] + array(head.experts.bias)[part]
            mixed_W += gate[i] * np.maximum(hidden, 0)
        logits.append(tower(head, action, mixed_W))
    return logits


def ple(head: nnx.Module, x_D: np.ndarray) -> list[float]:
    inputs = [x_D] * (ACTIONS + 1)
    for level in head.levels:
        kernel, bias = array(level.experts.kernel), array(level.experts.bias)
        experts = [
            [np.maximum(inputs[group] @ kernel[group, :, i] + bias[group, i], 0) for i in range(CONFIG.experts)]
            for group in range(ACTIONS + 1)
        ]
        outputs = []
        for action in range(ACTIONS):
            seen = [*experts[action], *experts[ACTIONS]]
            outputs.append(softmax(inputs[action] @ array(level.gates.kernel)[action]) @ np.array(seen))
        if level.shared_gate is not None:
            everything = [expert for group in experts for expert in group]
            outputs.append(softmax(inputs[ACTIONS] @ array(level.shared_gate.kernel)) @ np.array(everything))
        inputs = outputs
    return [tower(head, action, inputs[action]) for action in range(ACTIONS)]


def linear(head: nnx.Module, x_D: np.ndarray) -> np.ndarray:
    return x_D @ array(head.kernel) + array(head.bias)


@pytest.mark.parametrize(("kind", "levels"), KINDS)
def test_a_head_is_its_papers_formula(kind: str, levels: int) -> None:
    head = trained_head(kind, levels)
    formula = {"mmoe": mmoe, "ple": ple}.get(kind, linear)
    expected = np.array([[formula(head, x_D) for x_D in x_TD] for x_TD in np.asarray(X, np.float64)])
    np.testing.assert_allclose(jax.jit(head)(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "levels"), KINDS)
def test_a_fresh_head_leaves_the_biases_alone(kind: str, levels: int) -> None:
    head = make_head(dataclasses.replace(CONFIG, kind=kind, levels=levels), WIDTH, ACTIONS, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(jax.jit(head)(X), np.zeros((2, 4, ACTIONS)))


@pytest.mark.parametrize(("kind", "levels"), [("mmoe", 1), ("ple", 1), ("ple", 3)])
def test_gates_sum_to_one(kind: str, levels: int) -> None:
    head = trained_head(kind, levels)
    # Where every expert says the same, any mixture whose weights sum to one says it too.
    for experts in [head.experts] if kind == "mmoe" else [level.experts for level in head.levels]:
        experts.kernel[...], experts.bias[...] = jnp.zeros_like(experts.kernel[...]), jnp.ones_like(experts.bias[...])
    expected = array(head.towers.kernel).sum(-1) + array(head.towers.bias)
    np.testing.assert_allclose(jax.jit(head)(X), np.broadcast_to(expected, (2, 4, ACTIONS)), rtol=1e-5)


@pytest.mark.parametrize(("kind", "levels"), [("mmoe", 1), ("ple", 3)])
def test_gradients_reach_every_expert_and_gate(kind: str, levels: int) -> None:
    graphdef, parameters = nnx.split(trained_head(kind, levels))

    def loss(parameters: nnx.State) -> jax.Array:
        logits = nnx.merge(graphdef, parameters)(jax.random.normal(jax.random.key(5), (64, WIDTH)))
        return jnp.square(logits).sum()

    gradient = nnx.merge(graphdef, jax.jit(jax.grad(loss))(parameters))
    for level in [gradient] if kind == "mmoe" else gradient.levels:
        # Single units of an expert may be dead.
        kernel = array(level.experts.kernel)
        by_expert = kernel.reshape(*kernel.shape[: -1 if kind == "mmoe" else -2], CONFIG.experts, CONFIG.expert_width)
        assert (by_expert != 0).any((-3, -1)).all()
        assert (array(level.gates.kernel) != 0).all()


EXTREME = np.array([-50.0, -20.0, -1.0, 0.0, 0.3, 20.0, 50.0])


def test_entire_space_logits_are_those_of_the_product_at_any_size() -> None:
    click, given = (grid.ravel() for grid in np.meshgrid(EXTREME, EXTREME))
    got = jax.jit(entire_space_logits)(jnp.stack([click, given], axis=-1).astype(jnp.float32))
    np.testing.assert_array_equal(got[:, 0], click.astype(np.float32))
    log_p = -np.logaddexp(0, -click) - np.logaddexp(0, -given)
    # 1 - p by its own sum: (1 - P(click)) + P(click) (1 - P(action | click)).
    log_not = np.logaddexp(-np.logaddexp(0, click), -np.logaddexp(0, -click) - np.logaddexp(0, given))
    np.testing.assert_allclose(got[:, 1], log_p - log_not, rtol=1e-6, atol=1e-6)
    probability = 1 / (1 + np.exp(-click)) / (1 + np.exp(-given))
    np.testing.assert_allclose(jax.nn.sigmoid(got[:, 1]), probability, rtol=1e-4, atol=1e-37)


def test_the_entire_space_loss_and_its_gradients_are_finite_and_right_at_extreme_logits() -> None:
    click, given, label = (grid.ravel() for grid in np.meshgrid(EXTREME, EXTREME, [0, 1]))
    label_1P2 = np.stack([label, label], axis=-1)[None]
    where_1P = np.ones(label_1P2.shape[:2], bool)

    def loss(x_1P2: jax.Array) -> jax.Array:
        return action_losses(entire_space_logits(x_1P2), label_1P2, where_1P)[1]

    x_1P2 = jnp.stack([click, given], axis=-1).astype(jnp.float32)[None]
    value, gradient = jax.jit(jax.value_and_grad(loss))(x_1P2)
    log_p = -np.logaddexp(0, -click) - np.logaddexp(0, -given)
    log_not = np.logaddexp(-np.logaddexp(0, click), -np.logaddexp(0, -click) - np.logaddexp(0, given))
    np.testing.assert_allclose(value, -np.where(label, log_p, log_not).sum(), rtol=1e-5)
    # d log p / d click = 1 - P(click), and d log (1 - p) / d click = -(1 - P(click)) p / (1 - p).
    not_clicked = 1 / (1 + np.exp(click))
    expected = np.where(label, -not_clicked, not_clicked * np.exp(log_p - log_not))
    np.testing.assert_allclose(gradient[0, :, 0], expected, rtol=1e-4, atol=1e-12)


def test_biases_of_the_entire_space_start_from_rates_given_a_click() -> None:
    config, rate = HeadsConfig(kind="esmm"), np.array([[0.4, 0.1, 0.02], [0.1, 0.3, 0.1]])
    given_click = modelled_rates(config, rate)
    np.testing.assert_allclose(given_click, [[0.4, 0.25, 0.05], [0.1, 1.0, 1.0]])
    given_click = np.clip(given_click, 1e-6, 1 - 1e-6)
    probability = jax.nn.sigmoid(action_logits(config, jnp.asarray(np.log(given_click / (1 - given_click)))))
    np.testing.assert_allclose(probability, [[0.4, 0.1, 0.02], [0.1, 0.1, 0.1]], rtol=1e-4)
    assert modelled_rates(HeadsConfig(kind="mmoe"), rate) is rate


@pytest.mark.parametrize("change", [{"experts": 0}, {"expert_width": 0}, {"levels": 0}])
def test_a_head_without_experts_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        HeadsConfig(kind="ple", **change)
