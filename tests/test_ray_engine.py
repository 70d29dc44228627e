"""The engine "ray" against the local one, file by file, and what it does when a worker is killed."""

import contextlib
import gzip
import os
import random
import signal
import subprocess
import sys
import threading

import mirrors
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tenrec_jax.__main__ import main
from tenrec_jax.bulk import recommend_all
from tenrec_jax.data import sources as sources_module
from tenrec_jax.data.encoder import Encoder, telling_rows
from tenrec_jax.data.ingest import IngestOptions, ingest
from tenrec_jax.data.interactions import dictionary_arrays
from tenrec_jax.data.manifest import VERIFIED_FILE
from tenrec_jax.data.schema import custom_kind
from tenrec_jax.errors import UserError
from tenrec_jax.sealed import files_in

ray = pytest.importorskip("ray")
pytestmark = [
    # Ray's settings warn of settings that they fill in themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::FutureWarning:ray"),
    # Other tests have started JAX in this process; Ray's children run a program of their own at once, and nothing of JAX.
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
]

HEADER = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age"
CUSTOM = {"user": "uid", "item": "vid", "click": "watched", "category": "topic", "age": "years", "time": "at"}


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """A local Ray of two workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    yield
    ray.shutdown()


def video_log(rows, users, seed=0):
    """A log whose users' rows lie scattered, with features that contradict each other, repeats, and every 997th row bad."""
    draw = random.Random(seed).randrange
    lines = [HEADER]
    for row in range(rows):
        click = draw(2) if row % 997 else 7
        category = draw(2) if draw(3) else r"\N"
        lines.append(
            f"{draw(users) * 10**12},{draw(99)},{click},0,{draw(2)},0,{category},{draw(5)},{draw(3)},{draw(8)}"
        )
    return "".join(f"{line}\n" for line in lines).encode()


def custom_log(rows, seed=0):
    draw = random.Random(seed).randrange
    lines = ["topic;uid;vid;at;years;watched"]
    for _ in range(rows):
        topic = ("news", "sport", "", "a;b", "arts")[draw(5)]
        lines.append(f'"{topic}";u{draw(60)};{draw(40)};{draw(10**6)}.5;{draw(4)};{draw(2)}')
    return "".join(f"{line}\n" for line in lines).encode()


