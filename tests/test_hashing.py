"""Hashed tables against brute force, exact tables written out, and dense gradients."""

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from short_training import config as short_config
from short_training import train

from tenrec_jax import artifact
from tenrec_jax.config import RunConfig, from_mapping, to_config_dict
from tenrec_jax.data.batches import TrainVocabulary
from tenrec_jax.data.interactions import open_table
from tenrec_jax.errors import UserError
from tenrec_jax.models.features import Vocabulary
from tenrec_jax.models.hashing import Collisions, HashedEmbed, HashedIds, TableConfig, hash_rows
from tenrec_jax.models.two_tower import TwoTower
from tenrec_jax.parameters import assembled, named
from tenrec_jax.pipeline import Pipeline
from tenrec_jax.plan import EXAMPLE_VOCABULARY
from tenrec_jax.recommender import Recommender
from tenrec_jax.run_data import RunData
from tenrec_jax.timeline import Events, Profile
from tenrec_jax.training.id_spaces import CATEGORY, HASHED, ITEM, USER
from tenrec_jax.training.parallel import DataParallel
from tenrec_jax.training.trainer import Batch

SUM = TableConfig("hashed", hashes=2, rows=11)
CONCATENATED = TableConfig("hashed", hashes=2, rows=7, combine="concatenate")
BITS = 2**64 - 1


def split_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)


def rows_by_hand(raw: int | str, config: TableConfig) -> list[int]:
    if isinstance(raw, str):
        raw = int.from_bytes(hashlib.blake2b(raw.encode("utf-8"), digest_size=8).digest(), "little")
    return [
        j * (config.rows + 1) + 1 + split_mix((raw & BITS) ^ split_mix(j + 1)) % config.rows
        for j in range(config.hashes)
    ]


def hashed_config(items: TableConfig = SUM, users: TableConfig = CONCATENATED, rows: int = 2500) -> RunConfig:
    """The short training's config with hashed tables in both stages, on a small twin; the example run of this file."""
    run = short_config()

    def hashed(stage: Any) -> Any:
        features = dataclasses.replace(stage.model.features, item_table=items, user_table=users)
        train = dataclasses.replace(stage.train, epochs=1)
        model = dataclasses.replace(stage.model, features=features)
        return dataclasses.replace(stage, model=model, train=train, unknown_rate=0.2)

    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, twin_rows=rows),
        retrieval=hashed(run.retrieval),
        ranking=hashed(run.ranking),
        evaluation=dataclasses.replace(run.evaluation, resamples=50),
    )


@given(
    raw=st.one_of(
        hnp.arrays(np.int64, st.integers(0, 9)),
        st.lists(st.text(max_size=9)).map(lambda texts: np.asarray([*texts, None], object)[:-1]),
    ),
    hashes=st.integers(1, 4),
    rows=st.sampled_from([2, 97, 1_000_000]),
)
def test_rows_are_those_of_the_formula_in_whole_numbers(raw: np.ndarray, hashes: int, rows: int) -> None:
    config = TableConfig("hashed", hashes, rows)
    got = hash_rows(raw, config)
    assert (got.dtype, got.shape) == (np.int32, (len(raw), hashes))
    assert got.tolist() == [rows_by_hand(one, config) for one in raw.tolist()]


def test_row_0_of_each_table_is_the_unknown_ids_alone() -> None:
    ids = HashedIds.of(np.arange(-1, 500), SUM)
    assert ids.rows_Nk[0].tolist() == [0, 12]
    assert not np.isin(ids.rows_Nk[1:], [0, 12]).any()
    # Every row of both tables is somebody's.
    np.testing.assert_array_equal(np.unique(ids.rows_Nk), np.arange(SUM.table_rows))


@given(rows_Nk=hnp.arrays(np.int32, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.integers(0, 4)))
def test_collisions_are_counted_as_by_comparing_every_two_ids(rows_Nk: np.ndarray) -> None:
    rows_Nk = rows_Nk + 5 * np.arange(rows_Nk.shape[1])
    same_NNk = (rows_Nk[:, None] == rows_Nk[None]) & ~np.eye(len(rows_Nk), dtype=bool)[..., None]
    found = Collisions.counted(rows_Nk)
    assert found.any == pytest.approx(same_NNk.any(2).any(1).mean())
    assert found.all == pytest.approx(same_NNk.all(2).any(1).mean())


