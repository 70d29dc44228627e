"""Requests made from the API's own description, right ones and wrong ones, and bodies that are none: none hangs, none breaks the server."""

import json
from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import mirrors
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from schemathesis import checks, openapi
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks as specified
from served import Served, served

from tenrec_jax.serving import schemas

HANGS_AFTER_SECONDS = 30
GETS = ("/v1/catalogue", "/v1/run", "/healthz", "/readyz", "/version", "/metrics")
POSTS = {
    "/v1/recommend": schemas.RecommendAnswer,
    "/v1/score": schemas.ScoreAnswer,
    "/v1/observe": schemas.ObserveAnswer,
    "/v1/items": schemas.ItemsAnswer,
}
CHECKS = [
    checks.not_a_server_error,
    specified.status_code_conformance,
    specified.content_type_conformance,
    specified.response_schema_conformance,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(
        mirrors.write_recommender(tmp_path_factory.mktemp("fuzzed") / "recommender"), timeout_seconds=60
    ) as running:
        yield running
    assert not running.failures


def fuzz(server: Served, examples: int) -> Counter[int]:
    """Ask every endpoint; the statuses of the answers."""
    statuses: Counter[int] = Counter()
    api = openapi.from_dict(server.client.get("/openapi.json").json())
    for path in (*POSTS, *GETS):
        operation = api[path]["POST" if path in POSTS else "GET"]
        # A GET takes nothing that could be wrong.
        for mode in GenerationMode if path in POSTS else [GenerationMode.POSITIVE]:

            @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                answer = case.call(base_url=str(server.client.base_url), timeout=HANGS_AFTER_SECONDS)
                statuses[answer.status_code] += 1
                case.validate_response(answer, checks=CHECKS)

            ask()
    return statuses


def test_requests_of_the_schema_and_against_it_are_answered_as_it_says(server: Served):
    statuses = fuzz(server, 3)
    assert statuses[200]
    assert statuses[422]


@pytest.mark.slow
def test_two_thousand_of_them(server: Served, tell: Callable[[str], None]):
    statuses = fuzz(server, 260)
    told = ", ".join(f"{status}: {count:,}" for status, count in sorted(statuses.items()))
    tell(
        f"serving, {statuses.total():,} requests of schemathesis by status: {told}; 0 hung, 0 were errors of the server"
    )
    assert statuses.total() >= 2_000
    assert max(statuses) < 500


NUMBERS = st.sampled_from(
    ["1e999", "-0", "1E400", "0.1e-400", str(2**63), str(-(2**63)), "9" * 400, "NaN", "true", "null"]
)
TEXTS = st.text(max_size=4).map(json.dumps) | st.sampled_from(
    ['"\\ud800"', '"\\u0000"', '"\\udc00\\ud800"', '"' + "x" * 300 + '"']
)
NAMES = st.sampled_from(
    ["user_id", "history", "k", "rules", "explain", "items", "events", "item_id", "actions", "upsert", "delete"]
)
BODIES = st.recursive(
    NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
        | st.lists(st.tuples(NAMES | TEXTS.map(json.loads), inner), max_size=3).map(
            lambda pairs: "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in pairs) + "}"
        )
    ),
    max_leaves=8,
).map(str.encode) | st.binary(max_size=20)


@pytest.mark.parametrize("path", POSTS)
def test_bodies_that_are_nearly_right_are_answered_or_refused(server: Served, path: str):
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(BODIES)
    @example(b'{"user_id": "\\u0000"}')
    @example(b'{"history": [9223372036854775807, -9223372036854775808, 0]}')
    @example(b'{"history": [], "rules": {"retrieval_weight": 1e308, "action_values": {"click": 1e308, "like": 1e308}}}')
    @example(
        b'{"history": [], "rules": {"blocked_categories": [2147483647], "seed": 9223372036854775807, "exploration": 0.9}}'
    )
    def ask(body: bytes) -> None:
        answer = server.client.post(
            path, content=body, headers={"content-type": "application/json"}, timeout=HANGS_AFTER_SECONDS
        )
        if answer.status_code == httpx.codes.OK:
            POSTS[path].model_validate(answer.json())
        else:
            assert answer.status_code in (400, 404, 422), answer.text
            schemas.ErrorAnswer.model_validate(answer.json())

    ask()