def folder_of_shards(path, rows):
    """The log as Parquet, as Spark would write it."""
    values = [list(map(int, line.split(b",")))[:10] for line in video_log(rows, 50).replace(rb"\N", b"1").split()[1:]]
    path.mkdir()
    table = pa.table({name: [row[k] for row in values] for k, name in enumerate(HEADER.split(","))})
    pq.write_table(table.slice(0, rows // 3), path / "part-0.snappy.parquet")
    pq.write_table(table.slice(rows // 3), path / "part-1.snappy.parquet", row_group_size=100)


def files_of(folder):
    """The bytes of each file of a table but the times at which it was checked."""
    names = [path for path in folder.rglob("*") if path.is_file() and path.name != VERIFIED_FILE]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}


def both(folder, source, kind, **options):
    """The files of the two engines' tables of a source."""
    for engine in ("local", "ray"):
        ingest([source], kind, folder / engine, IngestOptions(**options, engine=engine), progress=False)
    return files_of(folder / "local"), files_of(folder / "ray")


LOGS = {
    "several buckets of users": ("qb_video", video_log(40_000, 20_000), {"max_bad_fraction": 0.1}),
    "without duplicates, compressed": (
        "qb_video",
        gzip.compress(video_log(20_000, 30)),
        {"max_bad_fraction": 0.1, "duplicates": "drop_exact"},
    ),
    "own columns, ids and categories of text, times": ("custom", custom_log(3_000), {"columns": CUSTOM}),
    "sequences": ("sequences", b"".join(b"u%d 5 %d 7\n" % (k, k % 9) for k in range(2_000)), {}),
}


@pytest.mark.parametrize("case", LOGS)
def test_the_table_is_the_local_engines_byte_for_byte(tmp_path, monkeypatch, two_workers, case):
    kind, data, options = LOGS[case]
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 1 << 17)
    (tmp_path / "log.csv").write_bytes(data)
    local, on_ray = both(tmp_path, tmp_path / "log.csv", kind, **options)
    assert local == on_ray
    assert len([name for name in local if name.startswith("events/")]) == (5 if case.startswith("several") else 1)


def test_a_folder_of_shards_gives_the_table_of_the_local_engine(tmp_path, two_workers):
    folder_of_shards(tmp_path / "shards", 3_000)
    local, on_ray = both(tmp_path, tmp_path / "shards", "qb_video", max_bad_fraction=0.1)
    assert local == on_ray
    assert b"part-1.snappy.parquet" in local["quarantine.csv"]


REFUSED = {
    "bad rows": (video_log(3_000, 50), "holds 4 bad rows of 3,000"),
    "cut short": (gzip.compress(video_log(30_000, 50))[:50_000], "damaged gzip data"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_in_the_same_words(tmp_path, two_workers, case):
    data, expected = REFUSED[case]
    (tmp_path / "log.csv").write_bytes(data)
    found = []
    for engine in ("local", "ray"):
        with pytest.raises(UserError, match=expected) as error:
            ingest([tmp_path / "log.csv"], "qb_video", tmp_path / "t", IngestOptions(engine=engine), progress=False)
        found.append((str(error.value), files_of(tmp_path)))
    assert found[0] == found[1]


def workers_at(task):
    """Process ids of this session's workers that are running a task of that name."""
    processes = psutil.Process().children(recursive=True)
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{task}"):
                found.append(process.pid)
    return found


def kill_one(task, killed, stop):
    """Kill the first worker that is seen running a task of that name."""
    while not killed and not stop.is_set():
        for process in workers_at(task)[:1]:
            os.kill(process, signal.SIGKILL)
            killed.append(process)


@pytest.mark.parametrize(
    "task", ["_parse", pytest.param("MapBatches(_encode", marks=pytest.mark.slow), "MapBatches(_make_shard"]
)
def test_a_worker_killed_on_the_way_costs_nothing(tmp_path, monkeypatch, two_workers, task):
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 1 << 17)
    (tmp_path / "log.csv").write_bytes(video_log(60_000, 20_000))
    killed, stop = [], threading.Event()
    killer = threading.Thread(target=kill_one, args=(task, killed, stop))
    killer.start()
    try:
        for attempt in range(5):  # a task that is over before it is seen is waited for again
            if not killed:
                (tmp_path / str(attempt)).mkdir()
                local, on_ray = both(tmp_path / str(attempt), tmp_path / "log.csv", "qb_video", max_bad_fraction=0.1)
    finally:
        stop.set()
        killer.join()
    assert killed
    assert local == on_ray


def test_the_command_line_starts_a_ray_of_its_own_and_ends_it(tmp_path):
    (tmp_path / "log.csv").write_bytes(video_log(2_000, 50))
    arguments = ["ingest", str(tmp_path / "log.csv"), "--kind", "qb_video", "--max_bad_fraction", "0.1"]
    assert main([*arguments, "--out", str(tmp_path / "local")]) == 0
    command = [sys.executable, "-m", "tenrec_jax", *arguments, "--out", str(tmp_path / "ray"), "--engine", "ray"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(":")[1].split(";")[0]) == (0, " written"), done.stderr
    assert files_of(tmp_path / "local") == files_of(tmp_path / "ray")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "log.csv", "ray"]


def test_a_cluster_that_does_not_answer_is_named(tmp_path, monkeypatch):
    def refuse(address, **_):
        raise ConnectionError(f"no answer from {address}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:1")
    (tmp_path / "log.csv").write_bytes(video_log(5, 5))
    with pytest.raises(UserError, match="RAY_ADDRESS is 'nowhere:1', and no Ray answers there"):
        ingest([tmp_path / "log.csv"], "qb_video", tmp_path / "t", IngestOptions(engine="ray"), progress=False)


def test_a_ray_without_room_is_one_clear_message_and_leaves_nothing(tmp_path, monkeypatch, two_workers):
    def full(_):
        raise ray.exceptions.OutOfDiskError("the disk is full")

    (tmp_path / "log.csv").write_bytes(video_log(5, 5))
    monkeypatch.setattr(ray, "put", full)
    with pytest.raises(UserError, match="Ray has no room for the rows on their way: the disk is full"):
        ingest(
            [tmp_path / "log.csv"], "qb_video", tmp_path / "t", IngestOptions(None, "keep", 0.5, "ray"), progress=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_without_ray_the_message_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "log.csv").write_bytes(video_log(5, 5))
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "tenrec_jax.data.ray_engine", raising=False)
    with pytest.raises(UserError, match=r'pip install "tenrec_jax\[ray\]"'):
        ingest([tmp_path / "log.csv"], "qb_video", tmp_path / "t", IngestOptions(engine="ray"), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]
    with pytest.raises(UserError, match="engine is 'spark'; it must be one of local, ray"):
        IngestOptions(engine="spark")


def test_an_encoder_that_learned_from_telling_rows_is_the_one_that_saw_all():
    kind, draw = custom_kind(CUSTOM), random.Random(0).randrange
    whole, told = Encoder(kind), Encoder(kind)
    for _ in range(5):
        rows = pa.RecordBatch.from_pydict(
            {
                "uid": [f"u{draw(9)}" for _ in range(60)],
                "vid": [f"v{draw(9)}" for _ in range(60)],
                "watched": pa.array([draw(2) for _ in range(60)], pa.int8()),
                "topic": [("a", "b", None)[draw(3)] for _ in range(60)],
                "years": pa.array([(0, 1, 2, None)[draw(4)] for _ in range(60)], pa.int32()),
                "at": [float(draw(9)) for _ in range(60)],
            }
        )
        whole(rows)
        few = telling_rows(rows, kind)
        assert few.num_rows < rows.num_rows
        told.learn(few)
    for made, expected in ((told.users(), whole.users()), (told.items(), whole.items())):
        for (name, array), (_, other) in zip(dictionary_arrays(made), dictionary_arrays(expected), strict=True):
            assert array.tolist() == other.tolist(), name
    assert told.categories() == whole.categories()


def test_recommendations_to_all_users_are_the_same_on_ray(two_workers, tmp_path):
    folder = mirrors.write_recommender(tmp_path / "recommender")
    for engine in ("local", "ray"):
        recommend_all(folder, tmp_path / engine, k=4, users_per_part=2, engine=engine, progress=False)
    files = files_in(tmp_path / "local")
    assert len(files) == 4
    assert files == files_in(tmp_path / "ray")
    for name in files:
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes()
