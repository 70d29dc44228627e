"""The contract of every endpoint, on a real server, against the recommender itself; and every error with its field."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mirrors
import pytest
from served import Served, metric, served, until

from tenrec_jax.recommender import Recommender
from tenrec_jax.requests import Event, Rules
from tenrec_jax.serving import schemas
from tenrec_jax.serving.guard import Limits

USER, ITEM, UNKNOWN = 505, 40, 99_999
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recommender in the folder of a run."""
    run = tmp_path_factory.mktemp("run")
    (run / "metrics.jsonl").write_text('{"stage": "ranking", "step": 10, "loss": 0.5}\n')
    return mirrors.write_recommender(run / "recommender")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with served(folder) as running:
        yield running
    assert not running.failures


@pytest.fixture(scope="module")
def client(server: Served) -> httpx.Client:
    return server.client


@pytest.fixture
def recommender(folder: Path) -> Recommender:
    return Recommender.load(folder)


def assert_same(told: Any, meant: Any) -> None:
    """JSON says of records what they hold, but for the time it took; numbers to rounding, as batches differ in size."""
    plain = json.loads(json.dumps(meant, default=vars))
    plain.pop("milliseconds", None)
    for name in plain:
        if plain[name] is not None:
            assert _rounded(told[name]) == _rounded(plain[name]), name


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return pytest.approx(value, rel=1e-4, abs=1e-4) if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({"user_id": USER, "k": 5}, {"user_id": USER, "k": 5}),
        ({"user_id": USER, "explain": True}, {"user_id": USER, "explain": True}),
        ({"history": []}, {"history": []}),
        (
            {"history": [ITEM, UNKNOWN, {"item_id": 53, "actions": ["click", "like"]}, {"item_id": 66, "actions": []}]},
            {"history": [ITEM, UNKNOWN, Event(53, ("click", "like")), Event(66, ())]},
        ),
        (
            {
                "user_id": USER,
                "rules": {"diversity": 0.5, "max_per_category": 2, "blocked_items": [ITEM], "seed": None},
            },
            {"user_id": USER, "rules": Rules(diversity=0.5, max_per_category=2, blocked_items=(ITEM,))},
        ),
        (
            {
                "user_id": USER,
                "rules": {"exploration": 0.5, "seed": 3, "exclude_seen": False, "blocked_categories": [1]},
            },
            {"user_id": USER, "rules": Rules(exploration=0.5, seed=3, exclude_seen=False, blocked_categories=(1,))},
        ),
    ],
    ids=["user", "explained", "nobody", "history", "lists of rules", "exploration"],
)
def test_recommendations_are_the_recommenders_own(client, recommender, body, asked):
    told = client.post("/v1/recommend", json=body)
    assert told.status_code == 200
    schemas.RecommendAnswer.model_validate(told.json())
    assert_same(told.json(), vars(recommender.recommend(**asked)))
    assert ("history" in told.json()) == body.get("explain", False)
    assert {"state", "search", "rank", "rules", "total", "queue"} == told.json()["milliseconds"].keys()


def test_values_of_actions_that_are_not_given_are_the_recommenders_own(client, recommender):
    how = {"action_values": {"like": 9}, "retrieval_weight": 0}
    told = client.post("/v1/recommend", json={"user_id": USER, "rules": how}).json()
    assert recommender.rules.action_values.share == 4
    for item in told["items"]:
        values = {"click": 1, "like": 9, "share": 4, "follow": 3}
        worth = sum(value * item["probabilities"][action] for action, value in values.items())
        assert item["score"] == pytest.approx(worth, rel=1e-5)


def test_scores_come_in_the_order_given(client, recommender):
    items = [92, 27, 40]
    told = client.post("/v1/score", json={"items": items, "history": [53]}).json()
    schemas.ScoreAnswer.model_validate(told)
    assert [item["item_id"] for item in told["items"]] == items
    assert_same(told, {"items": recommender.score(items, history=[53]), "version": recommender.version})


