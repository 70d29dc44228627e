"""Whether the ids of a log are integers or text, where the kind leaves that open."""

import re
from collections.abc import Sequence
from dataclasses import replace

from tenrec_jax.data.schema import Column
from tenrec_jax.data.values import problem_of, text_of
from tenrec_jax.errors import UserError

AUTO, INTEGER, TEXT = "auto", "integer", "text"
ID_TYPES = (AUTO, INTEGER, TEXT)
LOOKED_AT = 1000
_DECIMAL = re.compile(rb"[+-]?[0-9]+(\.[0-9]*([eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)")
# How a person who may be on the command line or in Python says so.
_SAY_TEXT = "if ids are text, ingest with ids = text (--ids text)"


def typed_id(column: Column, ids: str, first: Sequence[bytes], place: str) -> Column:
    """An id column as integers or text.

    Args:
        column: whose values are ids.
        ids: one of `ID_TYPES`. "auto" decides by the first value: a text that follows an integer is a bad value later on, and integers
            alone after a text are refused, since that text is a header line or damaged.
        first: the log's first values, `LOOKED_AT` or so.
        place: file and line of the first one, for messages.

    Raises:
        UserError: "auto" cannot tell.
    """
    integers = replace(column, dtype="int64", form="plain")
    if ids == TEXT:
        return replace(column, dtype="string", form="text")
    if ids == INTEGER:
        return integers
    if first and _DECIMAL.fullmatch(first[0]):
        raise UserError(
            f"{place}: column {column.name}: {text_of(first[0])!r} is a decimal number. Write ids as integers; {_SAY_TEXT}."
        )
    is_integer = [not problem_of(integers, value) for value in first]
    if is_integer[:1] == [True]:
        return replace(integers, remedy=f"the first id is; {_SAY_TEXT}")
    if len(first) > 1 and all(is_integer[1:]):
        raise UserError(
            f"{place}: column {column.name}: {text_of(first[0])!r} is text, and the ids after it are integers. If it is damaged or of a "
            f"header line, remove it; {_SAY_TEXT}."
        )
    return replace(column, dtype="string", form="text")
