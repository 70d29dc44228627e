"""Serving: latency and throughput over HTTP, memory, a swap of versions under load, and users with long histories.

    python experiments/benchmarks/serving.py [--json FILE] [--quick] [--only latency batching ...] [--requests N]

The server is `tenrec-jax serve` in a process of its own; the recommender has random weights: a catalogue of 100,000 items behind a ScaNN
index, and a ranker of 4 layers x 128 that scores 200 candidates. The load comes over the loopback from this machine and takes its share of
the cores.

Bars: at 20 requests a second the 99th percentile within 150 ms, no error, and memory that grows by less than 5 %; micro-batches twice the
throughput of one by one, each at its best with a 99th percentile within 150 ms; no error while the version is swapped, and every answer of
one version; observing and recommending for a user of 5,000 events at most 1.2 times as long as for one of 5; ready within 20 seconds; the
page shows a list within 1 second (chromium and chromedriver).
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from harness import Result, parser, report
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait
from serving_load import Load, Server, at_rate, in_turns, started

from tenrec_jax import artifact
from tenrec_jax.artifact import Catalogue, Identity
from tenrec_jax.config import ServingConfig
from tenrec_jax.models.blocks import EncoderConfig
from tenrec_jax.models.features import FeatureConfig, Vocabulary
from tenrec_jax.models.ranker import Ranker, RankerConfig
from tenrec_jax.models.two_tower import TwoTower, TwoTowerConfig
from tenrec_jax.retrieval.index import IndexConfig, build_index

ACTIONS = ("click", "like", "share", "follow")
P99, RATE, GROWTH, BATCHING, LONG, COLD, SHOWN = 150.0, 20.0, 0.05, 2.0, 1.2, 20.0, 1.0
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
SHIFT = 10**9  # between the raw ids of the two versions, so that every item tells its version
WORKS = ("latency", "batching", "swap", "long", "page")


class Sizes(NamedTuple):
    """Catalogue, users and events of most of them; the ranker; candidates; requests at the fixed rate, of a swap, and of each number of
    clients; events of the long history, and rounds of it."""

    items: int
    users: int
    events: int
    layers: int
    width: int
    candidates: int
    requests: int
    swapped: int
    batched: int
    long: int
    rounds: int


FULL = Sizes(100_000, 1_000, 50, 4, 128, 200, 5_000, 1_000, 600, 5_000, 60)
QUICK = Sizes(6_000, 50, 20, 1, 32, 50, 200, 200, 100, 500, 10)
LONG_USER, SHORT_USER, SHORT = 1, 2, 5
VISITS = 9


def write_recommender(folder: Path, sizes: Sizes, *, seed: int, shift: int = 0) -> Path:
    """A recommender with random weights; raw ids of items are dense ids plus `shift`."""
    random, dense = np.random.default_rng(seed), np.arange(sizes.items + 1)
    vocabulary = Vocabulary(sizes.users + 1, sizes.items + 1, genders=3, ages=8, categories=100, actions=len(ACTIONS))
    encoder = EncoderConfig(sizes.layers, sizes.width, 4, 2 * sizes.width)
    retrieval = TwoTower(TwoTowerConfig(FeatureConfig(), EncoderConfig(1, 64, 4, 128)), vocabulary, rngs=nnx.Rngs(seed))
    ranking = RankerConfig(FeatureConfig(), encoder)
    ranker = Ranker(ranking, vocabulary, rngs=nnx.Rngs(seed))
    # Zero before training, which would make all scores equal.
    kernel = cast(nnx.Linear, ranker.head).kernel
    kernel[...] = jax.random.normal(jax.random.key(seed), kernel.shape)
    folder.mkdir(parents=True)
    artifact.save_weights(folder / artifact.RETRIEVAL_WEIGHTS, nnx.state(retrieval))
    artifact.save_weights(folder / artifact.RANKING_WEIGHTS, nnx.state(ranker))
    lengths = np.full(sizes.users + 1, sizes.events)
    lengths[[0, LONG_USER, SHORT_USER]] = 0, sizes.long, SHORT
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    category = random.integers(1, 100, sizes.items + 1, dtype=np.int32)
    catalogue = Catalogue(
        user_id=np.arange(sizes.users + 1),
        gender=np.ones(sizes.users + 1, np.int32),
        age=np.ones(sizes.users + 1, np.int32),
        trained_user=np.arange(sizes.users + 1, dtype=np.int32),
        item_id=dense + shift,
        category=category,
        trained_item=dense.astype(np.int32),
        item=random.integers(1, sizes.items + 1, offsets[-1], dtype=np.int32),
        action=(random.random((offsets[-1], len(ACTIONS))) < 0.3).astype(np.int8),
        offsets=offsets,
    )
    vectors_ND = np.asarray(retrieval.item_vectors(jnp.asarray(dense[1:], jnp.int32), jnp.asarray(category[1:])))
    build_index(vectors_ND, dense[1:], IndexConfig("scann")).save(folder / artifact.INDEX)
    configs = retrieval.config, ranking
    artifact.seal(
        folder,
        Identity("custom", ACTIONS, (), "0" * 64, vocabulary, *configs),
        catalogue,
        ServingConfig(sizes.candidates),
    )
    return folder


def bodies(sizes: Sizes, number: int) -> list[dict[str, Any]]:
    """Requests for users in turn, of which half are of the log and half bring a history."""
    random = np.random.default_rng(1)
    histories = random.integers(1, sizes.items, (sizes.users, 10)).tolist()
    asked = [{"user_id": user} if user % 2 else {"history": histories[user - 1]} for user in range(1, sizes.users + 1)]
    return list(islice(cycle(asked), number))


def latency(server: Server, sizes: Sizes, bar: bool) -> list[Result]:
    """A fixed rate; memory is compared from when all users have been asked for."""
    in_turns(server.port, bodies(sizes, sizes.users), 1)
    before = server.resident_mib
    load = at_rate(server.port, bodies(sizes, sizes.requests), RATE)
    after = server.resident_mib
    _refuse_errors(load)
    work = f"ms, p99 of {sizes.requests:,} requests at {RATE:g}/s"
    growth = f"MiB after {sizes.requests:,} requests (at most {1 + GROWTH:g}x)"
    return [
        Result(work, f"bar of {P99:g} ms", load.p99, P99, P99 / load.p99, 1.0 * bar),
        Result(f"ms, median of {sizes.requests:,} requests at {RATE:g}/s", "", median(load.milliseconds), 0, 0, 0),
        Result(growth, "before them", after, before, before / after, bar / (1 + GROWTH)),
    ]


class Best(NamedTuple):
    """The most answers a second with a 99th percentile within the bar, the clients that it took, and, with the most clients, the
    milliseconds of processor time that the server takes for an answer, which a busy neighbour does not change."""

    per_second: float
    clients: int
    cpu_milliseconds: float


def best(server: Server, sizes: Sizes) -> Best:
    """Ask with more and more clients."""
    in_turns(server.port, bodies(sizes, 2 * CLIENTS[-1]), CLIENTS[-1])
    found, cpu = (0.0, 0), 0.0
    for clients in CLIENTS:
        before = server.cpu_seconds
        load = in_turns(server.port, bodies(sizes, sizes.batched), clients)
        cpu = 1e3 * (server.cpu_seconds - before) / sizes.batched
        _refuse_errors(load)
        print(f"  {clients:>3} clients: {load.per_second:7.1f}/s, p99 {load.p99:7.1f} ms, CPU {cpu:6.2f} ms an answer")
        if load.p99 <= P99:
            found = max(found, (load.per_second, clients))
    return Best(*found, cpu)


def swap(server: Server, link: Path, following: Path, sizes: Sizes, bar: bool) -> list[Result]:
    """The link is turned while requests come in; an item's id tells its version."""
    first = server.get("/version")["recommender"]

    def turn(place: int) -> None:
        if place == sizes.swapped // 10:
            link.with_name("next").symlink_to(following)
            link.with_name("next").rename(link)

    # Without histories, whose ids only one version knows.
    asked = [{"user_id": 1 + place % sizes.users} for place in range(sizes.swapped)]
    load = at_rate(server.port, asked, RATE, keep=True, each=turn)
    end = time.perf_counter() + 60
    while server.get("/version")["recommender"] == first and time.perf_counter() < end:
        time.sleep(0.1)
    versions = {answer["version"] for answer in load.answers}
    mixed = [
        answer
        for answer in load.answers
        if {item["item_id"] >= SHIFT for item in answer["items"]} != {answer["version"] != first}
    ]
    wrong = len(load.errors) + len(mixed)
    print(
        f"  versions that answered: {len(versions)}; errors {len(load.errors)}, answers of mixed versions {len(mixed)}"
    )
    print(f"  p99 in the meantime {load.p99:.1f} ms, longest {max(load.milliseconds):.1f} ms")
    met = float(wrong == 0 and server.get("/version")["recommender"] != first)
    return [Result(f"answers of {sizes.swapped:,} lost or mixed in a swap", "none", wrong, 0, met, 1.0 * bar)]


