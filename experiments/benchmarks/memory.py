"""What long timelines, deep encoders and divided tables cost: time by length, memory under rematerialisation, in micro-batches and on each
of several devices, compile time by depth.

    python experiments/benchmarks/memory.py [--json FILE] [--quick] [--rounds N] [--wall] [--only PART]

length             Forward and backward pass over one timeline of 4,096 events against 512. Beside it the same for causal softmax attention
                   with the same feed-forward, one token an event, which has no bar.
rematerialisation  Temporary memory of the compiled gradient (`memory_analysis`) of 12 layers x 512 over 64 timelines of 512 events, and its
                   FLOPs (`cost_analysis`, which counts the body of a loop once: a ratio of two programs with the same loops). Nothing of
                   that size is run; the time is that of a smaller batch.
micro_batches      Temporary memory of the ranker's compiled training step, its batch taken whole and in 8 micro-batches.
depth              Lowering and compiling the gradient with 24 layers against 4.
unrolling          The gradient and its compilation with layers unrolled (`EncoderConfig.unroll`) and in a loop, by depth.
devices            Memory on each of 1, 2 and 4 devices of a host (virtual ones, in a process of its own) of a ranker's tables and what lazy
                   Adam keeps of them, from the arrays after a step, and what the compiled step takes on a device (`memory_analysis`):
                   with the rows of the tables divided over the devices against all rows on each.

Bars: 8 times the length costs at most 9 times; full rematerialisation takes at most 1/6 of the memory and 1.3 times the FLOPs, and
"dots_saveable" 1/3 at no more time; 8 micro-batches take at most 1/5 of the memory; 24 layers compile in at most 1.3 times the time of 4;
of divided tables n devices hold at most 1.02 / n each.
"""

import collections
import dataclasses
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from harness import Clock, Result, Step, median_milliseconds, report, start_clock, timed_parser
from timelines import SyntheticBatches, ranking_task

from tenrec_jax.config import default_config
from tenrec_jax.models.blocks import Encoder, EncoderConfig, places_of
from tenrec_jax.models.encoders import make_encoder
from tenrec_jax.parameters import named
from tenrec_jax.plan import EXAMPLE_VOCABULARY
from tenrec_jax.step_costs import Program, step_cost
from tenrec_jax.training.optimizers import OptimizerConfig, make_optimizer
from tenrec_jax.training.parallel import DataParallel
from tenrec_jax.training.tables import TableOptimizerConfig
from tenrec_jax.training.trainer import compile_step

HOW: tuple[Literal["pmap", "shard_map"], ...] = ("pmap", "shard_map")
DEVICES = (1, 2, 4)


class Sizes(NamedTuple):
    """Of the encoder that reads timelines of two lengths; of the one that is rematerialised, with its batch and length, the batch that is
    timed; two depths; the encoder that is unrolled, and its numbers of layers; rows of the tables that are divided."""

    reader: EncoderConfig
    lengths: tuple[int, int]
    deep: EncoderConfig
    batch: int
    length: int
    timed_batch: int
    depths: tuple[int, int]
    unrolled: EncoderConfig
    layers: tuple[int, ...]
    rows: int


FULL = Sizes(
    EncoderConfig(2, 128, 4, 256),
    (512, 4_096),
    EncoderConfig(12, 512, 8, 1_024),
    64,
    512,
    2,
    (4, 24),
    EncoderConfig(2, 128, 4, 256),
    (2, 4, 12, 24),
    100_000,
)
QUICK = Sizes(
    EncoderConfig(1, 32, 2, 64),
    (64, 512),
    EncoderConfig(4, 32, 2, 64),
    4,
    64,
    2,
    (2, 4),
    EncoderConfig(2, 32, 2, 64),
    (2, 4),
    1_000,
)


def timeline(encoder: Encoder, x_BTD: jax.Array) -> jax.Array:
    """Context and target tokens of events, two an event."""
    return encoder.timeline(x_BTD, x_BTD, places_of(jnp.ones(x_BTD.shape[:2], bool)))


def context(encoder: Encoder, x_BTD: jax.Array) -> jax.Array:
    """One token an event."""
    return encoder.context(x_BTD, places_of(jnp.ones(x_BTD.shape[:2], bool)))


