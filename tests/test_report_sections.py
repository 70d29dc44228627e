"""What stands in a report beside the main tables, and the page of several runs, against hand-written files."""

import copy

import pytest
from test_report import ACTIONS, SCRIPT, UNDEFINED, Page, estimate, files_of_a_run, ranking, report_of, shown

from tenrec_jax.__main__ import main
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.report import comparisons, results_table
from tenrec_jax.evaluation.side_by_side import write_side_by_side

GROUP = {"rows": 1234, "targets": 567, "auc": estimate(0.71), "log_loss": UNDEFINED, "recall@20": estimate(0.2)}

TRIALS = [
    {"num_leaves": 61, "leaves_to_search": n, "reorder": 200, "recall": r, "cost": 1.5, "queries_per_second": q}
    for n, r, q in ((3, 0.951, 20_500.4), (9, 0.9912, 8_100.0))
]


@pytest.fixture
def files():
    """A run that has everything."""
    files = files_of_a_run()
    test = files["eval/test.json"]
    test["oracle"] = {"ranking": ranking(0.85)}
    test["reachable_gain"] = {action: {"auc": 0.612, "gauc": None} for action in ACTIONS}
    test["lists"] = {"k": 20, "users": 1234, "coverage": 0.4321, "novelty_bits": 7.5, "gini": 0.87}
    test["baselines"]["popularity"]["lists"] = {
        "k": 20,
        "users": 1234,
        "coverage": 0.01,
        "novelty_bits": 3.0,
        "gini": 0.99,
    }
    recall = {"ranker": None, "candidates": estimate(0.5), "pair": estimate(0.25), "retrieval": estimate(0.2)}
    recall["gain"] = estimate(0.05)
    times = {"retrieval": 0.31, "ranking": 4.5}
    test["two_stage"] = {
        "k": 20,
        "users": 99,
        "ranker_users": 0,
        "items": 3700,
        "candidates": 200,
        "recall": recall,
        "milliseconds": times,
    }
    test["selection"] = {"ranking": "the epoch of the best click AUC on validation rows"}
    test["test_opened"] = {"times": 1, "readings": [{"at": "2026-01-02T03:04:05+00:00", "command": ["x"]}]}
    test["speed"] = {"ranking_rows_per_second": 12345.6}
    test["skipped"] = []
    bins = {"predicted": [0.1, 0.6], "observed": [0.2, 0.5], "rows": [10, 11]}
    roc = {"false": [0.0, 0.3, 1.0], "true": [0.0, 0.8, 1.0]}
    files["eval/test_details.json"] = {
        "curves": {action: {"roc": roc, "reliability": bins} for action in ACTIONS},
        "slices": {"training rows of the user": {"0 (new users)": GROUP, SCRIPT: {"rows": 5, "targets": 0}}},
    }
    files["table/stats.json"] = {"flagged_columns": []}
    test["index"]["next_clicks"] = {"k": 20, "recall": {"with": estimate(0.31), "without": estimate(0.33)}}
    files["recommender/index/tuning.json"] = {
        "target_recall": 0.99,
        "k": 100,
        "queries": 777,
        "items": 3700,
        "chosen": TRIALS[1],
        "trials": TRIALS,
    }
    return files