def long_history(server: Server, sizes: Sizes, bar: bool) -> list[Result]:
    """Turns of observing an event and recommending, for two users."""
    times: dict[int, list[float]] = {LONG_USER: [], SHORT_USER: []}
    for turn in range(sizes.rounds + 2):
        for user, taken in times.items():
            began = time.perf_counter()
            server.post("/v1/observe", {"user_id": user, "events": [{"item_id": SHIFT + 1 + turn % 3}]})
            server.post("/v1/recommend", {"user_id": user})
            taken.append(1e3 * (time.perf_counter() - began))
    long, short = (median(taken[2:]) for taken in times.values())
    work = f"ms, observe and recommend, {sizes.long:,} events (at most {LONG:g}x)"
    return [Result(work, f"{SHORT} events", long, short, short / long, bar / LONG)]


def page(server: Server, bar: bool) -> list[Result]:
    """From the start of the navigation to the first list on the page, in a headless browser whose cache is empty."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    driver, seconds = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))), []
    try:
        for visit in range(VISITS):
            driver.get(f"http://127.0.0.1:{server.port}/#user={1 + visit}")
            driver.refresh()  # what follows the hash alone is no navigation
            WebDriverWait(driver, 30, poll_frequency=0.005).until(lambda d: d.find_elements("css selector", ".item"))
            seconds.append(driver.execute_script("return performance.now() / 1000"))
    finally:
        driver.quit()
    work = f"s until the page shows a list, median of {VISITS} visits (at most {SHOWN:g})"
    return [Result(work, "", median(seconds), SHOWN, SHOWN / median(seconds), 1.0 * bar)]


def _refuse_errors(load: Load) -> None:
    if load.errors:
        raise RuntimeError(f"{len(load.errors)} requests failed, with the statuses {sorted(set(load.errors))}")


def measured(folder: Path, sizes: Sizes, works: Sequence[str], port: int, bar: bool) -> list[Result]:
    """All that was asked for, on servers that are started one after the other."""
    first = write_recommender(folder / "first", sizes, seed=0)
    results, link = [], folder / "current"
    link.symlink_to(first)
    with started(link, port, "--watch_seconds=0.5") as server:
        seconds = server.cold_start_seconds
        results.append(
            Result(f"s, from the start until ready (at most {COLD:g})", "", seconds, COLD, COLD / seconds, 1.0 * bar)
        )
        if "page" in works:
            results += page(server, bar)
        if "latency" in works:
            results += latency(server, sizes, bar)
        if "batching" in works:
            print("micro-batches")
            together = best(server, sizes)
        if "swap" in works or "long" in works:
            results += swap(server, link, write_recommender(folder / "second", sizes, seed=1, shift=SHIFT), sizes, bar)
            results += long_history(server, sizes, bar)
    if "batching" in works:
        with started(first, port, "--max_batch=1") as server:
            print("one by one")
            alone = best(server, sizes)
        work = f"answers/s with p99 within {P99:g} ms, {together.clients} clients"
        ratio = together.per_second / alone.per_second
        rival = f"one by one, {alone.clients} clients"
        results.append(Result(work, rival, together.per_second, alone.per_second, ratio, BATCHING * bar))
        costs = together.cpu_milliseconds, alone.cpu_milliseconds
        work = f"ms of the server's CPU an answer, {CLIENTS[-1]} clients"
        results.append(Result(work, "one by one", *costs, costs[1] / costs[0], 0))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    options = parser("Serving over HTTP.")
    options.add_argument("--only", nargs="+", choices=WORKS, default=WORKS, help="what to measure (default: all)")
    options.add_argument("--requests", type=int, help="at the fixed rate (default: as many as the bar asks for)")
    options.add_argument("--port", type=int, default=8099, help="that is free (default: %(default)s)")
    chosen = options.parse_args(arguments)
    sizes = QUICK if chosen.quick else FULL
    if chosen.requests:
        sizes = sizes._replace(requests=chosen.requests)
    folder = Path(tempfile.mkdtemp(prefix="serving_"))
    try:
        report(measured(folder, sizes, chosen.only, chosen.port, not chosen.quick), chosen.json)
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
