"""A training step of the recipe for sequences, with additive attention and with softmax attention, as timelines get longer.

    python experiments/benchmarks/attention.py [--json FILE] [--quick] [--rounds N] [--wall]

Both sides take the recipe of `configs/sequences.py` and differ in `encoder.attention` alone: each step reads the same 4,096 events, in
timelines of 64, 512 and 2,048, and scores all 4,000 items of the catalogue after each. That loss costs the same on both sides, and the
more the larger the catalogue is.

Bar: half the time at 2,048 events.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from harness import Result, Step, median_milliseconds, report, start_clock, timed_parser
from timelines import ACTIONS, AGES, CATEGORIES, GENDERS, SyntheticBatches, training_step

from tenrec_jax.config import from_mapping
from tenrec_jax.data.batches import TimelineBatches
from tenrec_jax.data.sampling import UniformItems, WholeCatalogue
from tenrec_jax.models.features import Vocabulary
from tenrec_jax.training.optimizers import make_optimizer
from tenrec_jax.training.tasks import RetrievalTask

RECIPE = Path(__file__).parents[1] / "configs" / "sequences.py"
FULL, QUICK = (4096, (64, 512, 2048), 4_000), (256, (16, 128), 300)
BAR = 2.0


def retrieval_step(attention: str, shape: tuple[int, int], items: int) -> Step:
    """A training step of the recipe with this attention, on so many timelines of so many events."""
    recipe: Any = runpy.run_path(str(RECIPE))["get_config"]()
    with recipe.unlocked():
        recipe.retrieval.model.encoder.attention = attention
        recipe.retrieval.model.features.max_length = shape[1]
    config = from_mapping(recipe.to_dict()).retrieval
    every_item = UniformItems(np.arange(1, items, dtype=np.int32), items)
    task = RetrievalTask(
        config.model,
        Vocabulary(users=1_000, items=items, genders=GENDERS, ages=AGES, categories=CATEGORIES, actions=ACTIONS),
        batches=cast(TimelineBatches, SyntheticBatches(shape, items, 1_000, min(items // 2, shape[0] * shape[1] // 2))),
        negatives=WholeCatalogue(every_item),
        in_batch=every_item,
        category=np.ones(items, np.int32),
        hashed={},
        log_q=config.log_q,
        label_smoothing=config.label_smoothing,
        item_start=None,
        evaluate=lambda _: (0.0, {}),
    )
    train = config.train
    return training_step(task, make_optimizer(train.optimizer, 1_000, task.tables, train.average_decay))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    options = timed_parser("A training step of the recipe for sequences with additive and with softmax attention.")
    options.set_defaults(rounds=5)
    chosen = options.parse_args(arguments)
    events, lengths, items = QUICK if chosen.quick else FULL
    rounds, clock = 2 if chosen.quick else chosen.rounds, start_clock(wall=chosen.wall)
    results = []
    for length in lengths:
        sides = [retrieval_step(attention, (events // length, length), items) for attention in ("additive", "softmax")]
        ours, theirs = median_milliseconds(sides, rounds, clock)
        bar = BAR if not chosen.quick and length == max(lengths) else 0.0
        work = f"ms, step of {events:,} events, timelines of {length:,}"
        results.append(Result(work, "softmax attention", ours, theirs, theirs / ours, bar))
    report(results, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