def test_what_is_observed_counts_in_the_next_answer_and_new_users_are_welcome(client, recommender):
    events = [{"item_id": 53, "actions": ["click", "share"]}, {"item_id": UNKNOWN, "actions": []}]
    assert client.post("/v1/recommend", json={"user_id": 77}).status_code == 404
    told = client.post("/v1/observe", json={"user_id": 77, "events": events}).json()
    assert told == {"version": recommender.version, "history_length": 2, "unknown_items": [UNKNOWN]}
    meant = recommender.recommend(history=[Event(53, ("click", "share")), Event(UNKNOWN, ())])
    found = client.post("/v1/recommend", json={"user_id": 77}).json()
    assert [item["item_id"] for item in found["items"]] == [item.item_id for item in meant.items]
    assert found["history_length"] == 2


def test_items_come_and_go(client, recommender):
    size, ask = recommender.catalogue_size, {"history": [], "k": 1000}
    told = client.post("/v1/items", json={"upsert": [{"item_id": 7_777, "category": 1}]}).json()
    assert told == {"version": recommender.version, "catalogue_size": size + 1}
    assert 7_777 in [item["item_id"] for item in client.post("/v1/recommend", json=ask).json()["items"]]
    assert client.post("/v1/items", json={"delete": [7_777]}).json()["catalogue_size"] == size
    assert 7_777 not in [item["item_id"] for item in client.post("/v1/recommend", json=ask).json()["items"]]


def test_the_catalogue_the_run_and_the_version_are_told(client, recommender, folder):
    told = client.get("/v1/catalogue").json()
    schemas.CatalogueAnswer.model_validate(told)
    assert told["users"] == recommender.user_ids[:50].tolist()
    assert told["actions"] == ["click", "like", "share", "follow"]
    assert told["ranked"] is True
    assert_same(told, {"items": recommender.catalogue(50), "rules": recommender.rules})
    run = client.get("/v1/run").json()
    curve = {"stage": "ranking", "metric": "loss", "steps": [10], "values": [0.5]}
    assert run == {"name": folder.parent.name, "curves": [curve], "results": None}
    version = client.get("/version").json()
    assert (version["recommender"], version["package"]) == (recommender.version, "0.1.0")
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


