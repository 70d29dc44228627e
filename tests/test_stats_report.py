"""tenrec-jax stats: the files it writes, read back; its options and its refusals."""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tenrec_jax.__main__ import main
from tenrec_jax.data.ingest import ingest
from tenrec_jax.data.synthetic import write_twin

ROWS = 3_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twin")
    write_twin(folder / "log.csv", kind="ctr_1m", rows=ROWS, seed=1, progress=False)
    ingest([folder / "log.csv"], "ctr_1m", folder / "table", progress=False)
    return folder


class Page(HTMLParser):
    """Headings, captions and every address of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "br"}:
            self.open.append(tag)
        found = dict(attributes)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.ids += [str(found["id"])] if "id" in found else []
        assert tag not in {"script", "link", "img", "iframe"}

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in {"meta", "br"}:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_json_and_page_are_written_into_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stats", folder / "table") == 0
    printed = capsys.readouterr().out
    value = json.loads((folder / "table" / "stats.json").read_text())
    assert value["stats"]["rows"] == ROWS
    assert sum(cell["rows"] for cell in value["stats"]["joint"]) == ROWS
    assert len(value["stats"]["joint"]) == 16
    assert "watching_times" in value["flagged_columns"]
    assert value["leakage"]["history"]["static_users"] == 1
    assert value["leakage"]["history"]["target_in_history"] == 0
    assert value["targets"] == []
    assert f"{ROWS:,} rows" in printed
    assert "flagged: watching_times" in printed
    assert str(folder / "table" / "stats.html") in printed


def test_page_needs_nothing_else_and_its_figures_have_ids_of_their_own(folder: Path) -> None:
    assert run("stats", folder / "table", "--out", folder / "page") == 0
    page = Page((folder / "page" / "stats.html").read_text())
    assert all(address.startswith("#") for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    text = " ".join(page.text)
    for heading in (
        "Size",
        "Actions",
        "Users and items",
        "Side features",
        "Repeats",
        "Split per_user_order",
        "Leakage",
    ):
        assert heading in text
    assert "known only after the exposure" in text
    assert "prefers-color-scheme:dark" in text
    assert "leak the future" in text


def test_truth_adds_the_targets_of_the_twin(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = folder / "log.truth.parquet"
    assert run("stats", folder / "table", "--out", folder / "twin", "--truth", truth, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value == json.loads((folder / "twin" / "stats.json").read_text())
    assert {"name", "target", "got", "tolerance", "met", "note"} <= set(value["targets"][0])
    text = " ".join(Page((folder / "twin" / "stats.html").read_text()).text)
    assert "Targets of the synthetic twin" in text
    assert "not judged" in text


def test_protocol_and_alarm_are_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "other"
    assert run("stats", folder / "table", "--out", out, "--protocol", "leave_one_out", "--leak_auc", 0.51) == 0
    capsys.readouterr()
    value = json.loads((out / "stats.json").read_text())
    assert value["stats"]["protocol"] == "leave_one_out"
    assert value["leakage"]["alarm"] == 0.51
    assert len(value["flagged_columns"]) > 1


def test_a_log_of_clicks_alone_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.txt").write_text("1 5 6 7 8\n2 5 8 9 6\n")
    ingest([tmp_path / "log.txt"], "sequences", tmp_path / "table", progress=False)
    assert run("stats", tmp_path / "table") == 0
    assert "8 rows, 2 users, 5 items" in capsys.readouterr().out
    value = json.loads((tmp_path / "table" / "stats.json").read_text())
    assert value["leakage"]["columns"][0]["auc"] is None
    assert value["leakage"]["history"] is None


def test_page_is_written_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("tenrec_jax.evaluation.figures.can_draw", lambda: False)
    monkeypatch.setattr("tenrec_jax.evaluation.stats_report.can_draw", lambda: False)
    assert run("stats", folder / "table", "--out", folder / "plain") == 0
    page = (folder / "plain" / "stats.html").read_text()
    assert "tenrec_jax[plot]" in page
    assert "<svg" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "per_user_ordr"], "Did you mean per_user_order"),
        (["--leak_auc", "0.5"], "above 0.5"),
        (["--truth", "nowhere.parquet"], "There is no nowhere.parquet"),
    ],
)
def test_wrong_options_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run("stats", folder / "table", "--out", folder / "refused", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "refused").exists()


def test_a_folder_without_a_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stats", tmp_path) == 2
    assert "tenrec-jax ingest" in capsys.readouterr().err
