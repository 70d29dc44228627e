"""Another recommender is put in place while requests come in; one that is broken is not. And the process's end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import jax
import mirrors
import pytest
from served import DEADLINE, Served, metric, served, until

from tenrec_jax.recommender import Recommender
from tenrec_jax.requests import Event

USER, NEW_USER, ITEM, NEW_ITEM = 505, 77, 40, 7_777
ASKED = {"user_id": USER, "k": 8}


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two recommenders of one log; the second has no ranker, so that its lists differ."""
    root = tmp_path_factory.mktemp("versions")
    return mirrors.write_recommender(root / "monday"), mirrors.write_recommender(root / "tuesday", ranked=False)


@pytest.fixture
def link(versions: tuple[Path, Path], tmp_path: Path) -> Path:
    current = tmp_path / "current"
    current.symlink_to(versions[0])
    return current


@pytest.fixture
def server(link: Path) -> Iterator[Served]:
    with served(link, watch_seconds=0.02) as running:
        yield running
    assert not running.failures


def turn(link: Path, target: Path) -> None:
    """Have a link show to another folder, with no moment at which it shows to none."""
    following = link.with_name("next")
    following.symlink_to(target)
    following.rename(link)


def served_version(client: httpx.Client) -> str:
    return client.get("/version").json()["recommender"]


def test_no_request_is_lost_and_every_answer_is_of_one_version(server: Served, link: Path, versions: tuple[Path, Path]):
    monday, tuesday = (Recommender.load(folder) for folder in versions)
    expected = {each.version: [item.item_id for item in each.recommend(**ASKED).items] for each in (monday, tuesday)}
    assert len({str(items) for items in expected.values()}) == 2
    answers: list[httpx.Response] = []
    swapped = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.client.base_url, timeout=DEADLINE) as client:
            while not swapped.is_set():
                answers.append(client.post("/v1/recommend", json=ASKED))
            answers.append(client.post("/v1/recommend", json=ASKED))

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    until(lambda: len(answers) > 20)
    turn(link, versions[1])
    until(lambda: served_version(server.client) == tuesday.version)
    swapped.set()
    for asker in askers:
        asker.join()
    assert {answer.status_code for answer in answers} == {200}
    seen = [answer.json() for answer in answers]
    assert {told["version"] for told in seen} == {monday.version, tuesday.version}
    for told in seen:
        assert [item["item_id"] for item in told["items"]] == expected[told["version"]]
        assert all(bool(item["probabilities"]) == (told["version"] == monday.version) for item in told["items"])
    assert metric(server.client, 'tenrec_swaps_total{outcome="done"}') == 1
    assert metric(server.client, f'tenrec_recommender_info{{version="{tuesday.version}"}}') == 1
    assert metric(server.client, f'tenrec_recommender_info{{version="{monday.version}"}}') == 0


def test_what_was_told_to_the_old_version_the_new_one_knows(server: Served, link: Path, versions: tuple[Path, Path]):
    client, tuesday = server.client, Recommender.load(versions[1])
    events = [{"item_id": ITEM, "actions": ["click"]}, {"item_id": 53, "actions": ["click", "like"]}]
    client.post("/v1/observe", json={"user_id": NEW_USER, "events": events})
    client.post("/v1/items", json={"upsert": [{"item_id": NEW_ITEM, "category": 1}], "delete": [66]})
    turn(link, versions[1])
    until(lambda: served_version(client) == tuesday.version)
    size = tuesday.catalogue_size
    assert client.get("/v1/catalogue").json()["catalogue_size"] == size
    told = client.post("/v1/recommend", json={"user_id": NEW_USER, "k": 100}).json()
    meant = tuesday.recommend(history=[Event(ITEM), Event(53, ("click", "like"))], k=100)
    kept = [item.item_id for item in meant.items if item.item_id != 66]
    assert [item["item_id"] for item in told["items"] if item["item_id"] != NEW_ITEM] == kept
    assert NEW_ITEM in [item["item_id"] for item in told["items"]]
    assert told["history_length"] == 2


def test_a_recommender_that_cannot_be_loaded_is_told_and_the_old_one_stays(
    server: Served, link: Path, versions: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    client, first = server.client, served_version(server.client)
    broken = shutil.copytree(versions[1], tmp_path / "broken")
    weights = next(broken.glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    turn(link, broken)
    until(lambda: metric(client, "tenrec_swap_refused") == 1)
    assert client.post("/v1/recommend", json=ASKED).json()["version"] == first
    assert f"version {first} stays" in caplog.text
    assert weights.name in caplog.text
    refused = metric(client, 'tenrec_swaps_total{outcome="refused"}')
    link.unlink()
    until(lambda: metric(client, 'tenrec_swaps_total{outcome="refused"}') > refused)
    assert client.post("/v1/recommend", json=ASKED).json()["version"] == first
    # Mended, it is taken.
    weights.write_bytes(whole)
    link.symlink_to(broken)
    until(lambda: served_version(client) != first)
    assert metric(client, "tenrec_swap_refused") == 0


def test_a_recommender_that_does_not_fit_what_was_told_is_refused(server: Served, link: Path, tmp_path: Path):
    first = served_version(server.client)
    turn(link, mirrors.write_recommender(tmp_path / "text", text_ids=True))
    until(lambda: metric(server.client, "tenrec_swap_refused") == 1)
    assert server.client.post("/v1/recommend", json=ASKED).json()["version"] == first


@pytest.mark.slow
def test_the_command_serves_until_sigterm_and_answers_what_is_in_flight(versions: tuple[Path, Path], tmp_path: Path):
    token, log = tmp_path / "token", tmp_path / "log"
    token.write_text("correct-horse-battery\n")
    flags = ["--port=0", f"--token_file={token}", "--max_batch=2", "--batch_milliseconds=1000"]
    command = [sys.executable, "-m", "tenrec_jax", "serve", str(versions[1]), *flags]
    quick = {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    with log.open("w") as said, subprocess.Popen(command, stderr=said, env=os.environ | quick) as process:
        port = until(lambda: re.search(r"listening on http://127\.0\.0\.1:(\d+)", log.read_text()))[1]
        head = {"authorization": "Bearer correct-horse-battery"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=head, timeout=DEADLINE) as client:
            until(lambda: client.get("/readyz").status_code == 200)
            answers: list[httpx.Response] = []
            asker = threading.Thread(target=lambda: answers.append(client.post("/v1/recommend", json=ASKED)))
            asker.start()
            until(lambda: metric(client, "tenrec_waiting_requests") == 1)
            process.send_signal(signal.SIGTERM)
            asker.join()
        code = process.wait(DEADLINE)
    assert answers[0].status_code == 200
    assert len(answers[0].json()["items"]) == ASKED["k"]
    assert code == -signal.SIGTERM
    assert "Traceback" not in log.read_text()
