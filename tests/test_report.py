"""The report against hand-written files of a run, read back by an HTML parser; the console table against its own numbers."""

import json
import re
from html.parser import HTMLParser

import pytest

from tenrec_jax import stages
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.report import comparisons, results_table, verdict, write_report

SCRIPT = "<script>alert(1&2)</script>"
VOID = {"meta", "br", "img", "link", "hr"}
ACTIONS = ("click", "like", "share", "follow")


def estimate(value, half=0.01):
    return {"value": value, "low": value - half, "high": value + half}


UNDEFINED = {"value": None, "low": None, "high": None}


def retrieval(base):
    cutoffs = (1, 5, 10, 20, 50, 100)
    names = (
        [f"recall@{k}" for k in cutoffs] + [f"ndcg@{k}" for k in cutoffs[1:]] + [f"hit@{k}" for k in cutoffs] + ["mrr"]
    )
    return {name: estimate(base + 0.00123 * place, 0.0004) for place, name in enumerate(names)}


def ranking(auc, *, order_alone=False):
    metrics = {"auc": auc, "gauc": auc - 0.04, "log_loss": 0.4321, "ece": 0.0123, "pcoc": 1.0456}
    kept = ("auc", "gauc") if order_alone else tuple(metrics)
    counts = {"gauc_coverage": 0.7312, "rows": 30123, "users": 1234, "positives": 4321}
    return {
        action: {name: estimate(metrics[name] + 0.0011 * place, 0.004) for name in kept} | counts
        for place, action in enumerate(ACTIONS)
    }


def evaluation(shift=0.0):
    results = {
        "protocol": "per_user_order",
        "seed": 7,
        "data_sha256": "0123456789abcdef" * 4,
        "split_sha256": "fedcba9876543210" * 4,
        "is_synthetic": True,
        "counts": {"users": 1234, "rows": 30123, "catalogue": 3753},
        "retrieval": retrieval(0.2 + shift),
        "ranking": ranking(0.75 + shift),
        "baselines": {
            "popularity": {"retrieval": retrieval(0.1), "ranking": ranking(0.6, order_alone=True)},
            "item_rate": {"ranking": ranking(0.65)},
            "user_rate": {"ranking": ranking(0.55)},
        },
        "index": {"kind": "scann", "items": 3700, "recall@100_vs_exact": 0.98765, "queries": 1000},
        "seconds": {"data": 1.5},
    }
    return json.loads(json.dumps(results))


def without_ranker(results):
    del results["ranking"]
    results["baselines"] = {"popularity": {"retrieval": results["baselines"]["popularity"]["retrieval"]}}
    return results


@pytest.fixture
def files():
    return files_of_a_run()


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """A report with its figures."""
    return report_of(tmp_path_factory.mktemp("run"), files_of_a_run())


def files_of_a_run():
    counts = {"rows": 300000, "users": 2500, "items": 3753, "click": 75000, "like": 6000, "share": 900, "follow": 300}
    return {
        "config.json": {"name": f"run {SCRIPT}", "seed": 7, "data": {"path": "", "note": '"><img src=x>'}},
        "env.json": {
            "python": "3.11.7",
            "platform": "Linux-6.1",
            "devices": ["cpu:cpu"],
            "command": ["experiments/launch.py", "--config", SCRIPT],
            "code": {"jax": "0.9.1", "flax": "0.12.5"},
        },
        "data.json": {
            "source": f"log {SCRIPT}.csv",
            "is_synthetic": True,
            "sha256": "0123456789abcdef" * 4,
            "protocol": "per_user_order",
            "split_sha256": "fedcba9876543210" * 4,
            "users_left_out": 17,
            "rows": {"none": 5, "train": 240000, "validation": 29877, "test": 30123},
            "manifest": {"log_kind": "qb_video", "actions": list(ACTIONS), "counts": counts | {"duplicate_rows": 41}},
        },
        "stages.json": {stage: {"seconds": 12.34} for stage in ("data", "retrieval", "index", "ranking", "evaluate")},
        "eval/val.json": evaluation(0.0333),
        "eval/test.json": evaluation(),
        "timings.jsonl": [
            {"stage": "ranking", "step": step, "labels_per_second": rate, "peak_process_memory_mib": 1234.5}
            for step, rate in ((20, 10_000.0), (40, 20_500.0), (50, 30_000.0))
        ],
        "metrics.jsonl": [
            {"stage": stage, "step": step, **values}
            for stage, metric in (("retrieval", "ndcg@10"), ("ranking", "click_auc"))
            for step, values in (
                (20, {"loss": 0.75}),
                (40, {"loss": 0.625}),
                (50, {f"validation/{metric}": float("nan")}),
            )
        ],
    }


