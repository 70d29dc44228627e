"""The loop: resume, devices, selection."""

import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from tenrec_jax.config import RunConfig, default_config
from tenrec_jax.data.ingest import ingest
from tenrec_jax.data.neighbours import neighbour_item_vectors
from tenrec_jax.data.protocols import Part
from tenrec_jax.data.schema import KINDS
from tenrec_jax.data.spectral import spectral_item_vectors
from tenrec_jax.data.synthetic import write_twin
from tenrec_jax.evaluation.id_model import id_effects
from tenrec_jax.models.blocks import EncoderConfig
from tenrec_jax.models.compiled import probabilities_after
from tenrec_jax.models.features import FeatureConfig
from tenrec_jax.models.heads import HeadsConfig
from tenrec_jax.parameters import assembled, named
from tenrec_jax.run_data import RunData
from tenrec_jax.stages import METRICS
from tenrec_jax.timeline import Events, Profile
from tenrec_jax.training.id_spaces import TABLES
from tenrec_jax.training.loop_clock import LoopClock, peak_memory
from tenrec_jax.training.metrics_writer import TIMINGS, read_lines
from tenrec_jax.training.optimizers import Optimizer, OptimizerConfig, learning_rate_schedule, make_optimizer
from tenrec_jax.training.parallel import AXIS, DataParallel
from tenrec_jax.training.tables import TableOptimizerConfig
from tenrec_jax.training.trainer import Batch, FitResult, Task, TrainConfig, compile_step, fit


@pytest.fixture(scope="module")
def table_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    write_twin(folder / "twin.csv", kind="qb_video", rows=1500, seed=0, progress=False)
    ingest([folder / "twin.csv"], "qb_video", folder / "table", progress=False)
    return folder / "table"