REFUSED: list[tuple[str, Any, int, str | None]] = [
    ("recommend", {"user_id": 7}, 404, "user_id"),
    ("recommend", {"user_id": "a"}, 422, "user_id"),
    ("recommend", {"user_id": 1.0}, 422, "user_id"),
    ("recommend", {"user_id": True}, 422, "user_id"),
    ("recommend", {"user_id": 2**63}, 422, "user_id"),
    ("recommend", {"user_id": "x" * 257}, 422, "user_id"),
    ("recommend", {"user_id": "\ud800"}, 422, "user_id"),
    ("recommend", {}, 422, "body"),
    ("recommend", {"user_id": 1, "history": []}, 422, "body"),
    ("recommend", [], 422, "body"),
    ("recommend", {"user_id": USER, "k": 0}, 422, "k"),
    ("recommend", {"user_id": USER, "k": 1001}, 422, "k"),
    ("recommend", {"user_id": USER, "k": True}, 422, "k"),
    ("recommend", {"user_id": USER, "explain": 1}, 422, "explain"),
    ("recommend", {"user_id": USER, "size": 3}, 422, "size"),
    ("recommend", {"history": [1, 2, 3, "a"]}, 422, "history[3]"),
    ("recommend", {"history": [1, {"item_id": None}]}, 422, "history[1].item_id"),
    ("recommend", {"history": [{"item_id": 1, "actions": ["click", 3]}]}, 422, "history[0].actions[1]"),
    ("recommend", {"history": [{"item_id": 1, "actions": ["buy"]}]}, 422, "history[0].actions"),
    ("recommend", {"history": [1] * 10_001}, 422, "history"),
    ("recommend", {"user_id": USER, "rules": {"diversity": 1}}, 422, "rules.diversity"),
    ("recommend", {"user_id": USER, "rules": {"diversity": "0.5"}}, 422, "rules.diversity"),
    ("recommend", {"user_id": USER, "rules": {"max_per_category": -1}}, 422, "rules.max_per_category"),
    ("recommend", {"user_id": USER, "rules": {"seed": -1}}, 422, "rules.seed"),
    ("recommend", {"user_id": USER, "rules": {"blocked_items": [40, "a"]}}, 422, "rules.blocked_items[1]"),
    ("recommend", {"user_id": USER, "rules": {"action_values": {"buy": 1}}}, 422, "rules.action_values.buy"),
    (
        "recommend",
        {"user_id": USER, "rules": {"action_values": dict.fromkeys(["click", "like", "share", "follow"], 0)}},
        422,
        "rules.action_values",
    ),
    ("score", {"user_id": USER, "items": []}, 422, "items"),
    ("score", {"user_id": USER, "items": [40, UNKNOWN]}, 422, "items[1]"),
    ("score", {"user_id": USER, "items": [40] * 1001}, 422, "items"),
    ("observe", {"user_id": USER, "events": []}, 422, "events"),
    ("observe", {"user_id": USER, "events": [40]}, 422, "events[0]"),
    ("observe", {"user_id": USER, "events": [{"item_id": 40}] * 1001}, 422, "events"),
    ("observe", {"events": [{"item_id": 40}]}, 422, "user_id"),
    ("items", {"upsert": [{"item_id": 40, "category": 99}]}, 422, "upsert[0].category"),
    ("items", {"upsert": [{"item_id": 40}, {"item_id": 40}]}, 422, "upsert[1]"),
    ("items", {"delete": [UNKNOWN]}, 422, "delete[0]"),
]


