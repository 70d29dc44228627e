"""The endpoints."""

import json
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST

from tenrec_jax import __version__, requests
from tenrec_jax.files import json_text
from tenrec_jax.recommender import Recommender
from tenrec_jax.serving import schemas, strict_json
from tenrec_jax.serving.guard import ApiError
from tenrec_jax.serving.run_files import run_of
from tenrec_jax.serving.service import Service

SAMPLE = 50
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorAnswer, "description": text}
    for status, text in {
        400: "The body is no JSON.",
        401: "The server's token is missing.",
        404: "The user, or the path, is not known.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        415: "The body is not application/json.",
        422: "A field cannot be; the answer names it.",
        503: "Busy, or not ready: ask again after Retry-After seconds.",
        504: "It took too long.",
    }.items()
}


class _StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = strict_json.parsed(await self.body())
        return self._json


class _StrictRoute(APIRoute):
    """Reads JSON strictly, and nothing but JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, has_body = super().get_route_handler(), self.body_field is not None

        async def strictly(request: Request) -> Response:
            strict = _StrictRequest(request.scope, request.receive)
            if has_body:
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "application/json":
                    raise ApiError(415, "Send the body as Content-Type: application/json.", "content-type")
                await strict.json()
            return await handle(strict)

        return strictly


async def _service(request: Request) -> Service:
    return request.app.state.service


router = APIRouter(route_class=_StrictRoute)
TheService = Annotated[Service, Depends(_service)]


@router.post("/v1/recommend", summary="Recommend items", response_model=schemas.RecommendAnswer, responses=REFUSALS)
async def recommend(body: schemas.RecommendBody, service: TheService) -> Response:
    """Items for a user of the log or of observations, or for anyone from a history: best first, with what led to their places."""
    answer, waited = await service.batcher.answer(body.asked())
    content = {name: value for name, value in vars(answer).items() if value is not None}
    return _timed(service, content, answer.milliseconds, waited)


@router.post("/v1/score", summary="Score given items", response_model=schemas.ScoreAnswer, responses=REFUSALS)
async def score(body: schemas.ScoreBody, service: TheService) -> Response:
    """The models' view of given items for somebody; no score depends on the other items."""

    def scored() -> tuple[str, tuple[requests.RecommendedItem, ...], float]:
        began, recommender = time.perf_counter(), service.live.recommender
        found = recommender.score(body.items, user_id=body.user_id, history=body.events)
        return recommender.version, found, 1e3 * (time.perf_counter() - began)

    (version, items, total), waited = await service.batcher.alone(scored)
    return _timed(service, {"items": items, "version": version}, {"total": total}, waited)


@router.post("/v1/observe", summary="Tell what a user did", response_model=schemas.ObserveAnswer, responses=REFUSALS)
async def observe(body: schemas.ObserveBody, service: TheService) -> Response:
    """Adds events to a user's state, in constant time; a user who was not known is from now on."""

    def observed() -> dict[str, Any]:
        recommender = service.live.recommender
        state = recommender.observe(body.user_id, [event.plain() for event in body.events])
        return {"version": recommender.version, **vars(state)}

    return _json((await service.batcher.alone(observed))[0])


@router.post("/v1/items", summary="Change the catalogue", response_model=schemas.ItemsAnswer, responses=REFUSALS)
async def items(body: schemas.ItemsBody, service: TheService) -> Response:
    """Adds or changes items, then deletes; what is wrong with one list leaves that list undone. The next answer knows of it."""

    def changed() -> dict[str, Any]:
        recommender = service.live.recommender
        try:
            recommender.upsert([requests.Item(item.item_id, item.category) for item in body.upsert])
        except requests.RequestError as error:
            raise requests.RequestError(error.field.replace("items", "upsert", 1), error.message) from error
        recommender.delete(body.delete)
        return {"version": recommender.version, "catalogue_size": recommender.catalogue_size}

    return _json((await service.batcher.alone(changed))[0])


@router.get("/v1/catalogue", summary="Tell the catalogue", response_model=schemas.CatalogueAnswer, responses=REFUSALS)
async def catalogue(service: TheService) -> Response:
    """Names, sizes, the default rules, and a few users and items to try."""
    return _json((await service.batcher.alone(lambda: _catalogue(service.live.recommender)))[0])


@router.get("/v1/run", summary="Tell the run", response_model=schemas.RunAnswer, responses=REFUSALS)
def run(service: TheService) -> Response:
    """Curves and results of the run in whose folder the recommender lies; 404 where it lies in none."""
    found = run_of(service.live.directory)
    if found is None:
        raise ApiError(404, "The recommender does not lie in the folder of a run.")
    return Response(json_text(found), media_type="application/json")


@router.get("/healthz", summary="Whether the process lives", response_model=schemas.Status)
async def healthz() -> Response:
    """Always 200."""
    return _json({"status": "alive"})


@router.get("/readyz", summary="Whether requests are answered", response_model=schemas.Status, responses=REFUSALS)
async def readyz(service: TheService) -> Response:
    """200 once a recommender is loaded and compiled, 503 before."""
    return _json({"status": "ready", "version": service.live.recommender.version})


@router.get("/version", summary="What answers", response_model=schemas.VersionAnswer, responses=REFUSALS)
async def version(service: TheService) -> Response:
    """Versions of the recommender and of the package, and when the recommender was put in place."""
    live = service.live
    return _json({"recommender": live.recommender.version, "package": __version__, "loaded_at": live.loaded_at})


@router.get("/metrics", summary="Numbers for Prometheus", response_class=Response)
async def metrics(service: TheService) -> Response:
    """Requests, times, batches and swaps, in Prometheus' text format."""
    return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


def _catalogue(recommender: Recommender) -> dict[str, Any]:
    users_are_text, items_are_text = recommender.ids_are_text
    return {
        "version": recommender.version,
        "actions": recommender.actions,
        "categories": recommender.categories,
        "catalogue_size": recommender.catalogue_size,
        "users": recommender.user_ids[:SAMPLE].tolist(),
        "items": recommender.catalogue(SAMPLE),
        "user_ids_are_text": users_are_text,
        "item_ids_are_text": items_are_text,
        "rules": recommender.rules,
        "ranked": recommender.is_ranked,
    }


def _timed(service: Service, content: dict[str, Any], stages: Mapping[str, float], waited: float) -> Response:
    """An answer that tells the time of its stages, in its body and in its head."""
    milliseconds = {**stages, "queue": 1e3 * waited}
    for stage, duration in milliseconds.items():
        service.metrics.stage_seconds.labels(stage).observe(duration / 1e3)
    timing = ", ".join(f"{stage};dur={duration:.2f}" for stage, duration in milliseconds.items())
    return _json(content | {"milliseconds": milliseconds}, {"server-timing": timing})


def _json(content: Mapping[str, Any], headers: dict[str, str] | None = None) -> Response:
    """Records are written by their fields."""
    return Response(json.dumps(content, default=vars, allow_nan=False), 200, headers, "application/json")