def gradient(encode: Callable, config: EncoderConfig) -> tuple[Any, Any]:
    """A compiled function of (parameters, tokens [B, T, D]) that differentiates an encoder, and the shapes of its parameters."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: make(config)))

    def loss(parameters: Any, x_BTD: jax.Array) -> jax.Array:
        return jnp.square(encode(nnx.merge(graphdef, parameters), x_BTD)).mean()

    return jax.jit(jax.value_and_grad(loss)), shapes


def make(config: EncoderConfig) -> Encoder:
    """An encoder for the longest timeline that is measured."""
    return make_encoder(config, FULL.lengths[1], rngs=nnx.Rngs(0))


def pass_over(function: Callable, config: EncoderConfig, batch: int, length: int) -> Step:
    """A forward and backward pass, a function as of `gradient`, over random tokens."""
    parameters = nnx.split(make(config))[1]
    x_BTD = jax.random.normal(jax.random.key(0), (batch, length, config.width))
    return lambda _: jax.block_until_ready(function(parameters, x_BTD))


def length(sizes: Sizes, rounds: int, clock: Clock) -> list[Result]:
    """Time by the length of a timeline."""
    results = []
    short, long = sizes.lengths
    for config, encode, bar in (
        (sizes.reader, timeline, 1 / 9 if sizes is FULL else 0.0),
        (dataclasses.replace(sizes.reader, attention="softmax"), context, 0.0),
    ):
        sides = [pass_over(gradient(encode, config)[0], config, 1, each) for each in (short, long)]
        theirs, ours = median_milliseconds(sides, rounds, clock)
        bound = " (at most 9x)" if encode is timeline else ""
        work = f"ms, {config.attention} attention, {long:,} events, {config.num_layers} x {config.width}{bound}"
        results.append(Result(work, f"itself at {short}", ours, theirs, theirs / ours, bar))
    return results


def rematerialisation(sizes: Sizes, rounds: int, clock: Clock) -> list[Result]:
    """Memory, FLOPs and time with a policy and without."""
    bars = sizes is FULL
    tokens = jax.ShapeDtypeStruct((sizes.batch, sizes.length, sizes.deep.width), jnp.float32)
    mebibytes, flops, sides = [], [], []
    for policy in ("none", "nothing_saveable", "dots_saveable"):
        config = dataclasses.replace(sizes.deep, remat=policy)
        function, parameters = gradient(timeline, config)
        compiled = function.lower(parameters, tokens).compile()
        mebibytes.append(compiled.memory_analysis().temp_size_in_bytes / 2**20)
        flops.append(compiled.cost_analysis()["flops"])
        sides.append(pass_over(function, config, sizes.timed_batch, sizes.length))
    times = median_milliseconds(sides, rounds, clock)
    rival, where = (
        "no rematerialisation",
        f"{sizes.deep.num_layers} x {sizes.deep.width}, {sizes.batch} x {sizes.length} events",
    )
    timed = f"ms, {sizes.deep.num_layers} x {sizes.deep.width}, {sizes.timed_batch} x {sizes.length} events"
    memory = [(mebibytes[i], mebibytes[0], mebibytes[0] / mebibytes[i]) for i in (1, 2)]
    return [
        Result(f"MiB, {where}, nothing_saveable", rival, *memory[0], 6.0 * bars),
        Result("FLOPs of it (at most 1.3x)", rival, flops[1], flops[0], flops[0] / flops[1], bars / 1.3),
        Result(f"{timed}, nothing_saveable", rival, times[1], times[0], times[0] / times[1], 0.0),
        Result(f"MiB, {where}, dots_saveable", rival, *memory[1], 3.0 * bars),
        Result(f"{timed}, dots_saveable", rival, times[2], times[0], times[0] / times[2], 1.0 * bars),
    ]


def depth(sizes: Sizes, rounds: int, clock: Clock) -> list[Result]:
    """Compile time by the number of layers."""
    jax.config.update("jax_enable_compilation_cache", False)

    def compiling(layers: int) -> Step:
        config = dataclasses.replace(sizes.deep, num_layers=layers)
        tokens = jax.ShapeDtypeStruct((8, sizes.length, config.width), jnp.float32)

        def compile_anew(_: int) -> None:
            function, parameters = gradient(timeline, config)
            function.lower(parameters, tokens).compile()

        return compile_anew

    few, many = sizes.depths
    theirs, ours = median_milliseconds([compiling(layers) for layers in (few, many)], rounds, clock)
    work = f"ms to compile, {many} layers (at most 1.3x)"
    return [Result(work, f"{few} layers", ours, theirs, theirs / ours, 1 / 1.3 if sizes is FULL else 0.0)]


def unrolling(sizes: Sizes, rounds: int, clock: Clock) -> list[Result]:
    """Time of the gradient and of its compilation, unrolled and in a loop."""
    jax.config.update("jax_enable_compilation_cache", False)
    results = []
    tokens = jax.ShapeDtypeStruct((sizes.timed_batch, sizes.length, sizes.unrolled.width), jnp.float32)
    for layers in sizes.layers:
        sides, compiling = [], []
        for unroll in (False, True):
            config = dataclasses.replace(sizes.unrolled, num_layers=layers, unroll=unroll)
            function, shapes = gradient(timeline, config)
            began = clock()
            compiled = function.lower(shapes, tokens).compile()
            compiling.append(1e3 * (clock() - began))
            sides.append(pass_over(compiled, config, sizes.timed_batch, sizes.length))
        theirs, ours = median_milliseconds(sides, rounds, clock)
        encoder = f"{layers} x {sizes.unrolled.width}, {sizes.timed_batch} x {sizes.length} events"
        results += [
            Result(f"ms, {encoder}, unrolled", "a loop over layers", ours, theirs, theirs / ours, 0.0),
            Result(
                f"ms to compile it, {layers} layers",
                "the loop",
                compiling[1],
                compiling[0],
                compiling[0] / compiling[1],
                0.0,
            ),
        ]
    return results


def micro_batches(sizes: Sizes, rounds: int, clock: Clock) -> list[Result]:
    """Temporary memory of a whole training step; nothing is run."""
    run = default_config()
    model = dataclasses.replace(
        run.ranking.model,
        encoder=dataclasses.replace(sizes.deep, dropout=0.2),
        features=dataclasses.replace(run.ranking.model.features, max_length=sizes.length),
    )
    stage = dataclasses.replace(run.ranking, model=model, events_per_batch=max(8, sizes.batch) * sizes.length)
    mebibytes = []
    for accumulate in (1, 8):
        train = dataclasses.replace(stage.train, accumulate=accumulate)
        program = Program("ranking", dataclasses.replace(stage, train=train), "none")
        mebibytes.append(step_cost(program, EXAMPLE_VOCABULARY, DataParallel()).temporary_bytes / 2**20)
    whole, parts = mebibytes
    work = f"MiB, step of {sizes.deep.num_layers} x {sizes.deep.width}, {max(8, sizes.batch)} x {sizes.length} events, 8 micro-batches"
    return [Result(work, "the whole batch", parts, whole, whole / parts, 5.0 if sizes is FULL else 0.0)]


class DeviceMemory(NamedTuple):
    """On the fullest device, MiB: the tables and what is kept of them, and all that a compiled step takes."""

    tables: float
    step: float


def device_memory(rows: int) -> dict[tuple[str, int, bool], DeviceMemory]:
    """By how a step runs, the number of devices, and whether the rows are divided. For a fresh process, where it makes the devices."""
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    shape = 8, 32
    task = ranking_task(SyntheticBatches(shape, rows, rows, 100), rows, rows, shape[1], num_layers=1)
    config, batch, key = OptimizerConfig(tables=TableOptimizerConfig("lazy_adam")), task.batch(0), jax.random.key(0)
    parameters = jax.eval_shape(task.init, key)
    found: dict[tuple[str, int, bool], DeviceMemory] = {}
    for how, devices, divide in itertools.product(HOW, DEVICES, (False, True)):
        parallel = DataParallel(jax.devices()[:devices], how)
        optimizer = make_optimizer(config, 1, task.tables, shards=devices if divide else 1)

        # Zeros, where the state is to lie: only its size counts.
        shapes = parallel.shapes(jax.eval_shape(optimizer.init, named(parameters)), optimizer.divided)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)
        state = parallel.replicate(zeros, optimizer.divided)
        arguments = *batch._replace(split=parallel.split(batch.split)), key
        compiled = compile_step(task, optimizer, parallel, like=parameters).lower(state, *arguments).compile()
        memory: Any = compiled.memory_analysis()
        step = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        state, _ = jax.block_until_ready(compiled(state, *arguments))
        held = collections.Counter[jax.Device]()
        for leaf in jax.tree.leaves((state.tables, state.table_states)):
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.nbytes
        found[how, devices, divide] = DeviceMemory(
            max(held.values()) / 2**20, (step - memory.alias_size_in_bytes) / 2**20
        )
    return found


def devices(sizes: Sizes, rounds: int, clock: Clock) -> list[Result]:
    """Memory of tables on each of several devices."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(device_memory, sizes.rows).result()
    results = []
    for how, number in itertools.product(HOW, DEVICES):
        mine, whole = found[how, number, True], found[how, number, False]
        work = f"{how}, {number} devices, 2 x {sizes.rows:,} x 128 rows"
        results += [
            Result(
                f"MiB a device of tables, {work}",
                "all rows on each",
                mine.tables,
                whole.tables,
                whole.tables / mine.tables,
                number / 1.02 if sizes is FULL else 0.0,
            ),
            Result(f"MiB a device of the step, {work}", "the same", mine.step, whole.step, whole.step / mine.step, 0.0),
        ]
    return results


PARTS = {
    "length": length,
    "rematerialisation": rematerialisation,
    "micro_batches": micro_batches,
    "depth": depth,
    "unrolling": unrolling,
    "devices": devices,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    options = timed_parser("Time by length, memory under rematerialisation, and compile time by depth.")
    options.add_argument("--only", choices=PARTS, help="one part alone")
    options.set_defaults(rounds=5)
    chosen = options.parse_args(arguments)
    sizes, rounds = (QUICK, 2) if chosen.quick else (FULL, chosen.rounds)
    clock = start_clock(wall=chosen.wall)
    parts = [PARTS[chosen.only]] if chosen.only else PARTS.values()
    report([result for part in parts for result in part(sizes, rounds, clock)], chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
