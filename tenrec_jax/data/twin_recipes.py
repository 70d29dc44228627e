"""What the twin of each kind aims at: the numbers that differ from one of Tenrec's files to another.

QB-video has two regimes. The first 500,000 of its 2,442,299 rows show 160 rows a user, of which 43.51 % are clicks; the
others 62 rows a user and 76.4 %. The twin has both, in the same proportion of the rows whatever their number.

Popularity. With s = ln(M / rank) of an item among M and z the upper normal quantile of exp(-s), its weight is
exp(slope z - bend max(z, 0)^2): a log-normal law whose tail bends down, concave in log-log.

`ctr_1m`: one catalogue at every size, since that is what the published figures describe. One fixed law, fitted to
ctr_data_1M, gives at its 120 million rows the quantiles 3 / 51 / 799 of the rows per item to within a tenth, a Gini
coefficient above .88 and more than 45 % of the rows on the top 1 % of the items. The same law gives .77 % unseen test rows
there (published: .88); a log of it has 17.1 % at 1 million rows (18.0). Such a log is a sample: its own Gini coefficient is
near .63. It could not be .88 there: 18 % of unseen rows mean at least 144,000 items that training shows once (Good-Turing),
which bounds the Gini coefficient by about .80.

`qb_video`: a miniature. M grows with the rows, so that concentration (Gini .88, 45 % of rows on the top 1 %) is that of a
whole file at every size that users do not exhaust (from 1 million rows), and few test rows are on unseen items.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Rates over the exposures: of clicks, and of like, share, follow on rows with and without a click."""

    click: float
    given_click: tuple[float, float, float]
    without_click: tuple[float, float, float]


@dataclass(frozen=True)
class Crowd:
    """Users who are alike in law.

    A user's number of rows is length_median exp(length_spread e - length_bend max(e, 0)^2), e ~ N(0, 1), at most
    `length_cap`.

    Attributes:
        share: of the log's rows.
        user_bias: standard deviation of the users' click logits.
        propensity: the same for like, share, follow.
        least_clicks: clicks that are expected of everybody, at least.
    """

    share: float
    rates: Rates
    length_median: float
    length_spread: float
    length_bend: float
    length_cap: int
    mean_rows: float
    user_bias: float
    propensity: tuple[float, float, float]
    least_clicks: float


@dataclass(frozen=True)
class Popularity:
    """The law of the items' weights; see above.

    Attributes:
        items: M, or M for each row of the log if `miniature`.
        rarest: items expected on fewer rows than this are drawn as fewer, each expected on exactly so many; 0: none.
    """

    items: float
    miniature: bool
    slope: float
    bend: float
    rarest: float


@dataclass(frozen=True)
class Watching:
    """How often a video is watched, by what came of its exposure.

    Attributes:
        glance: cumulative probabilities of 0, 1, 2, ... times without a click or a like.
        stay: cumulative probabilities of 1, 2, ... times otherwise; what is left is geometric.
        stay_mean, liked_mean: means of the geometric part, counted from 1, without and with a like.
    """

    glance: tuple[float, ...]
    stay: tuple[float, ...]
    stay_mean: float
    liked_mean: float


@dataclass(frozen=True)
class Recipe:
    """Everything that a kind's twin is made from.

    Attributes:
        crowds: in the order of the file.
        item_bias: standard deviation of the items' click logits.
        waning: how much a user's click logit has fallen at his last row.
        repeats: share of exposures that repeat an earlier item on purpose.
        history: whether there are history columns, and rows are deleted for them.
    """

    crowds: tuple[Crowd, ...]
    popularity: Popularity
    watching: Watching
    item_bias: float
    waning: float
    repeats: float
    history: bool


def recipe_of(kind: str) -> Recipe:
    """The recipe of one of `TWIN_KINDS`."""
    return {"qb_video": _qb_video, "ctr_1m": _ctr_1m}[kind]()


def _qb_video() -> Recipe:
    head = Crowd(
        share=500_000 / 2_442_299,
        rates=Rates(0.4351, (0.0268, 0.0014, 0.0017), (0.0087, 0.00032, 0.00078)),
        length_median=97.0,
        length_spread=1.0,
        length_bend=0.0,
        length_cap=8_876,
        mean_rows=160.0,
        user_bias=0.88,
        propensity=(2.5, 1.6, 1.8),
        least_clicks=0.0,
    )
    tail = Crowd(
        share=1 - head.share,
        # Likes, shares and follows of the whole file less those of the head; the odds that a click brings are the head's.
        rates=Rates(0.764, (0.0078, 0.0014, 0.0011), (0.0025, 0.00032, 0.00054)),
        length_median=30.4,
        length_spread=1.2,
        length_bend=0.0,
        length_cap=8_876,
        mean_rows=62.4,
        user_bias=0.88,
        propensity=(2.5, 1.6, 1.8),
        least_clicks=0.0,
    )
    return Recipe(
        crowds=(head, tail),
        popularity=Popularity(items=0.1, miniature=True, slope=4.15, bend=0.14, rarest=0.0),
        watching=Watching(glance=(0.20, 0.92, 0.98), stay=(), stay_mean=2.4, liked_mean=2.5),
        item_bias=1.06,
        waning=0.0,
        repeats=0.0152,
        history=False,
    )


def _ctr_1m() -> Recipe:
    users = Crowd(
        share=1.0,
        rates=Rates(0.296, (0.0435, 0.0048, 0.0034), (0.0113, 0.0012, 0.0009)),
        length_median=82.0,
        length_spread=0.9975,
        length_bend=0.0641,
        length_cap=5_995,
        mean_rows=130.4,
        user_bias=0.88,
        propensity=(2.3, 1.6, 1.8),
        least_clicks=16.5,
    )
    return Recipe(
        crowds=(users,),
        popularity=Popularity(items=23_333_000, miniature=False, slope=6.1, bend=0.452, rarest=0.25),
        watching=Watching(
            glance=(0.4367, 0.9927), stay=(0.639, 0.918, 0.9708, 0.9877, 0.9933), stay_mean=2.5, liked_mean=2.5
        ),
        item_bias=1.1,
        waning=1.05,
        repeats=0.0178,
        history=True,
    )