@pytest.mark.parametrize(("hashes", "rows"), [(1, 20_000), (2, 150), (3, 40)])
def test_ids_collide_as_often_as_uniform_hashes_would(hashes: int, rows: int) -> None:
    """20,000 consecutive ids; a standard deviation is below a hundredth."""
    config, ids = TableConfig("hashed", hashes, rows), 20_000
    found = Collisions.counted(hash_rows(np.arange(ids), config))
    expected = Collisions.expected(ids, config)
    assert 0.2 < expected.all < 0.8
    assert found.all == pytest.approx(expected.all, abs=0.03)
    assert found.any == pytest.approx(expected.any, abs=0.03)
    assert expected.any == pytest.approx(1 - (1 - 1 / rows) ** (hashes * (ids - 1)))
    assert expected.all == pytest.approx(1 - (1 - rows**-hashes) ** (ids - 1))


def written_out(table: np.ndarray, rows_Nk: np.ndarray, combine: str) -> np.ndarray:
    """The exact table that a hashed one stands for, id by id."""
    if combine == "sum":
        return np.asarray([sum(table[row].astype(np.float64) for row in rows) for rows in rows_Nk], np.float32)
    return np.asarray([np.concatenate([table[row] for row in rows]) for rows in rows_Nk])


@pytest.mark.parametrize("config", [SUM, CONCATENATED])
def test_a_vector_is_made_of_the_rows_of_its_id(config: TableConfig) -> None:
    embed, ids = HashedEmbed(40, 8, config, 0.5, rngs=nnx.Rngs(0)), HashedIds.of(np.arange(-1, 39), config)
    np.testing.assert_array_equal(embed(np.arange(40)), np.broadcast_to(embed(np.zeros(1, int)), (40, 8)))
    embed.rows[...] = ids.rows_Nk
    expected = written_out(np.asarray(embed.embedding[...]), ids.rows_Nk, config.combine)
    np.testing.assert_allclose(embed(np.arange(40).reshape(5, 8)), expected.reshape(5, 8, 8), rtol=1e-6)


@pytest.mark.parametrize("config", [SUM, CONCATENATED])
def test_vectors_start_as_large_as_those_of_an_exact_table(config: TableConfig) -> None:
    config = dataclasses.replace(config, rows=2000)
    embed = HashedEmbed(5001, 64, config, 0.02, rngs=nnx.Rngs(0))
    embed.rows[...] = HashedIds.of(np.arange(-1, 5000), config).rows_Nk
    assert float(embed(np.arange(5001)).std()) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("items", [SUM, CONCATENATED])
