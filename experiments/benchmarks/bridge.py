"""The same ranker in JAX and in its PyTorch mirror: scoring candidates for one user.

    python experiments/benchmarks/bridge.py [--json FILE] [--quick] [--rounds N] [--wall]

500 candidates, a history of 64 events, 12 layers x 512, on the CPU, nothing kept between calls: both sides read the history and score every
candidate by itself, with the same weights, which is checked before anything is timed. The third side is the original system's way in plain
PyTorch: user, history and 128 candidates at a time in one sequence in which all tokens pool over all.

Bars: the mirror within 1.5 times of JAX, either way; 3 times faster than the original's way. A user's state may also be kept, which the
original's way cannot do: scoring from it is measured too, and so are the mirror under `torch.compile`, and both in bfloat16.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
import torch_rival
from flax import nnx
from harness import Clock, Result, median_milliseconds, report, start_clock, timed_parser
from scoring import FULL, ITEMS, QUICK, Sizes, candidates, user_log

from tenrec_jax.interop import names, weights
from tenrec_jax.models.blocks import EncoderConfig
from tenrec_jax.models.features import FeatureConfig, Vocabulary
from tenrec_jax.models.ranker import Ranker, RankerConfig
from tenrec_jax.parameters import named
from tenrec_jax.timeline import Events, Profile
from torch_mlu_backend import config as mirror_config
from torch_mlu_backend import modules

VOCABULARY = Vocabulary(users=1_000, items=ITEMS, genders=3, ages=10, categories=100, actions=4)
CHUNK = 128


def pair(sizes: Sizes) -> tuple[Ranker, modules.Ranker]:
    """The same ranker on both sides."""
    encoder = EncoderConfig(sizes.layers, sizes.width, 8, 2 * sizes.width)
    config = RankerConfig(FeatureConfig(), encoder)
    ranker = Ranker(config, VOCABULARY, rngs=nnx.Rngs(0))
    # Zero before training, which would make all scores equal.
    kernel = ranker.head.kernel  # type: ignore[attr-defined]
    kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape) * sizes.width**-0.5
    mirror = modules.Ranker(
        mirror_config.from_mapping(dataclasses.asdict(config), mirror_config.RankerConfig, "config"),
        mirror_config.Vocabulary(**dataclasses.asdict(VOCABULARY)),
    )
    in_torch = names.to_torch(weights.KINDS[weights.RANKER].names, named(nnx.state(ranker)))
    mirror.load_state_dict({name: torch.from_numpy(array) for name, array in in_torch.items()})
    return ranker, mirror.eval().requires_grad_(False)


def scoring(sizes: Sizes, rounds: int, clock: Clock, bars: bool) -> list[Result]:
    """One list of candidates, on all sides in turn."""
    ranker, mirror = pair(sizes)
    (profile, events), listed = user_log(sizes.history), candidates(sizes.candidates)
    graphdef, parameters = nnx.split(ranker)

    @jax.jit
    def score(parameters: nnx.State, profile: Profile, events: Events, *listed: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, parameters).score_after(profile, events, *listed)

    history = [torch.from_numpy(np.array(x)) for x in (*profile, *events)]
    candidate_1C = [torch.from_numpy(x) for x in listed]
    state = mirror.extend(mirror.start(modules.Profile(*history[:3])), modules.Events(*history[3:]))

    def with_jax(_: int) -> Any:
        return jax.block_until_ready(score(parameters, profile, events, *listed))

    def with_mirror(_: int) -> torch.Tensor:
        return mirror(*history, *candidate_1C)

    def from_state(_: int) -> torch.Tensor:
        return mirror.score(state, *candidate_1C)

    np.testing.assert_allclose(with_mirror(0), with_jax(0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(from_state(0), with_mirror(0), rtol=0, atol=1e-5)
    original_alone, compiled = original_way(sizes, history, candidate_1C), torch.compile(mirror)
    sides = [
        with_jax,
        with_mirror,
        from_state,
        original_alone,
        lambda _: compiled(*history, *candidate_1C),
        in_bfloat16(with_mirror),
        in_bfloat16(original_alone),
    ]
    with torch.inference_mode():
        in_jax, in_mirror, kept, original, in_compiled, short, original_short = median_milliseconds(
            sides, rounds, clock
        )
    work = f"ms, {sizes.candidates} candidates, {sizes.history} events, {sizes.layers} x {sizes.width}"
    rival = f"the original's way, {CHUNK} at a time"
    return [
        Result(f"{work}, mirror", "JAX", in_mirror, in_jax, in_jax / in_mirror, bars / 1.5),
        Result(f"{work}, JAX", "mirror", in_jax, in_mirror, in_mirror / in_jax, bars / 1.5),
        Result(f"{work}, mirror", rival, in_mirror, original, original / in_mirror, 3.0 * bars),
        Result(f"{work}, mirror, state kept", rival, kept, original, original / kept, 0.0),
        Result(f"{work}, mirror, torch.compile", rival, in_compiled, original, original / in_compiled, 0.0),
        Result(f"{work}, mirror, bfloat16", f"{rival}, bfloat16", short, original_short, original_short / short, 0.0),
    ]


def in_bfloat16(side: Callable[[int], torch.Tensor]) -> Callable[[int], torch.Tensor]:
    """The side under autocast."""

    def run(turn: int) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return side(turn)

    return run


def original_way(
    sizes: Sizes, history: Sequence[torch.Tensor], candidate_1C: Sequence[torch.Tensor]
) -> Callable[[int], torch.Tensor]:
    """Scores by the original's ranker: each chunk of candidates in one sequence with the user and the history."""
    shape = torch_rival.Shape(
        layers=sizes.layers,
        width=sizes.width,
        heads=8,
        hidden=2 * sizes.width,
        users=VOCABULARY.users,
        items=VOCABULARY.items,
        categories=VOCABULARY.categories,
        positions=max(CHUNK, sizes.history),
        genders=VOCABULARY.genders,
        ages=VOCABULARY.ages,
    )
    ranker = torch_rival.Ranker(shape).eval()
    user, gender, age, item_1T = history[:4]
    chunks = [
        torch_rival.Inputs(user, item_1T, item_1C, gender, age, category_1C)
        for item_1C, category_1C in zip(*(x.split(CHUNK, dim=1) for x in candidate_1C), strict=True)
    ]
    return lambda _: torch.cat([ranker(chunk) for chunk in chunks], dim=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    options = timed_parser("Scoring candidates in JAX, in the PyTorch mirror, and in the original's way.")
    options.set_defaults(rounds=7)
    chosen = options.parse_args(arguments)
    sizes, rounds = (QUICK, 3) if chosen.quick else (FULL, chosen.rounds)
    clock = start_clock(wall=chosen.wall)
    report(scoring(sizes, rounds, clock, not chosen.quick), chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
