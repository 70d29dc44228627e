"""The command `tenrec-jax serve`."""

import argparse
import logging
import math
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from tenrec_jax.errors import UserError
from tenrec_jax.user_states import BATCH_SIZES

if TYPE_CHECKING:
    from tenrec_jax.serving.service import ServeOptions

EXAMPLES = """examples:
  tenrec-jax serve runs/quickstart/recommender             http://127.0.0.1:8080 shows it, /docs tells its API
  tenrec-jax serve current --port 0                        any free port; told on standard error
  tenrec-jax serve current --host 0.0.0.0 --token_file t   reachable from elsewhere; who has the token may ask

  curl localhost:8080/v1/recommend -H 'Content-Type: application/json' -d '{"user_id": 1, "k": 5}'
  curl localhost:8080/v1/observe -H 'Content-Type: application/json' \\
       -d '{"user_id": 1, "events": [{"item_id": 12, "actions": ["click", "like"]}]}'

A new version without a pause: let DIR be a link, and turn it.
  ln -sfn runs/monday/recommender current && tenrec-jax serve current
  ln -sfn runs/tuesday/recommender next && mv -T next current
What was observed since the start is kept in memory, and taken over by the new version.
SIGTERM ends the server once it has answered what it was asked.
"""
DEFAULT_HOST, DEFAULT_PORT, SHORTEST_TOKEN = "127.0.0.1", 8080, 16


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `serve` to the command line."""
    serve = commands.add_parser(
        "serve",
        help="answer requests over HTTP, with a page to try it",
        description="Serves a recommender as JSON over HTTP, and a page that shows what it does.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("folder", type=Path, metavar="DIR", help="recommender that launch.py wrote, or a link to one")
    serve.add_argument("--host", default=DEFAULT_HOST, help="address to listen on (default: %(default)s, this machine)")
    serve.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 takes any free one (default: %(default)s)")
    serve.add_argument(
        "--token_file",
        type=Path,
        metavar="FILE",
        help=f"holds a text of {SHORTEST_TOKEN} characters or more, which clients must send as Authorization: Bearer TEXT",
    )
    _add_numbers(serve)
    serve.set_defaults(run=_serve)


def _add_numbers(serve: argparse.ArgumentParser) -> None:
    def number(flag: str, kind: type, default: float, meaning: str, most: float = math.inf) -> None:
        serve.add_argument(
            flag, type=_positive(kind, most), default=default, metavar="N", help=f"{meaning} (default: %(default)s)"
        )

    number("--max_batch", int, 16, "requests that are answered together at most; 1 answers one by one", BATCH_SIZES[-1])
    number("--batch_milliseconds", float, 2.0, "how long a request waits for others to be answered with")
    number("--max_waiting", int, 256, "requests that may wait; further ones are told to come again, with status 503")
    number("--timeout_seconds", float, 5.0, "after which a request is given up, with status 504")
    number("--max_body_bytes", int, 2**20, "of a request; a larger one has status 413")
    number("--body_seconds", float, 10.0, "in which the body of a request must arrive; later it has status 408")
    number("--watch_seconds", float, 5.0, "how often DIR is looked at for another version")


def _positive(kind: type, most: float) -> Callable[[str], float]:
    def parsed(text: str) -> float:
        value = kind(text)
        if not 0 < value <= most or value == math.inf:
            raise argparse.ArgumentTypeError(
                f"{text} is not above 0" + (f" and at most {most}" if most < math.inf else "")
            )
        return value

    # argparse names it where a text is no number.
    parsed.__name__ = kind.__name__
    return parsed


def _serve(options: argparse.Namespace) -> int:
    try:
        from tenrec_jax.serving.server import serve
    except ImportError as error:
        raise UserError(
            f'serve needs FastAPI and uvicorn ({error}). Install them: pip install "tenrec_jax[serve]"'
        ) from error
    told = _options(options)
    # JAX's libraries may have set up their own.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", force=True)
    logging.getLogger("tenrec_jax.serving").setLevel(logging.INFO)
    if told.limits.token is None and not _is_this_machine(options.host):
        logging.getLogger("tenrec_jax.serving").warning(
            "whoever reaches %s may ask: no --token_file is given", options.host
        )
    try:
        serve(told, options.host, options.port)
    except KeyboardInterrupt:
        return 130
    return 0


def _options(options: argparse.Namespace) -> "ServeOptions":
    from tenrec_jax.serving.batcher import BatchOptions
    from tenrec_jax.serving.guard import Limits
    from tenrec_jax.serving.service import ServeOptions

    token = None if options.token_file is None else read_token(options.token_file)
    return ServeOptions(
        options.folder,
        BatchOptions(options.max_batch, options.batch_milliseconds / 1e3, options.max_waiting, options.timeout_seconds),
        Limits(options.max_body_bytes, options.body_seconds, token),
        options.watch_seconds,
    )


def read_token(path: Path) -> str:
    """The token that a file holds.

    Raises:
        UserError: it cannot be read, or holds none that can be sent and is hard to guess.
    """
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"--token_file {path} cannot be read: {error}") from error
    if len(token) < SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise UserError(
            f"--token_file {path} must hold one word of {SHORTEST_TOKEN} characters or more, for example of: openssl rand -hex 32"
        )
    return token


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
