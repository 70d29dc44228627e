"""The application: routes, pages and errors, behind the guard."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp

from tenrec_jax import __version__
from tenrec_jax.errors import UserError
from tenrec_jax.requests import RequestError, UnknownUserError
from tenrec_jax.serving.batcher import BusyError
from tenrec_jax.serving.guard import ApiError, Guard
from tenrec_jax.serving.live import NotReadyError
from tenrec_jax.serving.pages import PAGE, Page, documentation
from tenrec_jax.serving.routes import router
from tenrec_jax.serving.service import ServeOptions, Service
from tenrec_jax.serving.strict_json import JsonError

PUBLIC = ("/", "/healthz", "/readyz")
ABOUT = "A two-stage recommender: retrieval, ranking and rules. Errors name the field and what to do."


def create_app(options: ServeOptions, on_failure: Callable[[BaseException], None]) -> ASGIApp:
    """The whole server as an ASGI application.

    Args:
        on_failure: called if nothing can be answered any more, with a `UserError` where the folder holds no recommender at the start.
    """
    service = Service(options, on_failure)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="tenrec_jax", version=__version__, description=ABOUT, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service = service
    app.include_router(router)
    app.add_api_route("/docs", _serve(documentation(app.openapi())), include_in_schema=False)
    if PAGE.exists():
        app.add_api_route("/", _serve(Page.of(PAGE.read_text(encoding="utf-8"))), include_in_schema=False)
    for kind in (ApiError, RequestValidationError, HTTPException, UserError, BusyError, NotReadyError, TimeoutError):
        app.add_exception_handler(kind, _tell)
    app.add_exception_handler(JsonError, _tell)
    app.add_exception_handler(Exception, _tell)
    endpoints = [*app.openapi()["paths"], "/", "/docs", "/openapi.json"]
    return Guard(app, options.limits, service.metrics, endpoints=endpoints, public=PUBLIC)


def _serve(page: Page) -> Callable:
    async def shown() -> Response:
        return HTMLResponse(page.html, headers={"content-security-policy": page.policy})

    return shown


async def _tell(request: Request, error: Exception) -> Response:
    return _refusal(error).response(request.scope["state"]["request_id"])


def _refusal(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case JsonError():
            return ApiError(400, str(error), "body")
        case RequestValidationError():
            return _invalid(error)
        case UnknownUserError():
            return ApiError(404, error.message, error.field)
        case RequestError():
            return ApiError(422, error.message, error.field or None)
        case UserError():
            return ApiError(422, str(error))
        case BusyError():
            return ApiError(503, "Too many requests wait. Ask again a little later.", None, {"retry-after": "1"})
        case NotReadyError():
            return ApiError(503, "The recommender is still being loaded.", None, {"retry-after": "1"})
        case TimeoutError():
            return ApiError(504, "The answer took too long and was given up.")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), None, dict(error.headers or {}))
        case _:
            return ApiError(500, "The server failed; its log tells more under this request's id.")


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong, by the path to it: rules.blocked_items[3]."""
    first = error.errors()[0]
    path = ""
    for part in first["loc"][1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    message = first["msg"].removeprefix("Value error, ").removesuffix(".")
    return ApiError(422, f"{message[:1].upper()}{message[1:]}.", path or "body")