@pytest.mark.parametrize(("path", "body", "status", "field"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_request_that_cannot_be_answered_is_told_what_is_wrong(client, path, body, status, field):
    answer = client.post(f"/v1/{path}", content=json.dumps(body), headers=JSON | {"x-request-id": "mine"})
    error = schemas.ErrorAnswer.model_validate(answer.json()).error
    assert (answer.status_code, error.field, error.request_id) == (status, field, "mine")
    assert error.message


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status"),
    [
        ("POST", "/v1/recommend", b'{"user_id": NaN}', JSON, 400),
        ("POST", "/v1/recommend", b'{"user_id": 1, "user_id": 2}', JSON, 400),
        ("POST", "/v1/recommend", b"[" * 100_000, JSON, 400),
        ("POST", "/v1/recommend", b"", JSON, 400),
        ("POST", "/v1/recommend", b'{"user_id": "\xff"}', JSON, 400),
        ("POST", "/v1/recommend", b'{"user_id": 1}', {"content-type": "text/plain"}, 415),
        ("POST", "/v1/recommend", b'{"user_id": 1}', {}, 415),
        ("POST", "/v1/recommend", b"x" * (2**20 + 1), JSON, 413),
        ("POST", "/v1/recommend", b"x" * 20_000_000, JSON, 413),
        ("GET", "/v1/recommend", b"", {}, 405),
        ("GET", "/elsewhere", b"", {}, 404),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_request_is_told_too(client, method, path, content, headers, status):
    try:
        answer = client.request(method, path, content=content, headers=headers)
    except httpx.TransportError:  # the server need not read on
        assert status == 413
        return
    schemas.ErrorAnswer.model_validate(answer.json())
    assert answer.status_code == status


def test_a_body_without_a_length_is_counted_as_it_comes(client):
    assert client.post("/v1/recommend", content=(b" " * 1000 for _ in range(1100)), headers=JSON).status_code == 413
    body = iter([b'{"hist', b"", b'ory": []}'])
    assert client.post("/v1/recommend", content=body, headers=JSON).status_code == 200


def test_every_answer_bears_the_security_headers_an_id_and_its_times(client):
    answers = [client.get(path) for path in ("/", "/healthz", "/docs", "/metrics", "/nowhere", "/openapi.json")]
    answers.append(client.post("/v1/recommend", json={"user_id": USER}))
    answers.append(client.post("/v1/recommend", content=b"{", headers=JSON))
    for answer in answers:
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
        assert re.search(r"server;dur=[\d.]+$", answer.headers["server-timing"])
    stages = re.findall(r"(\w+);dur=", answers[-2].headers["server-timing"])
    assert stages == ["state", "search", "rank", "rules", "total", "queue", "server"]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


def test_the_documentation_loads_nothing_from_elsewhere(client):
    html = client.get("/docs").text
    assert "POST /v1/recommend" in html
    assert not re.search(r"(src|href)=", html)


def test_requests_are_counted(client, recommender):
    def counted() -> list[float]:
        names = ('{endpoint="/v1/recommend",status="404"}', '{endpoint="other",status="404"}')
        return [metric(client, f"tenrec_requests_total{name}") for name in names]

    before = counted()
    client.post("/v1/recommend", json={"user_id": 7})
    client.get("/v1/recommend/x")
    assert counted() == [value + 1 for value in before]
    assert metric(client, f'tenrec_recommender_info{{version="{recommender.version}"}}') == 1
    assert metric(client, "tenrec_ready") == 1
    assert metric(client, 'tenrec_stage_seconds_count{stage="rank"}') > 0
    assert metric(client, "tenrec_batch_size_count") > 0


def test_a_client_that_stops_in_its_body_is_given_up(folder):
    with (
        served(folder, ready=False, limits=Limits(body_seconds=0.05)) as running,
        socket.create_connection(("127.0.0.1", running.port)) as slow,
    ):
        slow.sendall(b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        answer = b""
        while part := slow.recv(4096):  # until the server closes the connection
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"field": null' in answer


def test_a_token_opens_all_and_without_it_only_health_is_told(folder):
    with served(folder, limits=Limits(token="correct-horse-battery")) as running:
        client, right = running.client, {"authorization": "Bearer correct-horse-battery"}
        for path in ("/v1/catalogue", "/v1/run", "/metrics", "/version", "/docs", "/openapi.json", "/nowhere"):
            assert client.get(path).status_code == 401, path
            assert client.get(path, headers=right).status_code in (200, 404)
        assert client.post("/v1/recommend", json={"user_id": USER}).json()["error"]["field"] is None
        assert client.post("/v1/recommend", json={"user_id": USER}, headers=right).status_code == 200
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_too_many_and_too_slow_requests_are_told_so_and_those_in_flight_are_answered_at_the_end(tmp_path):
    """Requests wait for others that never come. Without a ranker there is less to compile."""
    folder = mirrors.write_recommender(tmp_path / "recommender", ranked=False)
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(running.client.post("/v1/recommend", json={"user_id": USER}))

    with served(folder, max_batch=2, batch_seconds=1, timeout_seconds=60, max_waiting=1) as running:
        first = threading.Thread(target=ask)
        first.start()
        until(lambda: metric(running.client, "tenrec_waiting_requests") == 1)
        busy = running.client.post("/v1/recommend", json={"user_id": USER})
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
        running.server.should_exit = True
        first.join()
    assert [answer.status_code for answer in answers] == [200]
    with served(folder, max_batch=2, batch_seconds=60, timeout_seconds=0.05) as running:
        assert running.client.post("/v1/recommend", json={"user_id": USER}).status_code == 504
        assert metric(running.client, "tenrec_waiting_requests") == 0


def test_before_the_recommender_is_loaded_the_server_lives_but_is_not_ready(tmp_path):
    with served(tmp_path, ready=False) as running:
        client = running.client
        assert client.get("/healthz").status_code == 200
        for answer in (
            client.get("/readyz"),
            client.get("/version"),
            client.post("/v1/recommend", json={"history": []}),
        ):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        until(lambda: running.failures)
    assert f"{tmp_path} is not a recommender" in str(running.failures[0])
