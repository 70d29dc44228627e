r"""Texts to typed values, strictly: what a person would not write in that column is refused with the reason.

`parse` does a whole column at once and says only whether all of it is right; `problem_of` explains one value. They agree.
"""

import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tenrec_jax.data.arrow import as_numpy
from tenrec_jax.data.schema import Column

NUMBER = r"[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?"
_INTEGER = r"0|-?[1-9][0-9]{0,18}"
_WHOLE = r"[0-9]+(\.0*)?"
_TRUE, _FALSE = ("True", "true", "1", "1.0"), ("False", "false", "0", "0.0")
_DATE_TIME = r"[0-9]{4}-[0-9]{2}-[0-9]{2}([ T][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?)?Z?"


def parse(column: Column, texts: pa.StringArray) -> pa.Array | None:
    """The column's values in its type, null where the text stands for a missing value; None if any is not allowed."""
    if column.nulls:
        texts = pc.if_else(pc.is_in(texts, pa.array(column.nulls)), None, texts)
    if column.form == "text":
        return texts if pc.all(_is_text(texts), min_count=0).as_py() else None
    if column.form == "flag":
        value_set = pa.array([*_FALSE, *_TRUE])
        index = pc.index_in(texts, value_set)
        if index.null_count > texts.null_count:
            return None
        return in_range(column, pc.greater_equal(index, len(_FALSE)).cast(pa.float64()))
    try:
        values = texts.cast(pa.int64() if column.is_integer and column.form == "plain" else pa.float64())
    except pa.ArrowInvalid:
        return _date_times(column, texts) if column.form == "time" else None
    # The cast takes more than numbers as people write them: 007, 0x1F, nan. An integer written back must be what was read.
    if column.is_integer and column.form == "plain":
        plain = pc.equal(values.cast(pa.string()), texts)
    else:
        pattern = _WHOLE if column.is_integer else ("-?" if column.low < 0 else "") + NUMBER
        plain = pc.match_substring_regex(texts, f"^({pattern})$")
    return in_range(column, values) if pc.all(plain, min_count=0).as_py() else None


def in_range(column: Column, values: pa.Array) -> pa.Array | None:
    """Values in the column's type, or None if any is out of its range or, where it holds integers, not whole."""
    extremes = pc.min_max(values)
    low, high = extremes["min"].as_py(), extremes["max"].as_py()
    if low is not None and not (column.low <= low and high <= column.high):
        return None
    if column.is_integer and pa.types.is_floating(values.type):
        number = as_numpy(pc.fill_null(values, 0))
        if not (np.isfinite(number) & (number == np.floor(number))).all():
            return None
    if pa.types.is_floating(values.type) and pc.any(pc.is_nan(values), min_count=0).as_py():
        return None
    return values.cast(column.dtype)


def problem_of(column: Column, value: bytes) -> str:
    """What is wrong with a value; empty if nothing is."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = None
    if text is not None and text in column.nulls:
        return ""
    if not value:
        return "is empty"
    if b"\0" in value:
        return "holds a NUL byte"
    reason = "is not UTF-8" if text is None and column.form == "text" else _reason(column, text or "")
    if not reason:
        return ""
    return (
        reason
        + (f", nor {NULL_NAMES[column.nulls]}" if column.nulls else "")
        + (f"; {column.remedy}" if column.remedy else "")
    )


NULL_NAMES = {(r"\N",): r"\N", ("", r"\N"): r"empty, nor \N"}


def _reason(column: Column, text: str) -> str:
    if column.form == "text":
        return ""
    if column.form == "flag":
        return "" if text in (*_TRUE, *_FALSE) else "is neither True, False, 0 nor 1"
    if column.form == "plain" and column.is_integer:
        if not re.fullmatch(_INTEGER, text, re.ASCII):
            return "is not a plain integer of at most 19 digits"
        return _outside(column, int(text))
    if column.is_integer:
        if not re.fullmatch(_WHOLE, text, re.ASCII):
            return "is not a whole number"
    elif not re.fullmatch(("-?" if column.low < 0 else "") + NUMBER, text, re.ASCII):
        if column.form == "time":
            is_date = re.fullmatch(_DATE_TIME, text, re.ASCII) and _date_times(column, pa.array([text])) is not None
            return "" if is_date else "is neither a number nor a date and time such as 2021-09-17 08:30:00"
        return "is not a plain number"
    return _outside(column, float(text))


def _outside(column: Column, number: float) -> str:
    inside = column.low <= number <= column.high and math.isfinite(number)
    return "" if inside else f"is not between {column.low} and {column.high}"


def _is_text(texts: pa.StringArray) -> pa.BooleanArray:
    return pc.and_(pc.greater(pc.binary_length(texts), 0), pc.invert(pc.match_substring(texts, "\0")))


def _date_times(column: Column, texts: pa.StringArray) -> pa.Array | None:
    """Seconds since 1970 of dates and times (UTC where no zone is given); numbers may stand among them."""
    is_date = pc.match_substring_regex(texts, f"^{_DATE_TIME}$")
    dates = pc.replace_substring(pc.if_else(is_date, texts, None), "Z", "")
    numbers = pc.if_else(is_date, None, texts)
    try:
        seconds = dates.cast(pa.timestamp("us")).cast(pa.int64()).cast(pa.float64())
    except pa.ArrowInvalid:
        return None
    others = parse(Column(column.name, column.role, column.dtype, column.low, column.high), numbers)
    return None if others is None else pc.coalesce(pc.divide(seconds, 1e6), others)


def text_of(value: bytes) -> str:
    """Bytes as text for a person: what is not UTF-8 is escaped."""
    return value.decode("utf-8", "backslashreplace")
