"""The sections of a run's report that show its results, each from what the run's files say."""

from collections.abc import Mapping
from typing import Any

from tenrec_jax.evaluation.figures import (
    Estimate,
    bar_chart,
    can_draw,
    curve_plot,
    figures,
    interval_plot,
    recall_curve,
    tradeoff_plot,
)
from tenrec_jax.evaluation.page import heading, paragraph, table
from tenrec_jax.evaluation.results import SAMPLED
from tenrec_jax.evaluation.sampled import NEGATIVES
from tenrec_jax.evaluation.scorers import BOTH
from tenrec_jax.evaluation.tables import interval, number, percent

RANKING_METRICS = ("auc", "gauc", "log_loss", "ece", "pcoc")
ORACLE = "true probabilities"
# Of the funnel, from all items to the list: names of `two_stage_results` and what they mean.
WAYS = {
    "candidates": "among the {candidates:,} candidates",
    "pair": "first {k} of the pair",
    "retrieval": "first {k} of retrieval alone",
    "ranker": "first {k} of the ranker alone, over all items ({ranker_users:,} users)",
}

SHOWN = (
    "What is clicked next hangs on what the logging system showed. The ranker knows how probable a click is on what is shown, and nothing "
    "of what would be shown, which retrieval learns too; so its order may find fewer of these clicks than retrieval's. Which order people "
    "would like better, a log cannot say."
)


def scorers_of(results: Mapping[str, Any], stage: str, action: str = "") -> dict[str, Mapping[str, Any]]:
    """Metrics by scorer, the model first, both stages next and the true probabilities last: of retrieval, or of one action."""
    found = {"ranker" if action else "model": results[stage]}
    if stage in results.get(BOTH, {}):
        found[BOTH.replace("_", " ")] = results[BOTH][stage]
    found |= {name.replace("_", " "): entry[stage] for name, entry in results["baselines"].items() if stage in entry}
    if stage in results.get("oracle", {}):
        found[ORACLE] = results["oracle"][stage]
    return {name: entry[action] for name, entry in found.items()} if action else found


def retrieval(test: Mapping[str, Any], validation: Mapping[str, Any]) -> str:
    """Metrics of the full-catalogue ranking, and what the lists hold."""
    scorers, counts = scorers_of(test, "retrieval"), test["counts"]
    columns = scorers | {"model, validation": validation["retrieval"]}
    rows = [[metric, *_cells(columns, metric)] for metric in test["retrieval"]]
    caption = f"Test rows of {counts['users']:,} users, ranking {counts['catalogue']:,} items"
    at_10 = {name: {"recall@10": metrics["recall@10"]} for name, metrics in scorers.items()}
    curves = {
        name: {int(key.removeprefix("recall@")): metrics[key] for key in metrics if key.startswith("recall@")}
        for name, metrics in scorers.items()
    }
    hint = "" if can_draw() else paragraph("Figures need matplotlib: pip install 'tenrec_jax[plot]' shows them.")
    return (
        paragraph("In brackets: 95 % interval, from a bootstrap over users.")
        + table(caption, ["metric", *columns], rows)
        + hint
        + figures(
            interval_plot("recall", "Recall@10 with 95 % intervals", at_10),
            recall_curve("curve", "Recall@k by the length k of the list, with 95 % intervals", curves),
        )
        + _among_sampled(test)
        + _lists(test)
    )


def _among_sampled(test: Mapping[str, Any]) -> str:
    if SAMPLED not in test:
        return ""
    scorers = scorers_of(test, SAMPLED)
    rows = [[metric, *_cells(scorers, metric)] for metric in test[SAMPLED]]
    text = (
        "For comparison with what others report. Such numbers can order models otherwise than the full catalogue does."
    )
    caption = f"Among the target and {NEGATIVES} uniform negatives"
    at_10 = {name: {"ndcg@10": metrics["ndcg@10"]} for name, metrics in scorers.items()}
    plot = interval_plot("sampled", f"NDCG@10 {caption[0].lower()}{caption[1:]}, with 95 % intervals", at_10)
    return table(caption, ["metric", *scorers], rows) + paragraph(text) + figures(plot)


