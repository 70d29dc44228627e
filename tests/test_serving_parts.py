"""The parts of the server that need no recommender: strict JSON, the guard, pages, a run's files and the command line."""

import asyncio
import base64
import hashlib
import json
import socket
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenrec_jax.__main__ import main
from tenrec_jax.errors import UserError
from tenrec_jax.serving.app import create_app
from tenrec_jax.serving.commands import read_token
from tenrec_jax.serving.guard import Guard, Limits
from tenrec_jax.serving.metrics import Metrics
from tenrec_jax.serving.pages import Page
from tenrec_jax.serving.run_files import MAX_POINTS, run_of
from tenrec_jax.serving.server import listening
from tenrec_jax.serving.service import ServeOptions
from tenrec_jax.serving.strict_json import JsonError, parsed

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=30)
@given(JSON_VALUES)
def test_what_json_can_say_is_read_as_it_is(value):
    assert parsed(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")) == value


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"{'a': 1}", b"[1,]", b"{} {}", b'{"a": 01}'),
        *(b"[NaN]", b"[Infinity]", b"[-Infinity]"),
        *(b'{"a": 1, "a": 1}', b'[{"b": {"a": 1, "c": 2, "a": 3}}]'),
        *(b'"\xff"', b'"\xed\xa0\x80"', '["a"]'.encode("utf-16"), b'{"\\ud800": 1}', b'\xef\xbb\xbf{"a": 1}'),
        *(b"[" * 200_000, b'{"a":' * 200_000, b"1" * 5_000),
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_readers_could_understand_differently_is_refused(body):
    with pytest.raises(JsonError):
        parsed(body)