def page_of(folder, files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    return Page(report_of(folder, files))


def test_curves_of_every_action_and_the_funnel_are_drawn(tmp_path, files):
    page = page_of(tmp_path, files)
    titles = "\n".join(page.title_of_svg)
    assert page.title_of_svg.count("ROC curve of each action; the dotted line is chance") == 1
    for action in ACTIONS:
        assert f"Reliability of {action}" in titles
    assert "Share of the clicked items that is still there" in titles
    assert "Recall@100 and queries a second of the settings tried; the dotted line is the recall to reach" in titles
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    assert page.headings.count(1) == 1


@pytest.mark.usefixtures("no_matplotlib")
def test_tables_show_the_numbers_of_the_files(tmp_path, files):
    page, test = page_of(tmp_path, files), files["eval/test.json"]
    header, *rows = page.tables["like: 4,321 positives in 30,123 test rows of 1,234 users"]
    assert header[-2:] == ["true probabilities", "ranker, validation"]
    assert rows[0][-2] == shown(test["oracle"]["ranking"]["like"]["auc"])
    assert "the ranker has 61.20 % in AUC and n/a in GAUC" in page.text
    assert page.tables["Lists of 20 items of 1,234 users"][1:] == [
        ["model", "43.21 %", "7.5000", "0.8700"],
        ["popularity", "1.00 %", "3.0000", "0.9900"],
    ]
    recall = test["two_stage"]["recall"]
    assert page.tables["From all items to the list"][1:] == [
        ["recall among the 200 candidates", shown(recall["candidates"])],
        ["recall first 20 of the pair", shown(recall["pair"])],
        ["recall first 20 of retrieval alone", shown(recall["retrieval"])],
        ["what the pair adds to retrieval alone, paired by user", shown(recall["gain"])],
    ]
    assert "retrieval 0.31 ms, ranking 4.50 ms" in page.text
    header, full, empty = page.tables["By training rows of the user"]
    assert header[1:] == ["rows", "clicks ranked", "click auc", "click log_loss", "recall@20"]
    assert full == ["0 (new users)", "1,234", "567", shown(GROUP["auc"]), "n/a", shown(GROUP["recall@20"])]
    assert empty == [SCRIPT, "5", "0", "–", "–", "–"]
    assert page.tables["Evaluation of the test rows"][1:] == [["ranking rows per second", "12,346"]]


@pytest.mark.usefixtures("no_matplotlib")
def test_what_the_index_loses_and_how_its_settings_were_chosen_is_shown(tmp_path, files):
    page, recall = page_of(tmp_path, files), files["eval/test.json"]["index"]["next_clicks"]["recall"]
    assert page.tables["Next clicks in the first 20, 1,000 users"][1:] == [
        ["with the index", shown(recall["with"])],
        ["by exact search", shown(recall["without"])],
    ]
    assert page.tables["Settings tried on 777 validation queries, for a recall@100 of 0.99"][1:] == [
        ["3 of 61", "200", "0.9510", "20,500", ""],
        ["9 of 61", "200", "0.9912", "8,100", "chosen"],
    ]
    (tmp_path / "recommender" / "index" / "tuning.json").unlink()
    del files["recommender/index/tuning.json"]
    assert "The index was not tuned" in page_of(tmp_path, files).text


@pytest.mark.usefixtures("no_matplotlib")
def test_a_sound_run_has_no_warning_and_says_when_its_test_rows_were_read(tmp_path, files):
    text = page_of(tmp_path, files).text
    assert "WARNING" not in text
    assert "No column of the log gives the label away" in text
    assert "2026-01-02T03:04:05+00:00" in text
    assert "the epoch of the best click AUC on validation rows" in text


@pytest.mark.usefixtures("no_matplotlib")
def test_readings_leaks_and_skipped_steps_are_named(tmp_path, files):
    test = files["eval/test.json"]
    test["test_opened"] = {"times": 2, "readings": [{"at": "one", "command": []}, {"at": "two", "command": []}]}
    test["skipped"] = ["the oracle, for some reason"]
    files["table/stats.json"]["flagged_columns"] = ["watching_times"]
    text = page_of(tmp_path, files).text
    assert "WARNING: the test rows were read 2 times: one, two." in text
    assert "must not be inputs: watching_times." in text
    assert "Skipped: the oracle, for some reason." in text
    del files["table/stats.json"], test["test_opened"]
    (tmp_path / "table" / "stats.json").unlink()
    text = page_of(tmp_path, files).text
    assert "Leaks were not looked for" in text
    assert "did not record when its test rows were read" in text


def test_the_true_probabilities_stand_in_the_console_table_but_are_no_baseline_to_beat(files):
    test = files["eval/test.json"]
    assert results_table(test).count("true probabilities") == len(ACTIONS)
    assert len(comparisons(test)) == 26
    assert max(map(len, results_table(test).splitlines())) <= 100


@pytest.fixture
def two_runs(tmp_path, files):
    other = copy.deepcopy(files)
    other["eval/test.json"]["retrieval"]["recall@10"] = estimate(0.123)
    del other["eval/test.json"]["two_stage"]
    other["config.json"]["seed"] = 8
    for name, content in (("a", files), ("b", other)):
        page_of(tmp_path / name, content)
    return tmp_path / "a", tmp_path / "b", files, other


@pytest.mark.usefixtures("no_matplotlib")
def test_several_runs_stand_side_by_side_in_one_file(two_runs, tmp_path, capsys):
    one, two, files, other = two_runs
    assert main(["report", str(one), str(two), "--out", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "both.html")
    html = (tmp_path / "both.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "http" not in html
    tests = files["eval/test.json"], other["eval/test.json"]
    header, *rows = page.tables["retrieval, with 95 % intervals"]
    assert header == ["metric", str(one), str(two)]
    assert rows == [[m, *(shown(test["retrieval"][m]) for test in tests)] for m in tests[0]["retrieval"]]
    header, *rows = page.tables["follow, with 95 % intervals"]
    assert [row[1] for row in rows] == [shown(tests[0]["ranking"]["follow"][row[0]]) for row in rows]
    assert page.tables["Settings"][1:] == [["seed", "7", "8"]]
    assert "The runs have the same rows and protocol." in page.text
    assert page.tables["Share of the clicked items, and time of one user"][0] == ["", str(one)]


@pytest.mark.usefixtures("no_matplotlib")
def test_runs_of_other_rows_are_shown_with_a_warning_and_unfinished_ones_refused(two_runs, tmp_path):
    one, two, _, other = two_runs
    other["eval/test.json"]["split_sha256"] = "else"
    page_of(two, other)
    text = Page(write_side_by_side([one, two], tmp_path / "both.html").read_text(encoding="utf-8")).text
    assert "The runs differ in split_sha256: their numbers cannot be compared." in text
    with pytest.raises(UserError, match="named twice"):
        write_side_by_side([one, one], tmp_path / "both.html")
    with pytest.raises(UserError, match="is missing"):
        write_side_by_side([one, tmp_path / "none"], tmp_path / "both.html")