def _lists(test: Mapping[str, Any]) -> str:
    found = {"model": test} | test["baselines"]
    found = {name.replace("_", " "): entry["lists"] for name, entry in found.items() if "lists" in entry}
    if not found:
        return ""
    rows = [
        [name, percent(lists["coverage"]), number(lists["novelty_bits"]), number(lists["gini"])]
        for name, lists in found.items()
    ]
    lists = next(iter(found.values()))
    caption = f"Lists of {lists['k']} items of {lists['users']:,} users"
    text = (
        "Coverage: the share of the catalogue that stands in some list. Novelty: the mean of -log2 of an item's share of the training "
        "rows. Gini: 0 if all items are listed alike, near 1 if a few have all places."
    )
    return table(caption, ["lists of", "coverage", "novelty, bits", "Gini"], rows) + paragraph(text)


def ranking(test: Mapping[str, Any], validation: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """Metrics of each action, and their curves."""
    if "ranking" not in test:
        return paragraph("This run has no ranker.")
    markup, scorers = "", {action: scorers_of(test, "ranking", action) for action in test["ranking"]}
    for action, entry in test["ranking"].items():
        columns = scorers[action] | {"ranker, validation": validation["ranking"][action]}
        rows = [[metric, *_cells(columns, metric)] for metric in RANKING_METRICS]
        caption = (
            f"{action}: {entry['positives']:,} positives in {entry['rows']:,} test rows of {entry['users']:,} users"
        )
        markup += heading(action) + table(caption, ["metric", *columns], rows) + _reachable(test, action)
    plots = []
    for metric in ("auc", "gauc"):
        names = next(iter(scorers.values()))
        series = {name: {action: scorers[action][name][metric] for action in scorers} for name in names}
        title = f"{metric.upper()} with 95 % intervals; the dotted line is chance"
        plots.append(interval_plot(metric, title, series, mark=0.5))
    note = paragraph("–: popularity orders items and predicts no probability.")
    return markup + note + figures(*plots, *_curves(details.get("curves", {})))


def _reachable(test: Mapping[str, Any], action: str) -> str:
    if "reachable_gain" not in test:
        return ""
    gain = test["reachable_gain"][action]
    return paragraph(
        f"Of the gain over popularity that the true probabilities show to be possible, the ranker has {percent(gain['auc'])} in AUC and "
        f"{percent(gain['gauc'])} in GAUC."
    )


def _curves(curves: Mapping[str, Any]) -> list[str]:
    roc = {action: (entry["roc"]["false"], entry["roc"]["true"]) for action, entry in curves.items()}
    plots = [
        curve_plot(
            "roc",
            "ROC curve of each action; the dotted line is chance",
            {action: points for action, points in roc.items() if points[0]},
            ("false positive rate", "true positive rate"),
        )
    ]
    for action, entry in curves.items():
        bins = entry["reliability"]
        title = f"Reliability of {action}: share of positives by predicted probability; on the dotted line they agree"
        points = {"bins of equal numbers of rows": (bins["predicted"], bins["observed"])}
        plots.append(curve_plot(f"reliability-{action}", title, points, ("predicted", "observed")))
    return plots


def two_stage(test: Mapping[str, Any]) -> str:
    """The funnel from all items to the list."""
    found = test.get("two_stage")
    if found is None:
        return paragraph("Both stages together were not measured.")
    names = {way: text.format(**found) for way, text in WAYS.items()}
    recall = {text: found["recall"][way] for way, text in names.items() if found["recall"].get(way) is not None}
    rows = [[f"recall {text}", interval(estimate)] for text, estimate in recall.items()]
    if "gain" in found["recall"]:
        rows.append(["what the pair adds to retrieval alone, paired by user", interval(found["recall"]["gain"])])
    times = ", ".join(f"{stage} {milliseconds:.2f} ms" for stage, milliseconds in found["milliseconds"].items())
    shares = {"all items": 1.0} | {text: float(estimate["value"] or 0) for text, estimate in recall.items()}
    return (
        paragraph(
            f"What {found['users']:,} users clicked next: found among {found['items']:,} items by the index, then among its candidates by "
            f"the second stage. The pair cannot find what is not among the candidates. For one user, median: {times}."
        )
        + (paragraph(SHOWN) if "ranking" in test else "")
        + table("From all items to the list", ["", "share of the clicked items"], rows)
        + figures(bar_chart("funnel", "Share of the clicked items that is still there", shares))
    )


def index_search(test: Mapping[str, Any], tuning: Mapping[str, Any]) -> str:
    """What approximate search loses, and the curve by which its settings were chosen."""
    index = test["index"]
    markup = paragraph(f"Search over the item vectors: {index_line(test)}.")
    if "next_clicks" in index:
        k, recall = index["next_clicks"]["k"], index["next_clicks"]["recall"]
        rows = [["with the index", interval(recall["with"])], ["by exact search", interval(recall["without"])]]
        caption = f"Next clicks in the first {k}, {index['queries']:,} users"
        markup += table(caption, ["retrieval alone", f"recall@{k}"], rows)
    if not tuning:
        return markup + paragraph("The index was not tuned: it searches exactly, or by settings that were given.")
    trials, chosen = tuning["trials"], tuning["chosen"]
    series: dict[str, tuple[list[float], list[float]]] = {}
    for trial in trials:
        x, y = series.setdefault(f"{trial['num_leaves']:,} leaves", ([], []))
        x.append(trial["recall"])
        y.append(trial["queries_per_second"])
    rows = [
        [
            f"{trial['leaves_to_search']:,} of {trial['num_leaves']:,}",
            f"{trial['reorder']:,}",
            number(trial["recall"]),
            f"{trial['queries_per_second']:,.0f}",
            "chosen" if trial == chosen else "",
        ]
        for trial in trials
    ]
    k = tuning["k"]
    caption = (
        f"Settings tried on {tuning['queries']:,} validation queries, for a recall@{k} of {tuning['target_recall']:g}"
    )
    title = f"Recall@{k} and queries a second of the settings tried; the dotted line is the recall to reach"
    return (
        markup
        + figures(tradeoff_plot("tuning", title, series, (f"recall@{k}", "queries/s"), mark=tuning["target_recall"]))
        + table(caption, ["leaves searched", "reordered", f"recall@{k}", "queries/s, once", ""], rows)
    )


def index_line(test: Mapping[str, Any]) -> str:
    """One line on the index."""
    index = test["index"]
    recalls = [f"{key.removesuffix('_vs_exact')} {number(index[key])}" for key in index if key.endswith("_vs_exact")]
    size = f"{index['items']:,} items, {index['queries']:,} queries"
    return f"{index['kind']}, {', '.join(recalls)} against exact search ({size})"


def slices(details: Mapping[str, Any]) -> str:
    """Metrics by group of users and items."""
    if not details.get("slices"):
        return paragraph("No metrics by group were left by this run.")
    markup = ""
    for kind, groups in details["slices"].items():
        metrics = list(
            dict.fromkeys(key for group in groups.values() for key in group if key not in ("rows", "targets"))
        )
        rows = [
            [name, f"{group['rows']:,}", f"{group['targets']:,}", *_metrics(group, metrics)]
            for name, group in groups.items()
        ]
        header = [kind, "rows", "clicks ranked", *(f"click {m}" if "@" not in m else m for m in metrics)]
        markup += table(f"By {kind}", header, rows)
    return markup


def _metrics(group: Mapping[str, Estimate], metrics: list[str]) -> list[str]:
    return [interval(group[metric]) if metric in group else "–" for metric in metrics]


def _cells(scorers: Mapping[str, Mapping[str, Any]], metric: str) -> list[str]:
    return [interval(metrics[metric]) if metric in metrics else "–" for metrics in scorers.values()]