@pytest.fixture(scope="module")
def many_users_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty users of one to twelve rows each."""
    folder, generator = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    lines = [
        f"{user},{generator.integers(1, 40)},{','.join(map(str, generator.integers(0, 2, 4)))},1,0,1,4"
        for user in range(1, 61)
        for _ in range(generator.integers(1, 13))
    ]
    (folder / "log.csv").write_text("\n".join([",".join(KINDS["qb_video"].header), *lines]) + "\n")
    ingest([folder / "log.csv"], "qb_video", folder / "table", progress=False)
    return folder / "table"


def tiny_config() -> RunConfig:
    encoder = EncoderConfig(num_layers=1, width=8, num_heads=2, hidden=8, recency_bias=True, dropout=0.1)
    features = FeatureConfig(max_length=32, dropout=0.1)
    config = default_config()
    retrieval, ranking = config.retrieval, config.ranking
    return dataclasses.replace(
        config,
        retrieval=dataclasses.replace(
            retrieval,
            model=dataclasses.replace(retrieval.model, features=features, encoder=encoder),
            events_per_batch=512,
            negatives=16,
        ),
        ranking=dataclasses.replace(
            ranking, model=dataclasses.replace(ranking.model, features=features, encoder=encoder), events_per_batch=512
        ),
    )


def make_task(stage: str, data: RunData, values: list[float]) -> Task:
    """A stage whose selection metric follows a script."""
    remaining = iter(values)

    def evaluate(parameters: object) -> tuple[float, dict[str, float]]:
        value = next(remaining)
        return value, {"scripted": value}

    return data.retrieval_task(evaluate) if stage == "retrieval" else data.ranking_task(evaluate)


def run(
    stage: str,
    table_folder: Path,
    workdir: Path,
    *,
    epochs: int,
    parallel: DataParallel | None = None,
    killed_at: int | None = None,
    **options: Any,
) -> FitResult:
    workdir.mkdir(exist_ok=True)
    parallel = parallel or DataParallel(jax.local_devices()[:1])
    data = RunData(tiny_config(), table_folder, devices=parallel.size)
    task = make_task(stage, data, [])
    task.evaluate = evaluate_by_size
    if killed_at is not None:
        kill_when_asked_for_the_batch_of(killed_at, task)
    optimizer = OptimizerConfig(learning_rate=0.01, schedule="constant")
    config = TrainConfig(epochs=epochs, optimizer=optimizer, **options)
    return fit(task, config, workdir=workdir, seed=0, parallel=parallel)


def evaluate_by_size(parameters: nnx.State) -> tuple[float, dict[str, float]]:
    value = float(optax.tree.norm(parameters))
    return value, {"size": value}


def kill_when_asked_for_the_batch_of(killed_at: int, task: Task) -> None:
    batch = task.batch

    def batch_or_death(step: int, *process: int) -> Batch:
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(step, *process)

    task.batch = batch_or_death


def assert_equal_trees(a: object, b: object, **tolerance: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["retrieval", "ranking"])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(stage: str, table_folder: Path, tmp_path: Path) -> None:
    whole = run(stage, table_folder, tmp_path / "whole", epochs=4)
    run(stage, table_folder, tmp_path / "parts", epochs=2)
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:  # work that a kill cut off, and a torn line
        file.write(json.dumps({"stage": stage, "step": 10**6, "loss": 0.0}) + '\n{"stage": "ran')
    resumed = run(stage, table_folder, tmp_path / "parts", epochs=4)
    assert resumed.best_step == whole.best_step
    assert_equal_trees(resumed.parameters, whole.parameters, rtol=0, atol=0)
    assert (tmp_path / "parts" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()


@pytest.mark.slow
def test_a_run_killed_within_a_window_leaves_the_same_metrics(table_folder: Path, tmp_path: Path) -> None:
    """Four evaluations, 24 steps apart; windows also end at every 20th step, and the kill comes between two of those."""
    arguments = {"epochs": 32, "evaluate_every": 8}
    context = multiprocessing.get_context("spawn")
    killed = context.Process(
        target=run, args=("ranking", table_folder, tmp_path / "killed"), kwargs=arguments | {"killed_at": 70}
    )
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    before = read_lines(tmp_path / "killed" / METRICS)
    assert before[-1]["step"] == 60
    run("ranking", table_folder, tmp_path / "killed", **arguments)
    run("ranking", table_folder, tmp_path / "whole", **arguments)
    after = read_lines(tmp_path / "whole" / METRICS)
    assert [line["step"] for line in after if "loss" in line] == [20, 24, 40, 48, 60, 72, 80, 96]
    assert [line["step"] for line in after if "size" in line] == [24, 48, 72, 96]
    assert (tmp_path / "killed" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
    assert before == after[: len(before)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_a_run_with_divided_tables_resumes_bit_identically_and_is_read_on_other_devices(
    how: str, table_folder: Path, tmp_path: Path
) -> None:
    options = {"table_placement": "row_sharded", "average_decay": 0.9}
    four = DataParallel(jax.local_devices()[:4], how)
    whole = run("retrieval", table_folder, tmp_path / "whole", epochs=4, parallel=four, **options)
    half = run("retrieval", table_folder, tmp_path / "parts", epochs=2, parallel=four, **options)
    rows = {len(leaf) for name, leaf in named(half.parameters).items() if name in TABLES}
    assert any(number % 4 for number in rows)
    for other in (DataParallel(jax.local_devices()[:3], how), DataParallel(jax.local_devices()[:1], how)):
        read = run("retrieval", table_folder, tmp_path / "parts", epochs=2, parallel=other, **options)
        assert read.steps == half.steps
        assert_equal_trees(read.parameters, half.parameters, rtol=0, atol=0)
    resumed = run("retrieval", table_folder, tmp_path / "parts", epochs=4, parallel=four, **options)
    assert_equal_trees(resumed.parameters, whole.parameters, rtol=0, atol=0)
    assert (tmp_path / "parts" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
    # On two devices after four: the same training but for the order of sums.
    two = DataParallel(jax.local_devices()[:2], how)
    more = run("retrieval", table_folder, tmp_path / "parts", epochs=6, parallel=two, **options)
    assert more.steps == 6 * (whole.steps // 4)


def test_the_best_evaluation_is_returned_and_patience_stops(table_folder: Path, tmp_path: Path) -> None:
    data = RunData(tiny_config(), table_folder, devices=1)
    task = make_task("ranking", data, [0.1, 0.5, 0.5, 0.2, 0.9])  # an equal one is no new best
    config = TrainConfig(epochs=5, patience=2)
    result = fit(task, config, workdir=tmp_path, seed=0, parallel=DataParallel(jax.local_devices()[:1]))
    assert result.best_step == 2 * task.steps_per_epoch
    assert result.steps == 4 * task.steps_per_epoch
    task = make_task("ranking", data, [0.2])  # the last checkpoint's, which comes again
    again = fit(task, config, workdir=tmp_path, seed=0, parallel=DataParallel(jax.local_devices()[:1]))
    assert_equal_trees(again.parameters, result.parameters, rtol=0, atol=0)
    assert again.steps == result.steps


def test_the_ranker_starts_at_the_smoothed_rates(table_folder: Path) -> None:
    data = RunData(tiny_config(), table_folder, devices=1)
    task = make_task("ranking", data, [])
    probability_RA = data.ranking_evaluator(Part.VALIDATION).run(task.graphdef, task.init(jax.random.key(0)))
    rows, table = data.split.rows(Part.VALIDATION), data.table
    train = data.split.rows(Part.TRAIN)
    clicks, total = table.labels_RA[train, 0].sum(), len(train)
    for row in rows[::25]:
        of_item, of_user = (
            train[table.item_R[train] == table.item_R[row]],
            train[table.user_R[train] == table.user_R[row]],
        )

        def logit(of: np.ndarray) -> float:
            rate = (table.labels_RA[of, 0].sum() + 20 * clicks / total) / (len(of) + 20)
            return float(np.log(rate / (1 - rate)))

        expected = logit(of_item) + logit(of_user) - logit(train[:0])
        assert float(probability_RA[row, 0]) == pytest.approx(1 / (1 + np.exp(-expected)), abs=1e-5)


@pytest.mark.parametrize("protocol", ["official_ctr", "cold_user"])
def test_a_held_out_row_is_predicted_from_what_its_protocol_lets_it_see(protocol: str, many_users_folder: Path) -> None:
    config = tiny_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, protocol=protocol))
    data = RunData(config, many_users_folder, devices=1)
    task, table, part_R = make_task("ranking", data, []), data.table, data.split.part_R
    noise = iter(jax.random.split(jax.random.key(1), 100))
    parameters = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(noise), x.shape), task.init(jax.random.key(0)))
    probability_RA = data.ranking_evaluator(Part.TEST).run(task.graphdef, parameters)
    seen = (Part.TRAIN,) if protocol == "official_ctr" else tuple(Part)[1:]
    checked = 0
    for row in data.split.rows(Part.TEST):
        user = int(table.user_R[row])
        before = np.asarray([r for r in range(table.offsets[user], row) if part_R[r] in seen], int)
        if len(before) > 12 or (part_R[table.rows_of(user)] > 0).sum() > 32:
            continue  # its context may not fit into a window
        one = np.asarray([user])
        profile = Profile(data.trained.user[one], table.users.gender[one], table.users.age[one])
        events = Events(
            item=np.pad(data.trained.item[table.item_R[before]], (0, 13 - len(before)))[None],
            category=np.pad(table.items.category[table.item_R[before]], (0, 13 - len(before)))[None],
            action=np.pad(table.labels_RA[before], ((0, 13 - len(before)), (0, 0)))[None],
            mask=(np.arange(13) < len(before))[None],
        )
        item, category = data.trained.item[table.item_R[[row]]], table.items.category[table.item_R[[row]]]
        alone_11A = probabilities_after(task.graphdef, parameters, profile, events, item[None], category[None])
        np.testing.assert_allclose(probability_RA[row], alone_11A[0, 0], atol=1e-5)
        checked += 1
        if checked == 25:
            break
    assert checked > 5
    assert np.isnan(probability_RA[part_R != Part.TEST]).all()
    assert not np.isnan(probability_RA[part_R == Part.TEST]).any()


@pytest.mark.parametrize("protocol", ["official_ctr", "sampled_128"])
def test_both_stages_train_under_protocols_of_random_rows_and_of_candidates(protocol: str, table_folder: Path) -> None:
    config = tiny_config()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, protocol=protocol),
        retrieval=dataclasses.replace(config.retrieval, negative_popularity=0.75),
    )
    data = RunData(config, table_folder, devices=1)
    for stage in ("retrieval", "ranking"):
        task = make_task(stage, data, [])
        parallel = DataParallel(jax.local_devices()[:1])
        optimizer, parameters = make_optimizer(OptimizerConfig(), 10, task.tables), task.init(jax.random.key(0))
        step_fn, batch = compile_step(task, optimizer, parallel, like=parameters), task.batch(0)
        state = parallel.replicate(optimizer.init(named(parameters)))
        state, report = step_fn(state, *batch._replace(split=parallel.split(batch.split)), jax.random.key(1))
        metrics = parallel.read(report).compute()
        assert np.isfinite(metrics["loss"])
        assert metrics["gradient_norm"] > 0


def test_a_window_logs_the_mean_loss_of_its_examples_and_the_last_learning_rate(
    table_folder: Path, tmp_path: Path
) -> None:
    run("retrieval", table_folder, tmp_path, epochs=9, evaluate_every=9)
    task = make_task("retrieval", RunData(tiny_config(), table_folder, devices=1), [])
    parallel = DataParallel(jax.local_devices()[:1])
    init_key, dropout_key = jax.random.split(jax.random.key(0))
    parameters = task.init(init_key)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01, schedule="constant"), 27, task.tables)
    step_fn, state = (
        compile_step(task, optimizer, parallel, parameters),
        parallel.replicate(optimizer.init(named(parameters))),
    )
    total, count, norm = np.zeros((3, 27))
    for step in range(27):
        batch = task.batch(step)
        key = jax.random.fold_in(dropout_key, step)
        state, metrics = step_fn(state, *batch._replace(split=parallel.split(batch.split)), key)
        loss = parallel.read(metrics).loss
        total[step], count[step] = loss.total, loss.count
        norm[step] = parallel.read(metrics).compute()["gradient_norm"]
    assert len(set(count)) > 1
    logged = [line for line in read_lines(tmp_path / METRICS) if "loss" in line]
    assert [line["step"] for line in logged] == [20, 27]
    for line, steps in zip(logged, (slice(0, 20), slice(20, 27)), strict=True):
        assert line["loss"] == pytest.approx(total[steps].sum() / count[steps].sum(), rel=1e-5)
        assert line["gradient_norm"] == pytest.approx(norm[steps].mean(), rel=1e-5)
        assert line["learning_rate"] == pytest.approx(0.01 * (line["step"] - 1) / 100)
        assert line["table_learning_rate"] == pytest.approx(0.05 * (line["step"] - 1) / 100)


def test_timings_stand_apart_and_count_every_label(table_folder: Path, tmp_path: Path) -> None:
    run("ranking", table_folder, tmp_path, epochs=9, evaluate_every=9)
    first, second, last = read_lines(tmp_path / TIMINGS)
    assert [first["step"], second["step"], last["step"]] == [20, 27, 27]
    for window in (first, second):
        assert window["labels_per_second"] == pytest.approx(4 * window["examples_per_second"])
        assert 0 <= window["data_wait_share"] <= 1
        assert window["peak_process_memory_mib"] > 1
    assert first["eta_seconds"] > second["eta_seconds"] == 0
    assert second["evaluation_share"] == 0 < last["evaluation_share"]
    assert last.keys() == {
        "stage",
        "step",
        "startup_share",
        "evaluation_share",
        "checkpoint_share",
        "peak_process_memory_mib",
    }
    assert sum(last[f"{activity}_share"] for activity in ("startup", "evaluation", "checkpoint")) < 1


def test_the_clock_tells_steps_from_all_else() -> None:
    times = iter([0.0, 8.0, 10.0, 11.0, 12.0, 13.0, 20.0, 20.0, 20.0])
    clock = LoopClock(lambda: next(times))
    clock.first_step_runs()  # at 8
    with clock.spending_on("evaluation"):  # from 10 to 11
        pass
    with clock.spending_on("checkpoint"):  # from 12 to 13
        pass
    clock.waited(2.0)
    assert clock.end_window(steps=5, examples=100, labels=400, steps_left=10) == {  # at 20
        "steps_per_second": 0.5,
        "examples_per_second": 10,
        "labels_per_second": 40,
        "data_wait_share": 0.2,
        "eta_seconds": 24.0,
        "startup_share": 0.4,
        "evaluation_share": 0.05,
        "checkpoint_share": 0.05,
    }


def test_memory_is_that_of_the_fullest_device_where_devices_tell() -> None:
    class Device:
        def __init__(self, peak: int) -> None:
            self.peak = peak

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_in_use": 1, "peak_bytes_in_use": self.peak}

    assert peak_memory([Device(2**21), Device(2**22)]) == {"peak_device_memory_mib": 4.0}


def started_config(item_start: str) -> RunConfig:
    config = tiny_config()
    features = dataclasses.replace(config.retrieval.model.features, item_start=item_start)
    retrieval = dataclasses.replace(config.retrieval.model, features=features, item_bias=True)
    ranking = dataclasses.replace(config.ranking.model, features=features)
    return dataclasses.replace(
        config,
        retrieval=dataclasses.replace(config.retrieval, model=retrieval),
        ranking=dataclasses.replace(config.ranking, model=ranking),
    )


STARTS = {"spectral": spectral_item_vectors, "neighbours": neighbour_item_vectors}


@pytest.mark.parametrize("item_start", STARTS)
@pytest.mark.parametrize("stage", ["retrieval", "ranking"])
def test_items_start_from_the_vectors_that_the_setting_names(
    stage: str, item_start: str, many_users_folder: Path
) -> None:
    data = RunData(started_config(item_start), many_users_folder, devices=1)
    parameters = nnx.to_pure_dict(make_task(stage, data, []).init(jax.random.key(0)))
    expected = STARTS[item_start](data.table, data.split.rows(Part.TRAIN), 8, seed=0)
    np.testing.assert_array_equal(parameters["items"]["id"]["embedding"], expected)


def test_biases_start_from_the_effects_of_the_ids(many_users_folder: Path) -> None:
    config = tiny_config()
    config = dataclasses.replace(config, ranking=dataclasses.replace(config.ranking, bias_start="effects"))
    data = RunData(config, many_users_folder, devices=1)
    parameters = nnx.to_pure_dict(make_task("ranking", data, []).init(jax.random.key(0)))
    table, rows = data.table, data.split.rows(Part.TRAIN)
    effects = id_effects(
        table.user_R[rows],
        table.item_R[rows],
        table.labels_RA[rows],
        users=table.num_users + 1,
        items=table.num_items + 1,
    )
    item_NA = effects.intercept_A + effects.item_NA
    np.testing.assert_allclose(parameters["item_bias"]["embedding"], item_NA, atol=1e-5)
    np.testing.assert_allclose(parameters["user_bias"]["embedding"], effects.user_UA, atol=1e-5)


def test_item_biases_start_in_the_order_and_ratios_of_popularity(many_users_folder: Path) -> None:
    data = RunData(started_config("spectral"), many_users_folder, devices=1)
    bias_N = nnx.to_pure_dict(make_task("retrieval", data, []).init(jax.random.key(0)))["item_bias"]["embedding"][:, 0]
    train, table = data.split.rows(Part.TRAIN), data.table
    clicks_N = np.bincount(table.item_R[train], table.labels_RA[train, 0], table.num_items + 1)
    least = clicks_N[clicks_N > 0].min()
    np.testing.assert_allclose(bias_N - bias_N[0], np.log((clicks_N + least) / least), atol=1e-4)
    assert np.exp(bias_N).sum() == pytest.approx(1, abs=1e-4)


def test_tables_have_a_learning_rate_of_their_own_and_biases_that_of_the_dense_weights() -> None:
    tree = {name: jax.numpy.ones((3, 2)) for name in ("items.id.embedding", "item_bias.embedding", "dense.kernel")}
    spaces = {"items.id.embedding": "item", "item_bias.embedding": "item"}
    config, ids = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0), {"item": np.arange(3)}

    def change(rate: float) -> dict[str, jax.Array]:
        optimizer = make_optimizer(dataclasses.replace(config, table_learning_rate=rate), 10, spaces)
        state = optimizer.init(tree)
        after, _, _ = optimizer.update(state, ids, state.dense, optimizer.rows(state, ids))
        return jax.tree.map(lambda new, old: new - old, optimizer.parameters(after), tree)

    plain, slowed = change(0.1), change(0.025)
    np.testing.assert_allclose(slowed["items.id.embedding"], plain["items.id.embedding"] / 4, rtol=1e-5)
    for other in ("item_bias.embedding", "dense.kernel"):
        np.testing.assert_array_equal(slowed[other], plain[other])


@pytest.mark.parametrize("kind", ["shared_bottom", "mmoe", "ple", "esmm"])
def test_outputs_move_as_fast_as_their_labels_deviate(kind: str, many_users_folder: Path) -> None:
    config = tiny_config()
    model = dataclasses.replace(config.ranking.model, heads=HeadsConfig(kind))
    config = dataclasses.replace(config, ranking=dataclasses.replace(config.ranking, model=model))
    data = RunData(config, many_users_folder, devices=1)
    task, parallel = make_task("ranking", data, []), DataParallel(jax.local_devices()[:1])
    parameters, rule = task.init(jax.random.key(0)), OptimizerConfig(0.01, schedule="constant", warmup_steps=0)
    optimizer = make_optimizer(rule, 10, task.tables, rate_factors=task.rate_factors)
    step_fn, batch = compile_step(task, optimizer, parallel, like=parameters), task.batch(0)
    before, state = named(parameters), parallel.replicate(optimizer.init(named(parameters)))
    state, _ = step_fn(state, *batch._replace(split=parallel.split(batch.split)), jax.random.key(1))
    after = parallel.read(state).dense
    label_TA = data.table.labels_RA[data.split.rows(Part.TRAIN)]
    # Adam's first step is the rate, whatever the gradient.
    layer = "head.towers" if kind in ("mmoe", "ple") else "head"
    moved_A = np.abs(after[f"{layer}.bias"] - before[f"{layer}.bias"])
    np.testing.assert_allclose(moved_A, 0.01 * label_TA.std(axis=0) / label_TA.std(axis=0).max(), rtol=1e-2)
    kernel = np.abs(after[f"{layer}.kernel"] - before[f"{layer}.kernel"])
    np.testing.assert_allclose(kernel.max(axis=1 if kind in ("mmoe", "ple") else 0), moved_A, rtol=1e-2)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_the_learning_rate_reaches_its_peak_after_the_warm_up(schedule: str, warmup_steps: int) -> None:
    rate = learning_rate_schedule(OptimizerConfig(schedule=schedule, warmup_steps=warmup_steps), 100, 0.5)
    assert float(rate(warmup_steps)) == pytest.approx(0.5)
    assert float(rate(warmup_steps // 2)) == pytest.approx(0.25 if warmup_steps else 0.5)
    assert float(rate(99)) == pytest.approx(0.5 if schedule == "constant" else 0.005, rel=0.1)


@pytest.mark.parametrize("average_decay", [0.0, 0.9])
def test_training_with_rows_equals_training_whole_tables(table_folder: Path, average_decay: float) -> None:
    """Row-wise Adagrad leaves rows without a gradient as they are, so the dense formula on whole tables does the same."""
    task = make_task("retrieval", RunData(tiny_config(), table_folder, devices=1), [])
    parameters = jax.jit(task.init)(jax.random.key(0))
    rule, parallel = TableOptimizerConfig(eps=1e-3), DataParallel(jax.local_devices()[:1])
    optimizer = Optimizer(
        optax.sgd(0.1), rule, dict.fromkeys(task.tables, lambda _: 0.1), task.tables, average_decay=average_decay
    )
    step_fn = compile_step(task, optimizer, parallel, like=parameters)
    state, table = parallel.replicate(optimizer.init(named(parameters))), named(parameters)
    average, squares = table, {name: np.zeros(len(table[name])) for name in task.tables}
    sizes = {space: len(table[name]) for name, space in task.tables.items()}

    @jax.jit
    def dense_gradient(leaves, split, shared, places, key):
        # The rows of all ids, in the order of the batch's unique ones: a whole table seen through their places.
        def total(leaves):
            rows = {
                name: leaves[name].at[places[space]].get(mode="fill", fill_value=0)
                for name, space in task.tables.items()
            }
            return task.loss(assembled(parameters, leaves | rows), Batch(split, shared, places), key)

        def mean(leaves):
            loss = jax.vmap(lambda _: total(leaves), axis_name=AXIS)(jax.numpy.zeros(1))
            return loss.total[0] / loss.examples[0]

        return jax.grad(mean)(leaves)

    for step in range(3):
        batch, key = task.batch(step), jax.random.key(step)
        state, _ = step_fn(state, *batch._replace(split=parallel.split(batch.split)), key)
        gradient = dense_gradient(table, batch.split, batch.shared, batch.ids, jax.random.fold_in(key, 0))
        table = dict(table)
        for name in table:
            change = np.asarray(gradient[name], np.float64)
            if name in task.tables:
                squares[name] += np.square(change).mean(1)
                change = change / (np.sqrt(squares[name]) + 1e-3)[:, None]
            table[name] = (table[name] - 0.1 * change).astype(np.float32)
        decay = min(average_decay, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * table[name] for name in table}
    got = optimizer.parameters(parallel.local(parallel.unreplicate(state)))
    assert sizes["item"] > 100
    for name, expected in average.items():
        np.testing.assert_allclose(got[name], expected, atol=2e-5, err_msg=name)
