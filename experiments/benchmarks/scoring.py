"""Serving: scoring candidates from a user state, and appending an event to it.

    python experiments/benchmarks/scoring.py [--json FILE] [--quick] [--rounds N] [--wall]

All sides are the library's own ranker, 12 layers x 512, compiled, with the same weights. Where two sides compute the same scores, that is
checked before anything is timed. "Alone" encodes the user, the history and one candidate for every candidate, in batches; "joint" lets all
tokens pool over all tokens, which costs least for one list of candidates but makes their scores depend on each other.

Bars: 500 candidates 30 times faster than each alone, and at most 1.15 times the joint encoding; one event appended to 1,000 of them 20
times faster than reading all again, and 5 times with 100 candidates scored after it.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from harness import Clock, Result, Step, median_milliseconds, report, start_clock, timed_parser

from tenrec_jax.models.blocks import EncoderConfig
from tenrec_jax.models.fastformer import FastformerEncoder
from tenrec_jax.models.features import FeatureConfig, Vocabulary, event_tokens
from tenrec_jax.models.ranker import Ranker, RankerConfig, UserState
from tenrec_jax.timeline import Events, Profile

ITEMS, CATEGORIES, ACTIONS = 10_000, 100, 4


class Sizes(NamedTuple):
    """Of the encoder; candidates and history to score; candidates of a batch of users where each is alone; history to append to, and
    candidates scored afterwards."""

    layers: int
    width: int
    candidates: int
    history: int
    alone: int
    long_history: int
    few_candidates: int


FULL = Sizes(12, 512, 500, 64, 25, 1_000, 100)
QUICK = Sizes(2, 32, 20, 8, 10, 30, 5)


class Ways:
    """The ways to score, each a compiled function of a user's events and candidates."""

    def __init__(self, sizes: Sizes) -> None:
        encoder = EncoderConfig(sizes.layers, sizes.width, 8, 2 * sizes.width)
        vocabulary = Vocabulary(users=1_000, items=ITEMS, genders=3, ages=10, categories=CATEGORIES, actions=ACTIONS)
        ranker = Ranker(RankerConfig(FeatureConfig(), encoder), vocabulary, rngs=nnx.Rngs(0))
        # Zero before training, which would make all scores equal.
        kernel = cast(nnx.Linear, ranker.head).kernel
        kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape)
        graphdef, parameters = nnx.split(ranker)

        def compiled(way: Any) -> Any:
            function = jax.jit(lambda parameters, *inputs: way(nnx.merge(graphdef, parameters), *inputs))
            return lambda *inputs: jax.block_until_ready(function(parameters, *inputs))

        self.encode = compiled(_encode)
        self.extend = compiled(lambda ranker, state, events: ranker.extend(state, events))
        self.score = compiled(lambda ranker, state, *candidates: ranker.score(state, *candidates))
        self.isolated = compiled(lambda ranker, log, *candidates: ranker.score_after(*log, *candidates))
        self.extend_and_score = compiled(
            lambda ranker, state, events, *candidates: ranker.score(ranker.extend(state, events), *candidates)
        )
        self.joint = compiled(_joint)
        self._alone, self._together = self.isolated, sizes.alone

    def alone(self, log: tuple[Profile, Events], item_1C: np.ndarray, category_1C: np.ndarray) -> np.ndarray:
        """Each candidate with its context, as if there were no other, many of them in a batch."""
        together = self._together
        repeated = jax.tree.map(lambda x: np.repeat(x, together, axis=0), log)
        columns = item_1C.reshape(-1, together, 1), category_1C.reshape(-1, together, 1)
        return np.concatenate([self._alone(repeated, *column)[:, 0] for column in zip(*columns, strict=True)])


def _encode(ranker: Ranker, profile: Profile, events: Events) -> UserState:
    return ranker.extend(ranker.start(profile), events)


