"""How near a synthetic twin is to Tenrec: each published number that it aims at, what it has, and whether that is met.

The published numbers are of whole files (2.4 million rows of QB-video, 120 million of ctr_data_1M) or of stated samples.
A target is judged from the number of rows on at which it can hold; below that, and where it contradicts another target, it
is shown with the reason and not judged:

* ctr_1m: item quantiles 3 / 51 / 799, Gini coefficient >= .88, >= 45 % of the rows on the top 1 % of the items, and the AUC
  of popularity under uniform negatives (which is near (1 + Gini) / 2) are of 120 million rows. At 1 million rows 18 % of the
  test rows are on unseen items; by Good-Turing some 18 % of the training rows are then on items shown once, which
  holds the Gini coefficient under .80. A twin can have one of the two, and a sample of Tenrec has the unseen items.
* ctr_1m: the regression on ids (AUC .7636, GAUC .7159) has 52 rows an item on the full file and 3 at 1 million rows.
* qb_video: the regression's AUC is published for ctr_data_1M. QB's two regimes set users further apart, so it is higher
  here; the GAUC, which compares within users, is judged.
* watching_times: the marginal (mean .80) is of ctr_data_1M, the means .9 / 2.4 / 2.5 by outcome of QB-video. With 24 % clicks
  these means make 1.26, so each kind has its own file's.
* The histogram of fig. 2c counts all of QK-video, of which there is no twin; ctr_1m is near it (total variation).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tenrec_jax.data.arrow import read_parquet
from tenrec_jax.data.interactions import Interactions, read_events
from tenrec_jax.data.protocols import Part, Split
from tenrec_jax.data.schema import KINDS, TWIN_KINDS, Role
from tenrec_jax.data.stats import TableStats
from tenrec_jax.data.twin_recipes import recipe_of
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.id_model import id_regression
from tenrec_jax.evaluation.metrics import auc, grouped_auc

MILLION = 1_000_000
CLICK_EDGES = (0, 21, 41, 81, 101, 141, 181, 221, 261, 301, 1 << 30)
CLICK_SHARES = np.array([2701660, 1352459, 497505, 221682, 109327, 89790, 30005, 14053, 3939, 2309]) / 5_022_729
JOINT_OF_HEAD = {
    (0, 0, 0, 0): 279_705, (1, 0, 0, 0): 211_319, (1, 1, 0, 0): 5_644, (0, 1, 0, 0): 2_368, (1, 0, 1, 0): 238,
    (1, 0, 0, 1): 232, (0, 0, 0, 1): 149, (1, 1, 0, 1): 123, (0, 0, 1, 0): 70, (0, 1, 0, 1): 62,
}  # fmt: skip
HISTORY_SHARES = (0.0002, 0.0003, 0.0004, 0.0007, 0.0012, 0.0020, 0.0030, 0.0043, 0.0051, 0.0058, 0.9770)
WATCHING_SHARES = (0.3284, 0.5766, 0.0747, 0.0131, 0.0042, 0.0014, 0.0016)
UNSEEN_ROWS = ((1e6, 0.18), (1e7, 0.049), (1.2e8, 0.009))


@dataclass(frozen=True)
class Target:
    """A published number and the twin's.

    Attributes:
        name: what is counted.
        target: the published value.
        got: the twin's.
        tolerance: how far `got` may be from `target`; for a bound, 0.
        bound: "within", "at least" or "at most".
        from_rows: rows from which the target is judged.
        met: None where it is not judged.
        note: why not, or what was chosen.
    """

    name: str
    target: float
    got: float
    tolerance: float
    bound: str
    from_rows: int
    met: bool | None
    note: str = ""


class _Judge:
    """Collects targets for a table of so many rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.found: list[Target] = []

    def within(self, name: str, target: float, got: float, tolerance: float, since: int, note: str = "") -> None:
        self._add(name, target, got, tolerance, "within", since, abs(got - target) <= tolerance, note)

    def at_least(self, name: str, target: float, got: float, since: int, note: str = "") -> None:
        self._add(name, target, got, 0.0, "at least", since, got >= target, note)

    def at_most(self, name: str, target: float, got: float, since: int, note: str = "") -> None:
        self._add(name, target, got, 0.0, "at most", since, got <= target, note)

    def _add(
        self, name: str, target: float, got: float, tolerance: float, bound: str, since: int, good: bool, note: str
    ) -> None:
        judged = bool(good) if self.rows >= since else None
        if judged is None and not note:
            note = f"judged from {since:,} rows"
        self.found.append(Target(name, float(target), float(got), tolerance, bound, since, judged, note))


