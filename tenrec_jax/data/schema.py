"""Every file that can be read: its columns, what each is for and which values are allowed.

Column names are written here alone.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

from tenrec_jax.errors import UserError

ACTIONS = ("click", "like", "share", "follow")

# Columns of the table on disk that stand for a source's user and item ids; the others keep their names.
USER, ITEM = "user", "item"
# Columns of encoded rows that are counted and not kept: whether the row contradicts what its user or item was on an earlier row.
CONFLICTS = ("user_feature_conflicts", "item_feature_conflicts")

NULL = r"\N"
_INT64 = 2**63 - 1


class Role(Enum):
    """What a column may be used for. A post-exposure column is known only after the label and is never a feature."""

    USER = "user"
    ITEM = "item"
    ACTION = "action"
    USER_FEATURE = "user feature"
    ITEM_FEATURE = "item feature"
    HISTORY = "history"
    POST_EXPOSURE = "post-exposure"
    TIME = "time"


@dataclass(frozen=True)
class Column:
    r"""A column of a source.

    Attributes:
        name: as in the header.
        role: its use.
        dtype: type in the table on disk, "string" for ids and categories that are text.
        low, high: allowed values, both included; they mean nothing for text.
        nulls: the texts that stand for a missing value, which is a null on disk.
        form: how values are written. "plain": an integer type admits plain decimal integers alone, a float type any decimal number;
            "number": any decimal number, whole where the type is an integer (1.0); "flag": True, False or a number that is 0 or 1;
            "text": anything that is UTF-8 and not empty; "time": a decimal number, or a date and time as in ISO 8601 (seconds since
            1970 on disk).
        feature: the field of `Users` or `Items` that it fills. There 0 means missing: a nullable column's value v
            becomes v + 1, any other column has its own 0 for it.
        remedy: what a person can do about a bad value, where that is not to correct it.
    """

    name: str
    role: Role
    dtype: str
    low: float = -_INT64 - 1
    high: float = _INT64
    nulls: tuple[str, ...] = ()
    form: Literal["plain", "number", "flag", "text", "time"] = "plain"
    feature: str = ""
    remedy: str = ""

    @property
    def is_integer(self) -> bool:
        """Whether its type on disk is an integer type."""
        return self.dtype.startswith("int")


@dataclass(frozen=True)
class Kind:
    """A format of log.

    Attributes:
        name: as in `--kind`.
        columns: in the order of the source.
        has_exposures: whether rows without a click are logged.
        file: the published file's name; empty where anybody's file will do.
        mapped: whether columns are found by name in any order, and others are not read (a user's own log).
    """

    name: str
    columns: tuple[Column, ...]
    has_exposures: bool
    file: str = ""
    mapped: bool = False

    @property
    def header(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return tuple(column.name for column in self.columns)

    @property
    def actions(self) -> tuple[str, ...]:
        """The labelled actions, in the order of `ACTIONS`; clicks where none is labelled: every row is one then."""
        found = {column.feature for column in self.with_role(Role.ACTION)}
        return tuple(action for action in ACTIONS if action in found) or ACTIONS[:1]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the columns that hold the labels of `actions`."""
        columns = {column.feature: column.name for column in self.with_role(Role.ACTION)}
        return tuple(columns.get(action, action) for action in self.actions)

    def with_role(self, role: Role) -> tuple[Column, ...]:
        """The columns of one role, in order."""
        return tuple(column for column in self.columns if column.role is role)


_USER_ID = Column("user_id", Role.USER, "int64", 0)
_ITEM_ID = Column("item_id", Role.ITEM, "int64", 0)
_CLICK, _LIKE, _SHARE, _FOLLOW = (Column(action, Role.ACTION, "int8", 0, 1, feature=action) for action in ACTIONS)
_ONLY_CLICKS = replace(_CLICK, low=1)
_GENDER = Column("gender", Role.USER_FEATURE, "int8", 0, 2, feature="gender")
_AGE = Column("age", Role.USER_FEATURE, "int8", 0, 7, feature="age")
_VIDEO_CATEGORY = Column("video_category", Role.ITEM_FEATURE, "int8", 0, 1, nulls=(NULL,), feature="category")
_WATCHING = Column("watching_times", Role.POST_EXPOSURE, "int32", 0, 2**31 - 1)
_VIDEO = (_USER_ID, _ITEM_ID, _CLICK, _FOLLOW, _LIKE, _SHARE, _VIDEO_CATEGORY, _WATCHING, _GENDER, _AGE)
_CLICKED_VIDEO = tuple(_ONLY_CLICKS if column is _CLICK else column for column in _VIDEO)
_HISTORY = tuple(Column(f"hist_{k}", Role.HISTORY, "int64", 0) for k in range(1, 11))

# Articles: numbers may be written 1.0, a missing value is empty or \N. Counts and scores of the item are totals over the whole
# period of the log, so they are known only after the exposure.
_MISSING = ("", NULL)


def _after(name: str, form: Literal["number", "flag"] = "number") -> Column:
    dtype, high = ("int8", 1.0) if form == "flag" else ("float64", 2.0**53)
    return Column(name, Role.POST_EXPOSURE, dtype, 0, high, nulls=_MISSING, form=form)


_ARTICLE_COUNTS = tuple(
    _after(name)
    for name in ("click_count", "like_count", "comment_count", "read_percentage", "item_score1", "item_score2")
)
_ARTICLE_CATEGORIES = (
    Column("category_second", Role.ITEM_FEATURE, "int32", 0, 2**31 - 2, nulls=_MISSING, form="number"),
    Column("category_first", Role.ITEM_FEATURE, "int32", 0, 2**31 - 2, _MISSING, "number", feature="category"),
)
_ARTICLE_CLICK = replace(_CLICK, low=1, form="number")
_ARTICLE_HEAD = (_USER_ID, _ITEM_ID, _ARTICLE_CLICK, _GENDER, _AGE)
_ARTICLE_ACTIONS = (
    *(replace(action, form="flag") for action in (_SHARE, _LIKE, _FOLLOW)),
    _after("favorite", "flag"),
)
_ARTICLE_TAIL = (_after("read", "flag"), _after("read_time"), *_ARTICLE_ACTIONS)
_QB_ARTICLE = (*_ARTICLE_HEAD, _after("exposure_count"), *_ARTICLE_COUNTS, *_ARTICLE_CATEGORIES, _after("item_score3"))
_COLD = (*_ARTICLE_HEAD, *_ARTICLE_COUNTS, *_ARTICLE_CATEGORIES, _after("item_score3"), *_ARTICLE_TAIL)
_TASK_1 = (_USER_ID, _ITEM_ID, replace(_CLICK, form="number"), _GENDER, _AGE, _after("read", "flag"), *_ARTICLE_ACTIONS)
_TASK_3 = (_USER_ID, _ITEM_ID, replace(_CLICK, form="number"), _GENDER, _AGE)

_MOVIELENS = (
    Column("user_id", Role.USER, "int64", 1),
    Column("item_id", Role.ITEM, "int64", 1),
    Column("rating", Role.POST_EXPOSURE, "float32", 0.5, 5),
    Column("timestamp", Role.TIME, "float64", 0, 2**53),
    _CLICK,
    _LIKE,
    Column("category", Role.ITEM_FEATURE, "int8", 0, 126, nulls=(NULL,), feature="category"),
    Column("gender", Role.USER_FEATURE, "int8", 0, 2, feature="gender"),
    Column("age", Role.USER_FEATURE, "int8", 0, 126, feature="age"),
)
_SEQUENCES = (Column("user", Role.USER, "int64"), Column("item", Role.ITEM, "int64"), _CLICK)

CUSTOM = "custom"
KINDS = {
    kind.name: kind
    for kind in (
        Kind("qb_video", _VIDEO, has_exposures=True, file="QB-video.csv"),
        Kind("qk_video", _VIDEO, has_exposures=True, file="QK-video.csv"),
        Kind("ctr_1m", _VIDEO + _HISTORY, has_exposures=True, file="ctr_data_1M.csv"),
        Kind("sbr_1m", _CLICKED_VIDEO, has_exposures=False, file="sbr_data_1M.csv"),
        Kind("qb_article", _QB_ARTICLE, has_exposures=False, file="QB-article.csv"),
        Kind("qk_article", _QB_ARTICLE + _ARTICLE_TAIL, has_exposures=False, file="QK-article.csv"),
        Kind("cold", _COLD, has_exposures=False, file="cold_data.csv"),
        Kind("task_0", _VIDEO, has_exposures=True, file="task_0.csv"),
        Kind("task_1", _TASK_1, has_exposures=True, file="task_1.csv"),
        Kind("task_2", _VIDEO, has_exposures=True, file="task_2.csv"),
        Kind("task_3", _TASK_3, has_exposures=True, file="task_3.csv"),
        Kind("sequences", _SEQUENCES, has_exposures=False),
        Kind("movielens", _MOVIELENS, has_exposures=True),
    )
}
TWIN_KINDS = ("qb_video", "ctr_1m")


def kind_named(name: str) -> Kind:
    """The kind of that name. The kind "custom" has no columns of its own: see `custom_kind`.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    if name not in KINDS:
        close = difflib.get_close_matches(name, KINDS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(f"Unknown kind {name!r}.{hint} The kinds are {', '.join([*KINDS, CUSTOM])}.")
    return KINDS[name]


def kinds_with_header(header: tuple[str, ...]) -> list[str]:
    """Names of the published files' kinds whose header is exactly `header`."""
    return [kind.name for kind in KINDS.values() if kind.file and kind.header == header]


# What a column of a user's own log can be mapped to.
_FEATURES = (Role.USER_FEATURE, Role.ITEM_FEATURE)
_CUSTOM_ROLES = {
    "user": Column("", Role.USER, "string", form="text"),
    "item": Column("", Role.ITEM, "string", form="text"),
    **{action: Column("", Role.ACTION, "int8", 0, 1, form="flag", feature=action) for action in ACTIONS},
    "gender": Column("", Role.USER_FEATURE, "int32", 0, 2**31 - 2, _MISSING, "number", feature="gender"),
    "age": Column("", Role.USER_FEATURE, "int32", 0, 2**31 - 2, _MISSING, "number", feature="age"),
    "category": Column("", Role.ITEM_FEATURE, "string", nulls=_MISSING, form="text", feature="category"),
    "time": Column("", Role.TIME, "float64", -(2**53), 2**53, form="time"),
}


def custom_kind(columns: Mapping[str, str]) -> Kind:
    """The kind of a user's own log.

    Args:
        columns: which column of the log stands for what, for example `{"user": "uid", "item": "vid", "click": "watched"}`. User and
            item are needed. Without click every row is a click, and other actions cannot be mapped. Ids are text until
            `id_types.typed_id` says otherwise.

    Raises:
        UserError: an unknown or missing role, a column that is named twice, or one with a name that the table needs for its own.
    """
    for role in columns:
        if role not in _CUSTOM_ROLES:
            close = difflib.get_close_matches(role, _CUSTOM_ROLES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"columns: {role!r} is nothing a column can stand for.{hint} Known: {', '.join(_CUSTOM_ROLES)}."
            )
    missing = [role for role in ("user", "item") if role not in columns]
    if missing:
        raise UserError(f"columns: say which column of the log is the {' and the '.join(missing)}.")
    wrong = [role for role, name in columns.items() if not isinstance(name, str) or not name]
    if wrong:
        raise UserError(f"columns: {wrong[0]} must be the name of a column, not {columns[wrong[0]]!r}.")
    twice = [name for name in columns.values() if list(columns.values()).count(name) > 1]
    if twice:
        raise UserError(f"columns: {twice[0]!r} stands for two things.")
    if "click" not in columns and set(columns) & set(ACTIONS):
        raise UserError("columns: name the column of clicks too; without one, every row is a click and nothing else.")
    own = {USER, ITEM, *CONFLICTS} | (set() if "click" in columns else {"click"})
    taken = [name for role, name in columns.items() if role not in ("user", "item") and name in own]
    if taken:
        raise UserError(f"columns: the table has a column {taken[0]!r} of its own. Give the log's column another name.")
    mapped = tuple(replace(_CUSTOM_ROLES[role], name=name) for role, name in columns.items())
    return Kind(CUSTOM, mapped, has_exposures="click" in columns, mapped=True)


def check_features(columns: Mapping[str, str]) -> None:
    """Refuse a mapping that makes a feature of what is known only after the exposure, such as `watching_times`.

    Args:
        columns: as for `custom_kind`.

    Raises:
        UserError: it does.
    """
    known_after = {column.name for kind in KINDS.values() for column in kind.with_role(Role.POST_EXPOSURE)}
    for role in (role for role, column in _CUSTOM_ROLES.items() if column.role in _FEATURES):
        if str(columns.get(role)) in known_after:
            raise UserError(
                f"columns: {columns[role]!r} is known only after the exposure, so as a feature ({role}) it tells the label. "
                "Leave it out; if it is something else in your log, say allow_post_event_features."
            )


@dataclass(frozen=True)
class MovieLensLayout:
    """One edition of MovieLens-100K: file names and fields, in order.

    Attributes:
        ratings, users, items: file names.
        separator, encoding: of users and items; ratings are tab-separated ASCII in both editions.
        has_header: whether each file begins with the names of its fields.
        ratings_fields, user_fields, item_fields: names of the fields. Users begin with id, age, gender; items with id.
        genres_from: place of the items' first genre flag, or of the one field that lists genres.
        genre_flags: names of the flags; empty where genres are listed by name.
    """

    ratings: str
    users: str
    items: str
    separator: str
    encoding: str
    has_header: bool
    ratings_fields: tuple[str, ...]
    user_fields: tuple[str, ...]
    item_fields: tuple[str, ...]
    genres_from: int
    genre_flags: tuple[str, ...] = ()


GENDERS = {"": 0, "M": 1, "F": 2}
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
MOVIELENS_LAYOUTS = (
    MovieLensLayout(
        ratings="u.data",
        users="u.user",
        items="u.item",
        separator="|",
        encoding="latin-1",
        has_header=False,
        ratings_fields=("user_id", "item_id", "rating", "timestamp"),
        user_fields=("user_id", "age", "gender", "occupation", "zip_code"),
        item_fields=("item_id", "movie_title", "release_date", "video_release_date", "imdb_url", *_GENRES),
        genres_from=5,
        genre_flags=_GENRES,
    ),
    MovieLensLayout(
        ratings="ml-100k.inter",
        users="ml-100k.user",
        items="ml-100k.item",
        separator="\t",
        encoding="utf-8",
        has_header=True,
        ratings_fields=("user_id:token", "item_id:token", "rating:float", "timestamp:float"),
        user_fields=("user_id:token", "age:token", "gender:token", "occupation:token", "zip_code:token"),
        item_fields=("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq"),
        genres_from=3,
    ),
)