def test_gradients_of_a_batchs_rows_are_those_of_whole_tables_looked_up_by_exact_ids(
    items: TableConfig, short_table: Path
) -> None:
    """40 items and 64 users in tables of 11 or 7 rows: ids of a batch share rows, whose gradients are summed."""
    config = hashed_config(items=items)
    data = RunData(config, short_table, devices=1)
    task, hashed = data.ranking_task(lambda _: (0.0, {})), data.hashed(config.ranking.model.features)
    parameters, batch, key = jax.jit(task.init)(jax.random.key(0)), task.batch(0), jax.random.key(1)
    # The heads start at zero, where no table would have a gradient.
    leaves = {name: leaf + 0.1 * jax.random.normal(key, leaf.shape) for name, leaf in named(parameters).items()}
    rows = {
        name: leaves[name].at[batch.ids[space]].get(mode="fill", fill_value=0) for name, space in task.tables.items()
    }

    def total(tables: dict[str, jax.Array], batch: Batch) -> jax.Array:
        return task.loss(assembled(parameters, leaves | tables), batch, key).total

    timeline = batch.split.timeline
    exact = timeline._replace(
        profile=timeline.profile._replace(user=batch.ids[USER][timeline.profile.user]),
        events=timeline.events._replace(
            item=batch.ids[ITEM][timeline.events.item], category=batch.ids[CATEGORY][timeline.events.category]
        ),
    )
    assert (exact.events.item[exact.events.mask] == 0).any()
    whole = {HASHED[space][1]: ids.rows_Nk for space, ids in hashed.items()}
    of_rows = jax.grad(total)(rows, batch)
    dense = jax.grad(total)(
        {name: leaves[name] for name in task.tables}, Batch(batch.split._replace(timeline=exact), whole, {})
    )
    for name, space in task.tables.items():
        real = batch.ids[space] < len(leaves[name])
        ids = batch.ids[space][real]
        np.testing.assert_allclose(of_rows[name][real], dense[name][ids], rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(np.delete(dense[name], ids, axis=0), 0)
        assert np.abs(dense[name]).max() > 0


def test_hashed_tables_train_alike_when_they_are_divided_over_devices(short_table: Path) -> None:
    task = RunData(hashed_config(), short_table, devices=4).retrieval_task(lambda _: (0.0, {}))
    one = train(task, DataParallel(jax.local_devices()[:1]), steps=20)
    for how in ("pmap", "shard_map"):
        four = train(task, DataParallel(jax.local_devices()[:4], how), steps=20, row_sharded=True)
        np.testing.assert_allclose(four.loss, one.loss, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(four.weight, one.weight, rtol=1e-6, atol=1e-6)


def test_an_id_that_no_training_row_mentions_is_known_by_its_own_rows(tmp_path: Path) -> None:
    config = hashed_config(users=TableConfig())
    data = RunData(config, tmp_path, devices=1)
    data.trained = TrainVocabulary(user=np.asarray([0, 1, 0], np.int32), item=np.asarray([0, 0, 2], np.int32))
    ids = data.model_ids(config.ranking.model.features)
    assert ids.item.tolist() == [0, 1, 2]
    assert ids.user.tolist() == [0, 1, 0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run whose ids are hashed, and what it told."""
    folder, told = tmp_path_factory.mktemp("run") / "hashed", list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("tenrec_jax.pipeline")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        Pipeline(hashed_config(), folder).run()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return folder, told


def test_a_run_tells_how_many_ids_share_rows(run: tuple[Path, list[str]]) -> None:
    folder, told = run
    raw = open_table(folder / "table").items.raw_id[1:]
    rows = [tuple(rows_by_hand(one, SUM)) for one in raw.tolist()]
    everything = np.mean([rows.count(one) > 1 for one in rows])
    (line, _) = [line for line in told if line.startswith("item ids: ")]
    assert line.startswith(f"item ids: {len(raw):,} in 2 x 11 rows, ")
    assert line.endswith(f"% share a row and {everything:.3%} share all rows with one other")
    assert sum(line.startswith("user ids: ") for line in told) == 2


def test_a_hashed_recommender_answers_as_the_exact_one_whose_tables_are_written_out(
    run: tuple[Path, list[str]],
) -> None:
    """Also on a history with items that no log holds, which have rows by their hashes."""
    recommender, loaded = Recommender.load(run[0] / "recommender"), artifact.load(run[0] / "recommender")
    config, catalogue = hashed_config(), loaded.catalogue
    known, outside = catalogue.item_id[[3, 7]].tolist(), [10**15, -4]
    history = [known[0], outside[0], known[1], outside[1], outside[0]]
    raw = [*catalogue.item_id[1:].tolist(), *outside]
    leaves = named(loaded.retrieval.parameters)
    rows = {
        "items.id": [SUM.unknown_k, *(rows_by_hand(one, SUM) for one in raw)],
        "users.id": [
            CONCATENATED.unknown_k,
            *(rows_by_hand(one, CONCATENATED) for one in catalogue.user_id[1:].tolist()),
        ],
    }
    for name, combine in (("items.id", "sum"), ("users.id", "concatenate")):
        table = leaves.pop(f"{name}.embedding")
        saved = leaves.pop(f"{name}.rows")
        np.testing.assert_array_equal(saved, rows[name][: len(saved)])
        leaves[f"{name}.embedding"] = written_out(np.asarray(table), np.asarray(rows[name]), combine)
    plain = dataclasses.replace(config.retrieval.model.features, item_table=TableConfig(), user_table=TableConfig())
    names = ("users.id", "items.id", "users.gender", "users.age", "items.category")
    vocabulary = Vocabulary(*(len(leaves[f"{name}.embedding"]) for name in names), len(loaded.actions))
    exact = artifact.two_tower(dataclasses.replace(config.retrieval.model, features=plain), vocabulary)
    model: TwoTower = nnx.merge(exact.graphdef, assembled(exact.parameters, leaves))

    def query(user: int, item: list[int], action: np.ndarray) -> np.ndarray:
        category = np.pad(catalogue.category, (0, len(outside)))[item]
        events = Events(np.asarray([item]), category[None], action[None], np.ones((1, len(item)), bool))
        one = np.asarray([user])
        profile = Profile(one, catalogue.gender[one], catalogue.age[one])
        return np.asarray(model.extend(model.start(profile), events).query_BD[0])

    clicked = np.tile(np.eye(len(loaded.actions), dtype=np.int8)[0], (5, 1))
    number = dict(zip(raw, range(1, len(raw) + 1), strict=True))
    mine = slice(catalogue.offsets[1], catalogue.offsets[2])
    length = config.retrieval.model.features.max_length
    for answer, query_D in (
        (recommender.recommend(history=history, k=5), query(0, [number[one] for one in history], clicked)),
        (
            recommender.recommend(user_id=int(catalogue.user_id[1]), k=5),
            query(1, catalogue.item[mine][-length:].tolist(), catalogue.action[mine][-length:]),
        ),
    ):
        for item in answer.items:
            dense = np.asarray([number[item.item_id]])
            vector_D = np.asarray(model.item_vectors(dense, catalogue.category[dense]))[0]
            assert item.retrieval_score == pytest.approx(float(query_D @ vector_D), rel=1e-4, abs=1e-5)
    seen = recommender.recommend(history=history, k=5)
    assert seen.unknown_items == (outside[0], outside[1], outside[0])
    other = recommender.recommend(history=[*history[:3], 10**15 + 1, history[4]], k=5)
    assert [item.probabilities for item in seen.items] != [item.probabilities for item in other.items]


def test_an_id_of_more_bits_than_any_log_holds_is_unknown(run: tuple[Path, list[str]]) -> None:
    recommender = Recommender.load(run[0] / "recommender")
    narrow, wide, wider = (recommender.recommend(history=[raw]).items for raw in (10**15, 10**15 + 2**64, 10**30))
    assert wide == wider != narrow


def test_the_plan_tells_how_many_ids_may_be_expected_to_share_rows() -> None:
    features = hashed_config(items=TableConfig("hashed", 2, 1000), users=TableConfig()).ranking.model.features
    (told,) = features.expected_collisions(EXAMPLE_VOCABULARY)
    everything = 1 - (1 - 1e-6) ** 99_999
    line = f"item ids, expected: 100,000 in 2 x 1,000 rows, 100.000% share a row and {everything:.3%} share all rows"
    assert told.startswith(line)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_table": {"kind": "hashed", "hashes": 0}}, r"item_table\.hashes is 0; it must be at least 1"),
        ({"user_table": {"kind": "hashed", "rows": 1}}, r"user_table\.rows is 1; it must be at least 2"),
        ({"user_table": {"kind": "hashed", "rows": 2**30}}, "below 2\\^31"),
        ({"item_table": {"kind": "hashed"}, "item_start": "spectral"}, "item_start 'spectral' needs an exact"),
        ({"user_table": {"kind": "hashed", "hashes": 3, "combine": "concatenate"}}, "model: a width of 8 cannot"),
        ({"item_table": {"kind": "hash"}}, "item_table.kind is 'hash'; it must be one of"),
    ],
)
@pytest.mark.parametrize("stage", ["retrieval", "ranking"])
def test_tables_that_cannot_be_are_refused_when_the_config_is_read(stage: str, change: dict, message: str) -> None:
    values = to_config_dict(short_config()).to_dict()
    for name, value in change.items():
        features = values[stage]["model"]["features"]
        features[name] = features[name] | value if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        from_mapping(values)