def twin_targets(
    table: Interactions, directory: Path, stats: TableStats, split: Split, truth: Path | None = None
) -> tuple[Target, ...]:
    """Compares a twin with Tenrec's published numbers. Needs some 100 bytes of memory a row.

    Args:
        table: an ingested twin, opened from `directory`.
        directory: where its events are.
        stats: `table_stats` of the same table and split.
        split: by `per_user_order`, under which the numbers were published.
        truth: the twin's file of true probabilities; without it what it decides is left out.

    Raises:
        UserError: there is no twin of this kind, the split is another, or the truth has another number of rows.
    """
    if table.kind not in TWIN_KINDS:
        raise UserError(
            f"There is no twin of {table.kind}, so it has no targets; they are of {' and '.join(TWIN_KINDS)}."
        )
    if split.protocol != "per_user_order":
        raise UserError(f"The twin's targets are published for per_user_order; the split is {split.protocol}.")
    judge = _Judge(table.num_rows)
    if table.kind == "qb_video":
        _qb_video(judge, table, directory, stats)
    else:
        _ctr_1m(judge, table, directory, stats)
    _common(judge, table, stats)
    _learnability(judge, table, stats, split, _read_truth(truth, table) if truth else None)
    return tuple(judge.found)


def _qb_video(judge: _Judge, table: Interactions, directory: Path, stats: TableStats) -> None:
    border = int(table.user_R[round(table.num_rows * recipe_of("qb_video").crowds[0].share) - 1])
    head, tail = slice(0, int(table.offsets[border + 1])), slice(int(table.offsets[border + 1]), table.num_rows)
    for name, rows, users, click, rows_per_user in (
        ("head", head, border, 0.4351, 160.3),
        ("tail", tail, table.num_users - border, 0.764, 62.4),
    ):
        tolerance = 0.02 if name == "head" else 0.015
        judge.within(f"{name}: click rate", click, table.labels_RA[rows, 0].mean(), tolerance, 500_000)
        size = (rows.stop - rows.start) / users
        judge.within(f"{name}: rows per user", rows_per_user, size, 0.1 * rows_per_user, 500_000)
    judge.within("click rate", 0.6965, stats.rates["click"], 0.015, 300_000)
    _head_labels(judge, np.asarray(table.labels_RA[head]))
    rows_U = np.diff(table.offsets)[1 : border + 1]
    click_U, like_U = (
        np.add.reduceat(table.labels_RA[head, place], table.offsets[1 : border + 1], dtype=np.int64) / rows_U
        for place in (0, 1)
    )
    judge.within("head: users' positive rate, median", 0.43, np.median(click_U), 0.04, 500_000)
    judge.within("head: users' positive rate, p90", 0.73, np.quantile(click_U, 0.9), 0.06, 500_000)
    judge.within("head: users' like rate, median", 0.0, np.median(like_U), 0.002, 500_000)
    judge.within("head: users' like rate, p90", 0.027, np.quantile(like_U, 0.9), 0.025, 500_000)
    judge.within("head: users' like rate, p99", 0.265, np.quantile(like_U, 0.99), 0.12, 500_000)
    times, like = _watching(table, directory), table.labels_RA[:, 1] == 1
    click = table.labels_RA[:, 0] == 1
    judge.within("watching_times, mean without click or like", 0.9, times[~click & ~like].mean(), 0.03, 50_000)
    judge.within("watching_times, mean with a click", 2.4, times[click].mean(), 0.06, 50_000)
    judge.within("watching_times, mean with a like", 2.5, times[like].mean(), 0.3, 300_000)
    judge.at_least("items: Gini coefficient", 0.88, stats.concentration.gini, MILLION)
    judge.at_least("items: share of rows on the top 1 %", 0.45, stats.concentration.top_1_percent, MILLION)


