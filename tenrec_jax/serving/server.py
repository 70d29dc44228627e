"""The server process: a socket, uvicorn on it, and an end that answers what is in flight."""

import logging
import math
import socket

import uvicorn

from tenrec_jax.errors import UserError
from tenrec_jax.serving.app import create_app
from tenrec_jax.serving.service import ServeOptions

LOG = logging.getLogger("tenrec_jax.serving")
# Longer than proxies keep idle connections (60 seconds is usual): whoever closes first must not be the one that may be asked just then.
KEEP_ALIVE_SECONDS = 75


def serve(options: ServeOptions, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; requests in flight are answered, new ones are not taken.

    Raises:
        UserError: the address cannot be listened on, or the folder holds no recommender that can be loaded.
    """
    failures: list[BaseException] = []

    def end(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    server = make_server(create_app(options, end), options)
    with listening(host, port) as listener:
        address = "http://{}:{}".format(
            *(f"[{part}]" if ":" in str(part) else part for part in listener.getsockname()[:2])
        )
        LOG.info("listening on %s, loading %s", address, options.folder)
        server.run([listener])
    if failures:
        raise failures[0]


def make_server(app: object, options: ServeOptions) -> uvicorn.Server:
    """Uvicorn for an application of `create_app`."""
    # What is in flight at the end has its own time limits: none takes longer than both.
    patience = math.ceil(options.limits.body_seconds + options.batch.timeout_seconds) + 1
    return uvicorn.Server(
        uvicorn.Config(
            app,  # type: ignore[arg-type]
            http="h11",
            ws="none",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=patience,
        )
    )


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error}. Name another port, or 0 for any free one.") from error
    # Connections inherit it. Otherwise an answer's body waits for the client's late word about its head, some 40 ms: asyncio sets this on
    # sockets alone that were made with TCP's number.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
