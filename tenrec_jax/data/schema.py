"""Every file that can be read: its columns, what each is for and which values are allowed.

Column names are written here alone.
"""

import difflib
from dataclasses import dataclass
from enum import Enum

from tenrec_jax.errors import UserError

ACTIONS = ("click", "like", "share", "follow")

# Columns of the table on disk that stand for a source's user and item ids; the others keep their names.
USER, ITEM = "user", "item"

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
        dtype: type in the table on disk; an integer type admits plain decimal integers alone.
        low, high: allowed values, both included.
        nullable: whether `\N` is allowed; it becomes a null on disk.
        feature: the field of `Users` or `Items` that it fills. There 0 means missing: a nullable column's value v
            becomes v + 1, any other column has its own 0 for it.
    """

    name: str
    role: Role
    dtype: str
    low: float
    high: float
    nullable: bool = False
    feature: str = ""


@dataclass(frozen=True)
class Kind:
    """A format of log.

    Attributes:
        name: as in `--kind`.
        columns: in the order of the source.
        has_exposures: whether rows without a click are logged.
        file: the published file's name; empty where anybody's file will do.
    """

    name: str
    columns: tuple[Column, ...]
    has_exposures: bool
    file: str = ""

    @property
    def header(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return tuple(column.name for column in self.columns)

    @property
    def actions(self) -> tuple[str, ...]:
        """The labelled actions, in the order of `ACTIONS`."""
        return tuple(action for action in ACTIONS if action in self.header)

    def with_role(self, role: Role) -> tuple[Column, ...]:
        """The columns of one role, in order."""
        return tuple(column for column in self.columns if column.role is role)


_USER_ID = Column("user_id", Role.USER, "int64", 0, _INT64)
_ITEM_ID = Column("item_id", Role.ITEM, "int64", 0, _INT64)
_CLICK, _LIKE, _SHARE, _FOLLOW = (Column(action, Role.ACTION, "int8", 0, 1) for action in ACTIONS)
_VIDEO = (
    _USER_ID,
    _ITEM_ID,
    _CLICK,
    _FOLLOW,
    _LIKE,
    _SHARE,
    Column("video_category", Role.ITEM_FEATURE, "int8", 0, 1, nullable=True, feature="category"),
    Column("watching_times", Role.POST_EXPOSURE, "int32", 0, 2**31 - 1),
    Column("gender", Role.USER_FEATURE, "int8", 0, 2, feature="gender"),
    Column("age", Role.USER_FEATURE, "int8", 0, 7, feature="age"),
)
_HISTORY = tuple(Column(f"hist_{k}", Role.HISTORY, "int64", 0, _INT64) for k in range(1, 11))
_MOVIELENS = (
    Column("user_id", Role.USER, "int64", 1, _INT64),
    Column("item_id", Role.ITEM, "int64", 1, _INT64),
    Column("rating", Role.POST_EXPOSURE, "float32", 0.5, 5),
    Column("timestamp", Role.TIME, "float64", 0, 2**53),
    _CLICK,
    _LIKE,
    Column("category", Role.ITEM_FEATURE, "int8", 0, 126, nullable=True, feature="category"),
    Column("gender", Role.USER_FEATURE, "int8", 0, 2, feature="gender"),
    Column("age", Role.USER_FEATURE, "int8", 0, 126, feature="age"),
)
_SEQUENCES = (
    Column("user", Role.USER, "int64", -_INT64 - 1, _INT64),
    Column("item", Role.ITEM, "int64", -_INT64 - 1, _INT64),
    _CLICK,
)

KINDS = {
    kind.name: kind
    for kind in (
        Kind("qb_video", _VIDEO, has_exposures=True, file="QB-video.csv"),
        Kind("qk_video", _VIDEO, has_exposures=True, file="QK-video.csv"),
        Kind("ctr_1m", _VIDEO + _HISTORY, has_exposures=True, file="ctr_data_1M.csv"),
        Kind("sequences", _SEQUENCES, has_exposures=False),
        Kind("movielens", _MOVIELENS, has_exposures=True),
    )
}
TWIN_KINDS = ("qb_video", "ctr_1m")


def kind_named(name: str) -> Kind:
    """The kind of that name.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    if name not in KINDS:
        close = difflib.get_close_matches(name, KINDS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(f"Unknown kind {name!r}.{hint} The kinds are {', '.join(KINDS)}.")
    return KINDS[name]


def kinds_with_header(header: tuple[str, ...]) -> list[str]:
    """Names of the published files' kinds whose header is exactly `header`."""
    return [kind.name for kind in KINDS.values() if kind.file and kind.header == header]


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