def answered(
    parts: Sequence[bytes], *, headers: dict[str, str] | None = None, path: str = "/", **limits: object
) -> tuple[int, dict[str, str], bytes]:
    """What a guard around an echo answers to a body in parts; after the last part the client says nothing more."""
    sent, left = [], list(parts)

    async def echo(scope, receive, send):
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    async def receive():
        if not left:
            await asyncio.Event().wait()
        part = left.pop(0)
        return {"type": "http.request", "body": part, "more_body": part != b""}

    async def send(message):
        sent.append(message)

    raw = [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    scope = {"type": "http", "path": path, "method": "POST", "headers": raw}
    guard = Guard(echo, Limits(**limits), Metrics(), endpoints=["/", "/healthz"], public=["/healthz"])
    asyncio.run(guard(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, sent[1]["body"]


@given(st.lists(st.binary(min_size=1, max_size=8), max_size=5), st.integers(1, 30))
def test_a_body_in_parts_arrives_whole_or_is_too_large(parts, limit):
    status, _, body = answered([*parts, b""], max_body_bytes=limit)
    whole = b"".join(parts)
    assert (status, body) == (200, whole) if len(whole) <= limit else status == 413


def test_a_body_without_end_and_a_length_far_beyond_the_limit_are_refused_at_once():
    status, headers, _ = answered([b"x" * 100] * 50, max_body_bytes=10)
    assert (status, headers["connection"]) == (413, "close")
    assert answered([], headers={"content-length": "1000"}, max_body_bytes=10)[0] == 413


def test_a_body_that_stops_is_given_up():
    status, headers, body = answered([b"{"], body_seconds=0.02)
    assert (status, headers["connection"]) == (408, "close")
    assert "0.02 seconds" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("given_id", ["a", "A-1_b.c", "x" * 128])
def test_a_request_id_that_can_be_is_kept(given_id):
    assert answered([b""], headers={"x-request-id": given_id})[1]["x-request-id"] == given_id


@pytest.mark.parametrize("given_id", ["", "x" * 129, "a b", "ä", "a\nb", "<script>"])
def test_a_request_id_that_could_harm_a_log_is_replaced(given_id):
    found = answered([b""], headers={"x-request-id": given_id})[1]["x-request-id"]
    assert len(found) == 32
    assert int(found, 16) >= 0


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer correct-horse", 200),
        *(
            (other, 401)
            for other in ("Bearer correct-hors", "bearer correct-horse", "correct-horse", "", "Bearer \xff")
        ),
    ],
)
def test_a_token_has_to_be_shown(header, status):
    found, headers, _ = answered([b""], headers={"authorization": header}, token="correct-horse")
    assert found == status
    assert ("www-authenticate" in headers) == (status == 401)
    assert answered([b""], path="/healthz", headers={"authorization": header}, token="correct-horse")[0] == 200


class Inline(HTMLParser):
    """Finds the texts of scripts and styles, as a browser does."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag, _):
        self._open = tag

    def handle_data(self, data):
        if self._open in ("script", "style"):
            self.found.append((self._open, data))

    def handle_endtag(self, _):
        self._open = ""


def test_a_policy_allows_what_stands_in_the_page_and_nothing_else():
    html = "<style>p{}</style><script type='x'>\nif (1 < 2) f('</p>')\n</script><p style='x'>a</p><script>g()</script>"
    directives = dict(part.split(" ", 1) for part in Page.of(html).policy.split("; "))
    for kind in ("script", "style"):
        texts = [text for tag, text in Inline(html).found if tag == kind]
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert directives[f"{kind}-src"] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert directives["default-src"] == "'none'"
    assert "unsafe" not in Page.of(html).policy


def test_a_runs_files_are_told_and_a_line_that_is_being_written_is_left_out(tmp_path: Path):
    recommender = tmp_path / "run" / "recommender"
    recommender.mkdir(parents=True)
    assert run_of(recommender) is None
    lines = [{"stage": "retrieval", "step": step, "loss": 1 / step} for step in range(1, 1202)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "ranking", "step": 1, "loss": NaN}\n{"stage"'
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    found = run_of(recommender)
    first, second = found["curves"]
    assert (found["name"], found["results"]) == ("run", None)
    assert (first["stage"], first["metric"]) == ("retrieval", "loss")
    assert len(first["steps"]) <= MAX_POINTS
    assert first["steps"][-1] == 1201
    assert first["values"] == [1 / step for step in first["steps"]]
    assert second["steps"] == [1]
    (tmp_path / "run" / "eval").mkdir()
    (tmp_path / "run" / "eval" / "test.json").write_text('{"seed": 0}')
    assert run_of(recommender)["results"] == {"seed": 0}


@pytest.mark.parametrize("text", ["", "short", "two words of which none is short", "ä" * 20, "tab\tin the middle....."])
def test_a_token_that_cannot_be_sent_or_is_easy_to_guess_is_refused(tmp_path: Path, text: str):
    (tmp_path / "token").write_text(text)
    with pytest.raises(UserError, match="--token_file"):
        read_token(tmp_path / "token")
    (tmp_path / "token").write_text("0123456789abcdef\n")
    assert read_token(tmp_path / "token") == "0123456789abcdef"


@pytest.mark.parametrize("flag", ["--max_batch=0", "--max_batch=65", "--timeout_seconds=nan", "--watch_seconds=-1"])
def test_numbers_that_cannot_be_are_refused(flag: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "somewhere", flag])
    assert flag.partition("=")[0] in capsys.readouterr().err


def test_a_folder_without_a_recommender_a_taken_port_and_a_missing_extra_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert f"{tmp_path} is not a recommender" in capsys.readouterr().err
    with listening("127.0.0.1", 0) as taken:
        assert main(["serve", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    assert "Name another port" in capsys.readouterr().err
    monkeypatch.delitem(__import__("sys").modules, "tenrec_jax.serving.server")
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    assert main(["serve", str(tmp_path)]) == 2
    assert 'pip install "tenrec_jax[serve]"' in capsys.readouterr().err


def test_answers_leave_at_once():
    """With Nagle's algorithm an answer's body waits until the client has acknowledged its head."""
    with (
        listening("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_every_endpoint_tells_in_its_schema_what_it_may_answer(tmp_path: Path):
    guard = create_app(ServeOptions(tmp_path), lambda error: None)
    schema = guard._app.openapi()
    for path in ("recommend", "score", "observe", "items"):
        operation = schema["paths"][f"/v1/{path}"]["post"]
        assert {"200", "400", "401", "404", "408", "413", "415", "422", "503", "504"} == set(operation["responses"])
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert schema["components"]["schemas"][name]["examples"]