def report_of(workdir, files):
    (workdir / "eval").mkdir(exist_ok=True)
    for name, content in files.items():
        lines = content if name.endswith("l") else [content]
        (workdir / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    stages.write(workdir, files["stages.json"])
    return write_report(workdir).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tables by caption, ids, headings, attributes; fails on a tag that is not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.references, self.headings = [], [], [], [], []
        self.tables, self.title_of_svg, self.text = {}, [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag, attrs):
        self._see(tag, attrs)

    def handle_starttag(self, tag, attrs):
        self._see(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self._row = []
        if tag in ("th", "td", "caption"):
            self._cell = ""
        if tag == "title" and "svg" in self.open:
            self.title_of_svg.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "caption":
            self._caption = self._cell
            self.tables[self._caption] = []
        elif tag in ("th", "td"):
            self._row.append(self._cell.replace("\N{NO-BREAK SPACE}", " "))
        elif tag == "tr":
            self.tables[self._caption].append(self._row)

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if any(tag in self.open for tag in ("th", "td", "caption")):
            self._cell += data
        if self.open[-2:] == ["svg", "title"]:
            self.title_of_svg[-1] += data

    def _see(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.references += [url for _, value in attrs for url in re.findall(r"url\((.*?)\)", value or "")]
        self.references += [f"#{value}" for name, value in attrs if name == "aria-labelledby"]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))


def shown(number):
    return "n/a" if number["value"] is None else "{value:.4f} [{low:.4f}, {high:.4f}]".format(**number)


def test_page_is_well_formed_html(html):
    page = Page(html)
    assert html.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert '<meta charset="utf-8">' in html
    assert 'name="viewport"' in html
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert len(page.ids) == len(set(page.ids))


def test_page_refers_to_nothing_outside_itself(html):
    page = Page(html)
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert page.references
    assert {reference[0] for reference in page.references} == {"#"}
    assert {reference[1:] for reference in page.references} <= set(page.ids)


def test_text_of_the_run_is_escaped(html):
    page = Page(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.text.count(SCRIPT) == 5  # title, heading, command, source, configuration
    assert '"><img src=x>' in json.loads(page.text[page.text.index("{") : page.text.rindex("}") + 1])["data"]["note"]


def test_every_figure_has_a_title_for_screen_readers(html):
    page = Page(html)
    titles = [
        "Recall@10",
        "Recall@k",
        "AUC",
        "GAUC",
        "retrieval: loss",
        "retrieval: val",
        "ranking: loss",
        "ranking: val",
    ]
    assert page.tags.count("svg") == len(titles)
    assert all(found.startswith(title) for found, title in zip(page.title_of_svg, titles, strict=True))


def test_names_in_tables_and_figures_are_escaped(tmp_path, files):
    files["eval/test.json"]["baselines"][SCRIPT] = {"retrieval": retrieval(0.1)}
    files["stages.json"][SCRIPT] = {"seconds": 1}
    files["metrics.jsonl"].append({"stage": SCRIPT, "step": 1, SCRIPT: 0.5})
    page = Page(report_of(tmp_path, files))
    assert "script" not in page.tags
    assert [SCRIPT, "1.00"] in page.tables["Time by stage"]
    assert [f"{SCRIPT} {SCRIPT}", "1", "0.5000"] in page.tables["Last values"]
    assert f"{SCRIPT}: loss by step" in page.title_of_svg


@pytest.mark.usefixtures("no_matplotlib")
def test_speed_is_told_by_the_median_window_and_the_last(tmp_path, files):
    files["timings.jsonl"].append({"stage": "ranking", "step": 50, "peak_process_memory_mib": 2345.6})
    assert Page(report_of(tmp_path, files)).tables["By windows of steps"] == [
        ["figure", "median", "last"],
        ["ranking labels_per_second", "20,500", "30,000"],
        ["ranking peak_process_memory_mib", "1,234", "2,346"],
    ]


@pytest.mark.usefixtures("no_matplotlib")
def test_retrieval_table_shows_the_numbers_of_the_files(tmp_path, files):
    test, validation = files["eval/test.json"], files["eval/val.json"]
    test["retrieval"]["mrr"] = UNDEFINED
    header, *rows = Page(report_of(tmp_path, files)).tables["Test rows of 1,234 users, ranking 3,753 items"]
    assert header == ["metric", "model", "popularity", "model, validation"]
    sources = test["retrieval"], test["baselines"]["popularity"]["retrieval"], validation["retrieval"]
    assert rows == [[metric, *(shown(source[metric]) for source in sources)] for metric in test["retrieval"]]


@pytest.mark.usefixtures("no_matplotlib")
@pytest.mark.parametrize("action", ACTIONS)
def test_ranking_table_of_each_action_shows_the_numbers_of_the_files(tmp_path, files, action):
    test = files["eval/test.json"]
    test["ranking"]["share"]["gauc"] = UNDEFINED
    caption = f"{action}: 4,321 positives in 30,123 test rows of 1,234 users"
    header, *rows = Page(report_of(tmp_path, files)).tables[caption]
    assert header == ["metric", "ranker", "popularity", "item rate", "user rate", "ranker, validation"]
    sources = [test, *test["baselines"].values(), files["eval/val.json"]]
    for metric, *cells in rows:
        entries = [source["ranking"][action] for source in sources]
        assert cells == [shown(entry[metric]) if metric in entry else "–" for entry in entries]
    assert [row[0] for row in rows] == ["auc", "gauc", "log_loss", "ece", "pcoc"]


@pytest.mark.usefixtures("no_matplotlib")
def test_data_stages_and_last_metrics_are_those_of_the_files(tmp_path, files):
    page = Page(report_of(tmp_path, files))
    assert page.tables["Actions"][1:] == [
        ["click", "75,000", "25.00 %"],
        ["like", "6,000", "2.00 %"],
        ["share", "900", "0.30 %"],
        ["follow", "300", "0.10 %"],
    ]
    assert page.tables["Time by stage"][1:] == [[stage, "12.34"] for stage in files["stages.json"]]
    assert ["retrieval loss", "40", "0.6250"] in page.tables["Last values"]
    assert ["ranking validation/click_auc", "50", "n/a"] in page.tables["Last values"]
    for text in ("0123456789abcdef" * 4, "fedcba9876543210" * 4, "240,000", "scann, recall@100 0.9877 against exact"):
        assert text in page.text


@pytest.mark.usefixtures("no_matplotlib")
def test_limits_name_what_weakens_the_results(tmp_path, files):
    files["eval/test.json"]["ranking"]["follow"]["positives"] = 49
    files["eval/test.json"]["ranking"]["share"]["positives"] = 50
    text = Page(report_of(tmp_path, files)).text
    assert "Fewer than 50 positive test rows, too few for a conclusion: follow (49)." in text
    assert "leaves out 17 users (too few clicks) and 5 rows" in text
    assert "click 73.12 %" in text
    assert "The log is synthetic" in text


def test_verdict_is_good_only_while_no_intervals_overlap():
    test = evaluation()
    assert verdict(test) == (
        "On synthetic test rows the model is above every baseline in each of 26 comparisons, and no 95 % intervals overlap."
    )
    item_rate, model = test["baselines"]["item_rate"]["ranking"]["like"], test["ranking"]["like"]
    item_rate["auc"]["high"] = model["auc"]["low"]
    assert verdict(test).endswith("in 25 of 26 comparisons; the 95 % intervals overlap in like auc against item rate.")
    item_rate["auc"]["high"] = model["auc"]["low"] - 1e-9
    assert "each of 26" in verdict(test)


def test_verdict_names_defeats_and_undefined_metrics():
    test = evaluation()
    test["is_synthetic"] = False
    test["retrieval"]["recall@10"] = estimate(0.01)
    test["ranking"]["share"]["gauc"] = UNDEFINED
    assert verdict(test) == (
        "On the test rows the model is above its baseline, intervals apart, in 22 of 26 comparisons; "
        "it is below in recall@10 against popularity; no interval is defined in share gauc against popularity, "
        "share gauc against item rate, share gauc against user rate."
    )


@pytest.mark.usefixtures("no_matplotlib")
def test_value_without_interval_is_not_compared_but_shown(tmp_path, files):
    files["eval/test.json"]["ranking"]["click"]["auc"] = {"value": 0.7, "low": None, "high": None}
    standings = {c.standing for c in comparisons(files["eval/test.json"]) if c.metric == "click auc"}
    assert standings == {"undefined"}
    assert "0.7000 [n/a, n/a]" in results_table(files["eval/test.json"])
    assert "0.7000 [n/a,\N{NO-BREAK SPACE}n/a]" in Page(report_of(tmp_path, files)).text


@pytest.mark.usefixtures("no_matplotlib")
def test_run_without_ranker_says_so(tmp_path, files):
    for name in ("eval/test.json", "eval/val.json"):
        without_ranker(files[name])
    page = Page(report_of(tmp_path, files))
    assert "This run has no ranker." in page.text
    assert "each of 2 comparisons" in page.text
    assert "ranking: this run has no ranker" in results_table(files["eval/test.json"]).splitlines()


def test_without_matplotlib_the_report_has_its_tables_and_says_how_to_get_figures(html, tmp_path, files, no_matplotlib):
    with_figures = Page(html)
    page = Page(report_of(tmp_path, files))
    assert "svg" not in page.tags
    assert "pip install 'tenrec_jax[plot]'" in page.text
    assert "pip install" not in with_figures.text
    assert page.tables == with_figures.tables


def test_same_files_give_the_same_bytes_and_leave_matplotlib_as_it_was(html, tmp_path, files):
    matplotlib = pytest.importorskip("matplotlib")
    settings = dict(matplotlib.rcParams)
    assert report_of(tmp_path, files) == html
    assert dict(matplotlib.rcParams) == settings
    assert sorted(path.name for path in tmp_path.glob("report*")) == ["report.html"]


def test_run_with_undefined_numbers_throughout_still_has_a_report(tmp_path, files):
    for name in ("eval/test.json", "eval/val.json"):
        for entry in [*files[name]["ranking"].values(), files[name]["retrieval"]]:
            entry |= dict.fromkeys([key for key in entry if isinstance(entry[key], dict)], UNDEFINED)
            entry |= {"gauc_coverage": None} if "gauc_coverage" in entry else {}
    files["eval/test.json"]["index"]["recall@100_vs_exact"] = None
    files["metrics.jsonl"] = files["timings.jsonl"] = []
    page = Page(report_of(tmp_path, files))
    assert "in 0 of 26 comparisons" in page.text
    assert "metrics.jsonl holds no line." in page.text
    assert "timings.jsonl holds no line." in page.text


def test_missing_file_is_named(tmp_path, files):
    del files["eval/val.json"]
    with pytest.raises(UserError, match=r"val\.json is missing"):
        report_of(tmp_path, files)


def test_console_table_is_aligned_narrow_and_true():
    test = evaluation()
    test["ranking"]["follow"]["gauc"] = UNDEFINED
    lines = results_table(test).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "test: per_user_order, seed 7, data 0123456789ab, synthetic twin"
    popularity = test["baselines"]["popularity"]["retrieval"]
    for line, metric in zip(lines[3:7], ("recall@10", "ndcg@10", "hit@1", "mrr"), strict=True):
        assert re.split(" {2,}", line) == [metric, shown(test["retrieval"][metric]), shown(popularity[metric])]
    assert len({line.index("[") for line in lines[3:7]}) == 1
    scorers = [test["ranking"], *(entry["ranking"] for entry in test["baselines"].values())]
    expected = [
        [shown(scorer[action][metric]) for metric in ("auc", "gauc")] for action in ACTIONS for scorer in scorers
    ]
    assert [re.split(" {2,}", line)[-2:] for line in lines[9:25]] == expected
    assert len({line.index("[") for line in lines[9:25]}) == 1
    assert lines[-1].startswith("index: scann, recall@100 0.9877 against exact search")
    test["is_synthetic"] = False
    assert "synthetic" not in results_table(test)
