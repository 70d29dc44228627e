"""Settings from values that come from outside, a file or a command line: all that is wrong with them is told at once."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from tenrec_jax.errors import UserError
from tenrec_jax.settings import SettingsError


def read_settings(values: Mapping[str, Any], kind: type, path: str) -> Any:
    """Build a dataclass from nested mappings.

    Args:
        values: one entry a field; missing fields take their defaults.
        kind: the dataclass.
        path: dotted name of `values`, for messages.

    Raises:
        UserError: lists all that is wrong, a line each: unknown keys (with the nearest known one), missing keys, values of the wrong type,
            out of range or at odds with each other.
    """
    problems: list[str] = []
    built = _built(values, kind, path, problems)
    if problems:
        raise UserError("\n".join(problems))
    return built


def refuse_overrides(values: Mapping[str, str], kind: type) -> None:
    """Refuse settings of a command line that no config can have, by their dotted keys ("config.seed") and texts; `kind` is the dataclass.

    Raises:
        UserError: lists all: unknown keys, with the nearest known one, and texts that are no value of the key's type.
    """
    problems: list[str] = []
    for key, text in values.items():
        hint: Any = kind
        *parents, last = key.split(".")[1:]
        path = "config"
        for name in (*parents, last):
            hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) and isinstance(hint, type) else {}
            if name not in hints:
                problems.append(_unknown(path, name, list(hints)))
                break
            hint, path = hints[name], f"{path}.{name}"
        else:
            if hint is bool and text.lower() not in ("", "true", "false", "1", "0", "yes", "no", "t", "f", "y", "n"):
                problems.append(f"{key} is {text!r}; it must be true or false.")
            elif hint in (int, float) and not _reads_as(hint, text):
                problems.append(f"{key} is {text!r}; it must be {_a(hint)}.")
    if problems:
        raise UserError("\n".join(problems))


def _reads_as(kind: type, text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _unknown(path: str, key: str, known: Sequence[str]) -> str:
    if not known:
        return f"{path}.{key} is not a setting: {path} holds a value, and no settings."
    near = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean {path}.{near[0]}?" if near else f" Known keys: {', '.join(known)}."
    return f"{path}.{key} is not a setting.{hint}"


def _built(values: Mapping[str, Any], kind: type, path: str, problems: list[str]) -> Any:
    """The dataclass; None where there are problems, which are added to the list."""
    hints, before = typing.get_type_hints(kind, include_extras=True), len(problems)
    problems += [_unknown(path, str(key), list(hints)) for key in values if key not in hints]
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if missing:
        problems.append(f"{path} lacks {', '.join(missing)}.")
    typed = {key: _value(value, hints[key], f"{path}.{key}", problems) for key, value in values.items() if key in hints}
    if len(problems) > before:
        return None
    try:
        return kind(**typed)
    except SettingsError as error:
        problems += [f"{path}.{name} {text}." if name else f"{path}: {text}." for name, text in error.problems]
    return None


def _value(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    if typing.get_origin(hint) is Annotated:
        plain, bounds = typing.get_args(hint)
        found = len(problems)
        value = _value(value, plain, path, problems)
        if len(problems) == found and not bounds.holds(value):
            problems.append(f"{path} is {value}; it must be {bounds}.")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Mapping):
            return _built(value, hint, path, problems)
        problems.append(f"{path} is {value!r}; it must hold {', '.join(typing.get_type_hints(hint))}.")
    elif typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        problems.append(f"{path} is {value!r}; it must be one of {', '.join(map(repr, typing.get_args(hint)))}.")
    elif typing.get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            element = typing.get_args(hint)[0]
            return tuple(_value(entry, element, f"{path}[{i}]", problems) for i, entry in enumerate(value))
        problems.append(f"{path} is {value!r}; it must be a list.")
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint or type(value) in typing.get_args(hint):
        return value
    else:
        problems.append(f"{path} is {value!r}, {_a(type(value))}; it must be {_a(hint)}.")
    return None


def _a(kind: Any) -> str:
    if typing.get_args(kind):
        return " or ".join(map(_a, typing.get_args(kind)))
    return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"