def _head_labels(judge: _Judge, labels_RA: NDArray[np.int8]) -> None:
    code_R = labels_RA @ np.array([8, 4, 2, 1])
    share = np.bincount(code_R, minlength=16) / len(code_R)
    published = np.zeros(16)
    for labels, rows in JOINT_OF_HEAD.items():
        published[np.array(labels) @ np.array([8, 4, 2, 1])] = rows / 500_000
    distance = 0.5 * np.abs(share - published).sum()
    judge.at_most("head: joint action table, total variation", 0.03, distance, 500_000)
    click, like = labels_RA[:, 0] == 1, labels_RA[:, 1] == 1
    judge.within("head: P(like | click)", 0.0268, like[click].mean(), 0.012, MILLION)
    judge.within("head: P(like | no click)", 0.0087, like[~click].mean(), 0.005, MILLION)
    judge.within("head: P(click | like)", 0.704, click[like].mean() if like.any() else np.nan, 0.08, MILLION)


def _ctr_1m(judge: _Judge, table: Interactions, directory: Path, stats: TableStats) -> None:
    users, since = stats.rows_per_user, 300_000
    for level, rows, tolerance in (("0.5", 82, 0.06), ("0.9", 265, 0.08), ("0.99", 590, 0.15)):
        judge.within(f"rows per user, p{100 * float(level):g}", rows, users.quantiles[level], tolerance * rows, since)
    judge.within("rows per user, mean", 120.4, users.mean, 0.06 * 120.4, since)
    judge.at_most("rows per user, most", 6_005, users.quantiles["1.0"], 0)
    for action, rate, tolerance in (("click", 0.24, 0.012), ("like", 0.0189, 0.004), ("share", 0.0021, 0.0006)):
        judge.within(f"{action} rate", rate, stats.rates[action], tolerance, MILLION)
    judge.within("follow rate", 0.0015, stats.rates["follow"], 0.0005, MILLION)
    for part, rate in zip(stats.parts, (0.2407, 0.2622, 0.2119), strict=True):
        judge.within(f"click rate of the {part.part} part", rate, part.rates["click"], 0.015, 300_000)
    like = table.labels_RA[:, 1] == 1
    judge.within("P(click | like)", 0.55, (table.labels_RA[:, 0][like] == 1).mean(), 0.06, 300_000)
    _unseen(judge, stats)
    whole = "of the full file; contradicts the unseen rows below it"
    for level, rows in (("0.5", 3), ("0.9", 51), ("0.99", 799)):
        got = stats.rows_per_item.quantiles[level]
        judge.within(f"rows per item, p{100 * float(level):g}", rows, got, 0.25 * rows, 100 * MILLION, whole)
    judge.at_least("items: Gini coefficient", 0.88, stats.concentration.gini, 100 * MILLION, whole)
    judge.at_least("items: share of rows on the top 1 %", 0.45, stats.concentration.top_1_percent, 100 * MILLION, whole)
    judge.within("items: share of rows on the top item", 0.0013, stats.concentration.top_item, 0.0007, MILLION)
    times = np.bincount(np.minimum(_watching(table, directory), 6), minlength=7) / table.num_rows
    for value, (share, got) in enumerate(zip(WATCHING_SHARES, times, strict=True)):
        judge.within(
            f"watching_times = {value}{' or more' if value == 6 else ''}", share, got, 0.03 * share + 0.0007, MILLION
        )
    _history(judge, table, directory)