def _joint(ranker: Ranker, log: tuple[Profile, Events], item_BC: jax.Array, category_BC: jax.Array) -> jax.Array:
    profile, events = log
    place_BT = jnp.broadcast_to(jnp.arange(events.item.shape[1]), events.item.shape)
    event_BTD = event_tokens(ranker.items, ranker.events, events, place_BT)
    target_BCD = ranker.events.candidates(ranker.items(item_BC, category_BC), jnp.zeros_like(item_BC))
    x_BTD = jnp.concatenate([ranker.users(profile)[:, None], event_BTD, target_BCD], axis=1)
    encoded_BTD = cast(FastformerEncoder, ranker.encoder).joint(x_BTD, jnp.ones(x_BTD.shape[:2], bool))
    return ranker.head(ranker.output_norm(encoded_BTD[:, -item_BC.shape[1] :])) + ranker.item_bias(item_BC)


def user_log(events: int) -> tuple[Profile, Events]:
    """One user with some events."""
    random = np.random.default_rng(events)
    item_1T, category_1T = candidates(events)
    action_1TA = (random.random((1, events, ACTIONS)) < 0.2).astype(np.int8)
    one_1 = np.ones(1, np.int32)
    return Profile(one_1, one_1, one_1), Events(item_1T, category_1T, action_1TA, np.ones((1, events), bool))


def candidates(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Items and their categories, [1, C] each."""
    random = np.random.default_rng(number)
    item_1C = random.integers(1, ITEMS, (1, number), dtype=np.int32)
    return item_1C, random.integers(1, CATEGORIES, (1, number), dtype=np.int32)


def scoring(ways: Ways, sizes: Sizes, rounds: int, clock: Clock, bars: bool) -> list[Result]:
    """One list of candidates from a user's log."""
    log, listed = user_log(sizes.history), candidates(sizes.candidates)
    _check_equal(ways.isolated(log, *listed)[0], ways.alone(log, *listed))
    # The rival that takes a minute is measured less often, and in turns with ours all the same.
    mine, alone = median_milliseconds(
        [lambda _: ways.isolated(log, *listed), lambda _: ways.alone(log, *listed)], 1 + rounds // 3, clock
    )
    sides: list[Step] = [lambda _: ways.isolated(log, *listed), lambda _: ways.joint(log, *listed)]
    again, joint = median_milliseconds(sides, 3 * rounds, clock)
    work = f"ms, {sizes.candidates} candidates, {sizes.history} events, {sizes.layers} x {sizes.width}"
    return [
        Result(work, "each alone, batched", mine, alone, alone / mine, 30.0 * bars),
        Result(f"{work} (at most 1.15x)", "joint, the same tokens", again, joint, joint / again, bars / 1.15),
    ]


def appending(ways: Ways, sizes: Sizes, rounds: int, clock: Clock, bars: bool) -> list[Result]:
    """One event more, of a user with many."""
    profile, events = user_log(sizes.long_history)
    before, last = (Events(*(x[:, part] for x in events)) for part in (slice(None, -1), slice(-1, None)))
    state, listed = ways.encode(profile, before), candidates(sizes.few_candidates)
    _check_equal(ways.extend_and_score(state, last, *listed), ways.isolated((profile, events), *listed))
    mine, again, mine_scored, again_scored = median_milliseconds(
        [
            lambda _: ways.extend(state, last),
            lambda _: ways.encode(profile, events),
            lambda _: ways.extend_and_score(state, last, *listed),
            lambda _: ways.isolated((profile, events), *listed),
        ],
        rounds,
        clock,
    )
    work = f"ms, one event after {sizes.long_history - 1:,}, {sizes.layers} x {sizes.width}"
    rival = "encoding all again"
    return [
        Result(work, rival, mine, again, again / mine, 20.0 * bars),
        Result(
            f"{work}, {sizes.few_candidates} scored",
            rival,
            mine_scored,
            again_scored,
            again_scored / mine_scored,
            5.0 * bars,
        ),
    ]


def _check_equal(ours: jax.Array, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    options = timed_parser("Scoring candidates from a user state, and appending an event to it.")
    options.set_defaults(rounds=7)
    chosen = options.parse_args(arguments)
    sizes, rounds = (QUICK, 3) if chosen.quick else (FULL, chosen.rounds)
    clock = start_clock(wall=chosen.wall)
    ways, bars = Ways(sizes), not chosen.quick
    report([*scoring(ways, sizes, rounds, clock, bars), *appending(ways, sizes, rounds, clock, bars)], chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
