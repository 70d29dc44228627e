"""JSON as a service should read it: what two readers could understand differently, or could not write again, is refused."""

import json
from collections import Counter
from typing import Any, NoReturn


class JsonError(ValueError):
    """A text is not JSON that is accepted; the message says why."""


def parsed(body: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        JsonError: it is no JSON, has a key twice, a number that JSON does not know, a text that is not Unicode, or is nested too deeply.
    """
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise JsonError("The body is nested too deeply.") from None
    except UnicodeError:
        raise JsonError("The body is not UTF-8, or a key in it is not Unicode.") from None
    except ValueError as error:
        raise JsonError(f"The body is not JSON: {error}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    # A lone surrogate in a key could not be told in an answer either.
    "".join(found).encode()
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"{twice!r} stands twice in an object")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