def _unseen(judge: _Judge, stats: TableStats) -> None:
    rows, shares = zip(*UNSEEN_ROWS, strict=True)
    expected = float(np.exp(np.interp(np.log(stats.rows), np.log(rows), np.log(shares))))
    note = "published at 1, 10 and 120 million rows, interpolated between" if stats.rows >= MILLION else ""
    for part in stats.parts[1:]:
        judge.within(f"unseen rows of the {part.part} part", expected, part.unseen_rows, 0.12 * expected, MILLION, note)
    if stats.rows <= 2 * MILLION:
        judge.within("unseen items of the test part", 0.307, stats.parts[2].unseen_items, 0.05, MILLION)


def _history(judge: _Judge, table: Interactions, directory: Path) -> None:
    names = [column.name for column in KINDS[table.kind].with_role(Role.HISTORY)]
    length_R = np.concatenate(
        [
            np.sum([batch.column(name).to_numpy() != 0 for name in names], axis=0).astype(np.int8)
            for batch in read_events(directory, names)
        ]
    )
    share = np.bincount(length_R, minlength=11) / table.num_rows
    for length, (published, got) in enumerate(zip(HISTORY_SHARES, share, strict=True)):
        tolerance = 0.015 if length == 10 else 0.5 * published + 0.002
        judge.within(f"share of rows with a history of {length}", published, got, tolerance, MILLION)
    judge.within("length of history, mean", 9.929, length_R.mean(), 0.06, 300_000)
    clicks_U = np.add.reduceat(table.labels_RA[:, 0], table.offsets[1:-1], dtype=np.int64)
    all_U = clicks_U + length_R[table.offsets[1:-1]]
    judge.within("clicks per user, deleted ones included: mean", 38.8, all_U.mean(), 3.1, 300_000)
    judge.within("clicks per user, left in the log: mean", 28.9, clicks_U.mean(), 2.3, 300_000)
    got = np.histogram(clicks_U, CLICK_EDGES)[0] / len(clicks_U)
    distance = 0.5 * np.abs(got - CLICK_SHARES).sum()
    judge.at_most("clicks per user against fig. 2c, total variation", 0.15, distance, 300_000)


def _common(judge: _Judge, table: Interactions, stats: TableStats) -> None:
    rows_U = np.diff(table.offsets)
    gender = np.bincount(table.users.gender, rows_U, minlength=3) / table.num_rows
    age = np.bincount(table.users.age, rows_U, minlength=8) / table.num_rows
    for name, shares, found in (
        ("gender", (0.1880, 0.5801, 0.2320), gender),
        ("age", (0.1861, 0.0198, 0.4915, 0.2124, 0.0660, 0.0179, 0.0055, 0.0008), age),
    ):
        for value, share in enumerate(shares):
            # A user's rows all have his value: four standard errors of the share, from the users' numbers of rows.
            tolerance = 4 * np.sqrt(share * (1 - share) * (rows_U.astype(np.float64) ** 2).sum()) / table.num_rows
            judge.within(f"{name} = {value}", share, found[value], tolerance, 0)
    category_R = table.items.category[table.item_R]
    for name, value, share in (("missing", 0, 0.0132), ("0", 1, 0.5358), ("1", 2, 0.4510)):
        judge.within(f"video_category = {name}", share, (category_R == value).mean(), 0.02, 50_000)
    breaks = np.flatnonzero((category_R[1:] != category_R[:-1]) | (table.user_R[1:] != table.user_R[:-1])) + 1
    runs = np.diff(np.concatenate([[0], breaks, [table.num_rows]]))
    judge.within("median run of one category", 1.0, np.median(runs), 0.0, 1_000)
    repeats = stats.repeats
    for name, share, got, tolerance in (
        ("rows that repeat a user and item", 0.0150, repeats.pairs_share, 0.003),
        ("exact duplicates", 0.0073, repeats.duplicates_share, 0.002),
        ("repeats of pairs with both click labels", 0.0047, repeats.click_contradictions_share, 0.0018),
    ):
        judge.within(name, share, got, tolerance, 300_000)


def _learnability(
    judge: _Judge, table: Interactions, stats: TableStats, split: Split, truth_R: NDArray[np.float32] | None
) -> None:
    qb = table.kind == "qb_video"
    dense, ctr_only = (MILLION, "") if qb else (100 * MILLION, "needs the full file's 52 rows an item")
    train_R, test_R = split.part_R == Part.TRAIN, split.part_R == Part.TEST
    click_R, item_R, user_R = table.labels_RA[:, 0], table.item_R, table.user_R
    popularity_N1 = np.bincount(item_R[train_R], minlength=table.num_items + 1)
    clicked = item_R[test_R & (click_R == 1)]
    judge.within(
        "popularity alone, clicked rows against uniform items: AUC",
        0.935,
        uniform_auc(popularity_N1[1:], popularity_N1[clicked]),
        0.015,
        dense,
        ctr_only,
    )
    on_exposures = auc(click_R[test_R], popularity_N1[item_R[test_R]])
    judge.at_most("popularity alone, on true exposures: AUC", 0.65, on_exposures, 50_000)
    score_R = id_regression(user_R, item_R, click_R, train_R)
    area = auc(click_R[test_R], score_R[test_R])
    grouped = grouped_auc(click_R[test_R], score_R[test_R], groups=user_R[test_R]).value
    if qb:
        judge.at_least("regression on ids: AUC", 0.7636, area, MILLION, "of ctr_data_1M; the two regimes add to it")
    else:
        judge.within("regression on ids: AUC", 0.7636, area, 0.02, dense, ctr_only)
    judge.within("regression on ids: GAUC", 0.7159, grouped, 0.015, dense, ctr_only)
    if truth_R is None:
        return
    oracle = grouped_auc(click_R[test_R], truth_R[test_R], groups=user_R[test_R]).value
    judge.at_least("true probabilities: GAUC, above the best published", 0.7219, oracle, 100_000)
    judge.at_least("true probabilities: AUC above the regression's", area, auc(click_R[test_R], truth_R[test_R]), 0)
    shuffled = np.random.default_rng(0).permutation(click_R[test_R])
    judge.within("true probabilities, labels shuffled: AUC", 0.5, auc(shuffled, truth_R[test_R]), 0.02, 50_000)


def uniform_auc(popularity_N: np.ndarray, positives_P: np.ndarray) -> float:
    """The AUC of positives' popularity over that of one item drawn evenly from all, exact; NaN without positives."""
    rising = np.sort(popularity_N)
    below = np.searchsorted(rising, positives_P, "left") + np.searchsorted(rising, positives_P, "right")
    return float(below.mean() / (2 * len(rising))) if len(positives_P) else float("nan")


def _watching(table: Interactions, directory: Path) -> NDArray[np.int32]:
    def parts() -> Iterator[np.ndarray]:
        for batch in read_events(directory, ["watching_times"]):
            yield batch.column("watching_times").to_numpy()

    return np.concatenate(list(parts()))


def _read_truth(path: Path, table: Interactions) -> NDArray[np.float32]:
    if not path.is_file():
        raise UserError(f"There is no {path}. tenrec-jax synth writes it beside the CSV, as NAME.truth.parquet.")
    truth_R = read_parquet(path, ["click"], "Make the twin again.")["click"].to_numpy()
    if len(truth_R) != table.num_rows:
        raise UserError(
            f"{path} has {len(truth_R):,} rows, the table {table.num_rows:,}: it is the truth of another log."
        )
    return truth_R
