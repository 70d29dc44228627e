"""Ingestion against plain Python: what is kept, what is refused and how it is named, and what stands on disk afterwards."""

import hashlib
import json
import os
import re
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tenrec_jax.data import ingest as ingest_module
from tenrec_jax.data import sources as sources_module
from tenrec_jax.data.ingest import IngestOptions, ingest
from tenrec_jax.data.interactions import logical_sha256, open_table, read_events
from tenrec_jax.data.schema import ACTIONS, KINDS, NULL, Role
from tenrec_jax.data.values import parse, problem_of
from tenrec_jax.errors import UserError
from tenrec_jax.sealed import read_stamped, write_stamped

VIDEO = ("user_id", "item_id", "click", "follow", "like", "share", "video_category", "watching_times", "gender", "age")
ROW = (1, 4, 0, 0, 0, 0, 1, 0, 1, 4)
INT64 = st.integers(0, 2**63 - 1)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "datasets" / "s3rec"


def csv_bytes(rows, header=VIDEO):
    return "".join(",".join(map(str, line)) + "\n" for line in (header, *rows)).encode()


def write(folder, data, name="log.csv"):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else csv_bytes(data))
    return path


def made(folder, data, kind="qb_video", name="log.csv", **options):
    """The table that a file gives, and its manifest."""
    out = folder / f"{name}.table"
    manifest = ingest([write(folder, data, name)], kind, out, IngestOptions(**options), progress=False)
    return open_table(out), manifest


def events_of(folder, *columns):
    """Columns of a table's shards, row by row."""
    return pa.Table.from_batches(read_events(folder, columns)).to_pydict()


def refusal(folder, data, kind="qb_video"):
    """The message with which a file is refused; nothing may have been written but the list of bad rows."""
    path = write(folder, data)
    with pytest.raises(UserError) as error:
        ingest([path], kind, folder / "table", progress=False)
    written = [entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.is_file()]
    assert set(written) <= {path.name, "table/quarantine.csv"}
    return str(error.value).replace(f"{folder}{os.sep}", "")


def raw_rows(table):
    """(raw user, raw item, *labels) of each row."""
    users, items = table.users.raw_id[table.user_R], table.items.raw_id[table.item_R]
    return list(zip(users.tolist(), items.tolist(), *table.labels_RA.T.tolist(), strict=True))


video_rows = st.lists(
    st.tuples(
        st.sampled_from([7, 0, 3, 2**63 - 1]),
        st.sampled_from([5, 9, 1, 0, 2**62]),
        *[st.integers(0, 1)] * 4,
        st.sampled_from(["0", "1", NULL]),
        st.integers(0, 3),
        st.integers(0, 2),
        st.integers(0, 7),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=40, deadline=None)
@given(rows=video_rows)
def test_table_equals_grouping_row_by_row(rows):
    with tempfile.TemporaryDirectory() as name:
        table, manifest = made(Path(name), rows)
        others = ("video_category", "watching_times", "gender", "age")
        events = events_of(Path(name) / "log.csv.table", "user", "item", *others)
    users, items = list(dict.fromkeys(row[0] for row in rows)), list(dict.fromkeys(row[1] for row in rows))
    grouped = [row for user in users for row in rows if row[0] == user]
    assert table.users.raw_id.tolist() == [-1, *users]
    assert table.items.raw_id.tolist() == [-1, *items]
    assert raw_rows(table) == [(u, i, click, like, share, follow) for u, i, click, follow, like, share, *_ in grouped]
    assert table.offsets.tolist()[:2] == [0, 0]
    for dense, user in enumerate(users, 1):
        assert [row[0] for row in grouped[table.rows_of(dense)]] == [user] * sum(row[0] == user for row in rows)

    def first(place, key, missing):
        found = {}
        for row in rows:
            if row[place] != missing:
                found.setdefault(row[key], int(row[place]))
        return found

    category, gender, age = first(6, 1, NULL), first(8, 0, 0), first(9, 0, 0)
    assert table.items.category.tolist() == [0, *(category[item] + 1 if item in category else 0 for item in items)]
    assert table.users.gender.tolist() == [0, *(gender.get(user, 0) for user in users)]
    assert table.users.age.tolist() == [0, *(age.get(user, 0) for user in users)]
    assert manifest.counts == {
        "rows": len(rows),
        "users": len(users),
        "items": len(items),
        **{action: sum(row[VIDEO.index(action)] for row in rows) for action in ACTIONS},
        "repeated_pairs": len(rows) - len({row[:2] for row in rows}),
        "duplicate_rows": len(rows) - len(set(rows)),
        "contradicting_pairs": sum(
            len({row[2:6] for row in rows if row[:2] == pair}) > 1 for pair in {row[:2] for row in rows}
        ),
        "bad_rows": 0,
        "user_feature_conflicts": sum(
            (row[8] != 0 and row[8] != gender[row[0]]) or (row[9] != 0 and row[9] != age[row[0]]) for row in rows
        ),
        "item_feature_conflicts": sum(row[6] != NULL and int(row[6]) != category[row[1]] for row in rows),
    }
    assert events["user"] == table.user_R.tolist()
    assert events["item"] == table.item_R.tolist()
    assert events["video_category"] == [None if row[6] == NULL else int(row[6]) for row in grouped]
    for name in ("watching_times", "gender", "age"):
        assert events[name] == [row[VIDEO.index(name)] for row in grouped]


def test_ctr_1m_keeps_its_history_columns_on_disk_alone(tmp_path):
    header = (*VIDEO, *(f"hist_{k}" for k in range(1, 11)))
    rows = [(*ROW, *range(2, 12)), (1, 1201, 1, 0, 0, 0, NULL, 1, 1, 4, 2, 3, *[0] * 8)]
    table, _ = made(tmp_path, csv_bytes(rows, header), "ctr_1m")
    names = [f"hist_{k}" for k in range(1, 11)]
    events = events_of(tmp_path / "log.csv.table", *names)
    assert [events[name] for name in names] == [list(pair) for pair in zip(rows[0][10:], rows[1][10:], strict=True)]
    assert table.kind == "ctr_1m"


def test_the_columns_are_those_of_the_published_files():
    assert KINDS["qb_video"].header == KINDS["qk_video"].header == VIDEO
    assert KINDS["ctr_1m"].header == (*VIDEO, *(f"hist_{k}" for k in range(1, 11)))
    for kind in ("qb_video", "qk_video", "ctr_1m"):
        assert KINDS[kind].actions == ACTIONS
        assert [column.name for column in KINDS[kind].with_role(Role.POST_EXPOSURE)] == ["watching_times"]
        assert not any(column.feature for column in KINDS[kind].with_role(Role.POST_EXPOSURE))


VARIANTS = {
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "crlf": lambda data: data.replace(b"\n", b"\r\n"),
    "both": lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"),
    "no newline at the end": lambda data: data[:-1],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_hash_of_a_table_does_not_depend_on_how_its_source_is_encoded(tmp_path, variant):
    rows = [ROW, (2, 5, 1, 0, 0, 0, NULL, 1, 1, 4), ROW]
    plain, manifest = made(tmp_path, rows)
    other, other_manifest = made(tmp_path, VARIANTS[variant](csv_bytes(rows)), name="other.csv")
    assert raw_rows(other) == raw_rows(plain)
    assert other.sha256 == plain.sha256 == manifest.sha256 == logical_sha256(plain)
    assert other_manifest.sources != manifest.sources


def test_a_log_in_two_files_is_the_log_in_one(tmp_path):
    rows = [ROW, (2, 5, 1, 0, 0, 0, 1, 1, 1, 4), (1, 5, 1, 0, 1, 0, 1, 1, 1, 4)]
    whole, _ = made(tmp_path, rows)
    halves = [write(tmp_path, rows[:1], "a.csv"), write(tmp_path, rows[1:], "b.csv")]
    ingest(halves, "qb_video", tmp_path / "halves", progress=False)
    assert open_table(tmp_path / "halves").sha256 == whole.sha256


@pytest.mark.parametrize("place", range(len(VIDEO)))
def test_the_hash_depends_on_every_modelled_column(tmp_path, place):
    changed = list(ROW)
    changed[place] = 0 if changed[place] else 1
    table, _ = made(tmp_path, [ROW])
    other, _ = made(tmp_path, [changed], name="other.csv")
    assert (table.sha256 != other.sha256) == (VIDEO[place] != "watching_times")


GOOD = csv_bytes([ROW])
HEADER, LINE = csv_bytes([]), csv_bytes([ROW], header=ROW)[: len(csv_bytes([], header=ROW))]
REFUSALS = {
    "empty": (b"", "log.csv is empty"),
    "header alone": (HEADER, "log.csv holds a header line and no rows"),
    "header with a byte order mark": (b"\xef\xbb\xbf" + HEADER, "log.csv holds a header line and no rows"),
    "header with crlf": (HEADER.replace(b"\n", b"\r\n"), "log.csv holds a header line and no rows"),
    "header without newline": (HEADER[:-1], "log.csv holds a header line and no rows"),
    "no header": (LINE * 2, "log.csv:1: .*first line holds values; put the header line in front"),
    "semicolons": (GOOD.replace(b",", b";"), "log.csv:1: .*separated by ';'"),
    "tabs": (GOOD.replace(b",", b"\t"), r"log.csv:1: .*separated by '\\t'"),
    "missing column": (GOOD.replace(b"click,", b""), "log.csv:1: .*column click is missing(.|\n)*expected: user_id"),
    "unknown column": (GOOD.replace(b"age\n", b"age,mood\n"), "column 'mood' is unknown(.|\n)*found: .*mood"),
    "column twice": (GOOD.replace(b"like,", b"like,like,"), "column like stands 2 times"),
    "order": (GOOD.replace(b"click,follow", b"follow,click"), "column 3 should be click and is follow; column 4"),
    "other kind": (
        csv_bytes([], (*VIDEO, *(f"hist_{k}" for k in range(1, 11)))),
        "these are the 20 columns of ctr_1m; use --kind ctr_1m",
    ),
    "utf-16": (GOOD.decode().encode("utf-16"), "log.csv:1 holds a NUL byte"),
    "header in latin-1": (b"\xe9" + GOOD, "log.csv:1 is not UTF-8"),
    "value in latin-1": (
        GOOD + b"1,\xe9,0,0,0,0,1,0,1,4\n",
        r"log.csv:3: column item_id: '\\\\xe9' is not a plain integer",
    ),
    "NUL byte": (GOOD + b"1,4\0,0,0,0,0,1,0,1,4\n", r"log.csv:3: column item_id: '4\\x00' holds a NUL byte"),
    "binary": (HEADER + bytes(range(256)) * 40, "log.csv holds .* bad row"),
    "blank line": (GOOD + b"\n" + LINE, "log.csv:3: blank line"),
    "blank line at the end": (GOOD + b"\n", "log.csv:3: blank line"),
    "too few fields": (GOOD + b"1,4,0\n", "log.csv:3: '1,4,0' has 3 fields instead of 10"),
    "too few, not UTF-8": (GOOD + b"1,\xff\n", r"log.csv:3: '1,\\\\xff' has 2 fields instead of 10"),
    "too many fields": (GOOD + LINE[:-1] + b",9\n", "log.csv:3: .* has 11 fields instead of 10"),
    "cut short": (GOOD + LINE[:7], "log.csv:3: .* has 4 fields instead of 10"),
    "endless line": (HEADER + b"1" * (9 << 20), "log.csv"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_file_that_is_not_as_it_should_be_is_refused_by_name(tmp_path, case):
    data, expected = REFUSALS[case]
    assert re.search(expected, refusal(tmp_path, data)), refusal(tmp_path, data)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *[(name, "-1") for name in VIDEO],
        *[(name, "") for name in VIDEO],
        *[(name, r"\N") for name in VIDEO if name != "video_category"],
        *[(name, "2") for name in ("click", "follow", "like", "share", "video_category")],
        ("gender", "3"),
        ("age", "8"),
        ("watching_times", str(2**31)),
        ("user_id", str(2**63)),
        ("item_id", "1" * 40),
        *[
            ("item_id", value)
            for value in ("1.0", "1e3", "+1", " 1", "1 ", "01", "0x1", "-0", "1_0", "nan", '"1"', "١")
        ],
        ("video_category", r"\n"),
        ("video_category", "null"),
    ],
)
def test_a_value_outside_its_column_is_refused_by_line_column_and_value(tmp_path, column, value):
    row = list(ROW)
    row[VIDEO.index(column)] = value
    message = refusal(tmp_path, [ROW, ROW, row, ROW])
    assert message.startswith("log.csv holds 1 bad row of 4:\n  log.csv:4: column " + column)
    assert repr(value) in message or (value == "" and "is empty" in message)


@pytest.mark.parametrize(("column", "value"), [("user_id", 2**63 - 1), ("item_id", 0), ("watching_times", 2**31 - 1)])
def test_the_ends_of_a_range_are_accepted(tmp_path, column, value):
    row = list(ROW)
    row[VIDEO.index(column)] = value
    _, manifest = made(tmp_path, [row])
    assert manifest.counts["rows"] == 1


BAD_LINES = ("1,4", "1,4,9,0,0,0,1,0,1,4", "", "x,4,0,0,0,0,1,0,1,4", "1,4,0,0,0,0,1,0,1,4,5")


@settings(max_examples=40, deadline=None)
@given(lines=st.lists(st.one_of(st.just(None), st.sampled_from(BAD_LINES)), min_size=1, max_size=60))
@example(lines=[""] * 5)
@example(lines=[None] * 40 + [BAD_LINES[1]] * 12 + [BAD_LINES[0]])
def test_the_first_ten_bad_rows_are_named_by_their_lines_and_all_are_counted(lines):
    good = ",".join(map(str, ROW))
    text = "\n".join([",".join(VIDEO), *(good if line is None else line for line in lines)]) + "\n"
    bad = [number for number, line in enumerate(lines, 2) if line is not None]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_module, "BLOCK_BYTES", 200)
        if not bad:
            assert made(Path(name), text.encode())[1].counts["rows"] == len(lines)
            return
        message = refusal(Path(name), text.encode())
    assert [int(number) for number in re.findall(r"^  log\.csv:(\d+): ", message, re.MULTILINE)] == bad[:10]
    assert f"{len(bad)} bad row" in message


@settings(max_examples=300, deadline=None)
@given(
    value=st.one_of(
        st.text("0123456789-+. xeN\\_aif", max_size=6),
        st.integers(-(2**64), 2**64).map(str),
        st.sampled_from(["True", "False", "true", "1.0", "0.0", "2.0", "nan", "inf", "1e400"]),
    ),
    column=st.sampled_from([column for kind in KINDS.values() for column in kind.columns]),
)
def test_what_is_parsed_is_what_the_explanation_finds_right(value, column):
    is_plain = column.form == "plain"
    whole = r"0|-?[1-9]\d*" if is_plain else r"\d+(\.0*)?"
    pattern = whole if column.dtype.startswith("int") else r"\d+(\.\d+)?([eE][+-]?\d+)?"
    number = int if column.dtype.startswith("int") and is_plain else float
    if column.form == "flag":
        pattern, number = "True|true|False|false|[01](\\.0)?", lambda text: float(text.lower() in ("true", "1", "1.0"))
    allowed = value in column.nulls or (
        bool(re.fullmatch(pattern, value)) and column.low <= number(value) <= column.high
    )
    parsed = parse(column, pa.array([value], pa.string()))
    assert (parsed is not None) == allowed
    assert (problem_of(column, value.encode()) == "") == allowed
    if allowed:
        assert parsed.to_pylist() == [None if value in column.nulls else np.dtype(column.dtype).type(number(value))]


@settings(max_examples=25, deadline=None)
@given(
    log=st.dictionaries(
        st.integers(-(2**63), 2**63 - 1), st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), min_size=1
    ),
    separator=st.sampled_from([" ", "\t", "  ", " \t "]),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
def test_both_layouts_of_sequences_give_the_same_table(log, separator, end, last):
    by_user = [separator.join(map(str, [user, *items])) for user, items in log.items()]
    rounds = range(max(map(len, log.values())))
    by_event = [f"{user}{separator}{items[k]}" for k in rounds for user, items in log.items() if k < len(items)]
    with tempfile.TemporaryDirectory() as name:
        tables = [
            made(Path(name), (end.join(lines) + (end if last else "")).encode(), "sequences", f"{i}.txt")[0]
            for i, lines in enumerate((by_user, by_event))
        ]
    for table in tables:
        assert table.num_rows == sum(map(len, log.values()))
        for user, items in log.items():
            rows = table.rows_of(table.dense_user(user))
            assert table.items.raw_id[table.item_R[rows]].tolist() == items
        assert (table.actions, table.has_exposures) == (("click",), False)
        assert table.labels_RA.shape == (table.num_rows, 1)
        assert table.labels_RA.all()
    assert tables[0].users.raw_id.tolist() == tables[1].users.raw_id.tolist() == [-1, *log]


SEQUENCE_REFUSALS = {
    "user twice": (b"1 2 3\n5 6\n1 4\n", "log.csv:3: column user: '1' stands on an earlier line already"),
    "no item": (b"1 2 3\n7\n", "log.csv:2: '7' is a user without an item"),
    "blank line": (b"1 2 3\n\n2 1\n", "log.csv:2: blank line"),
    "not an integer": (b"1 2 3\n2 4 x5\n", "log.csv:2: column item 2: 'x5' is not"),
    "user not an integer": (b"1 2\nu2 4\n", "log.csv:2: column user: 'u2' is not"),
    "beyond 64 bits": (b"1 2 3\n2 9223372036854775808\n", "log.csv:2: column item 1: '9223372036854775808' is not"),
    "leading zero": (b"1 2 3\n2 02\n", "log.csv:2: column item 1: '02' is not"),
    "commas": (b"1,2,3\n", "log.csv:1: '1,2,3' is a user without an item"),
    "carriage returns alone": (b"1 2\r3 4\r", "log.csv:1 holds the byte"),
    "empty": (b"", "log.csv is empty"),
    "byte order mark alone": (b"\xef\xbb\xbf", "log.csv is empty"),
    "utf-16": ("1 2\n".encode("utf-16"), "log.csv:1"),
    "digits of another script": ("1 2 3\n2 ٢\n".encode(), "log.csv:2: column item 1: '٢' is not"),
}


@pytest.mark.parametrize("case", SEQUENCE_REFUSALS)
def test_sequences_that_are_not_as_they_should_be_are_refused_by_name(tmp_path, case):
    data, expected = SEQUENCE_REFUSALS[case]
    assert expected in refusal(tmp_path, data, "sequences")


def test_a_user_on_lines_of_two_files_is_refused(tmp_path):
    paths = [write(tmp_path, b"1 2 3\n", "a.txt"), write(tmp_path, b"2 3 4\n1 5 6\n", "b.txt")]
    with pytest.raises(UserError, match=r"b\.txt:2: column user: '1' stands on an earlier line"):
        ingest(paths, "sequences", tmp_path / "table", progress=False)


@pytest.mark.parametrize(
    ("name", "events", "users", "items"), [("Beauty", 198_502, 22_363, 12_101), ("LastFM", 52_551, 1_090, 3_646)]
)
def test_real_sequences_have_their_published_sizes(tmp_path, name, events, users, items):
    path = SHARED / f"{name}.txt"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    counts = ingest([path], "sequences", tmp_path / "table", progress=False).counts
    assert (counts["rows"], counts["users"], counts["items"], counts["click"]) == (events, users, items, events)
    table, lines = open_table(tmp_path / "table"), path.read_text().splitlines()
    for line in (lines[0], lines[-1]):
        user, *sequence = map(int, line.split())
        assert table.items.raw_id[table.item_R[table.rows_of(table.dense_user(user))]].tolist() == sequence


FLAGS = 19
U_DATA = "9\t3\t5\t300\n2\t1\t3\t50\n9\t1\t4\t100\n9\t2\t3\t100\n2\t3\t4\t40\n"
U_USER = "2|53|F|other|94043\n9|24|M|writer|85711\n4|7|F|none|00000\n"


def u_item(genres_of):
    lines = []
    for item, genres in genres_of.items():
        flags = ["1" if flag in genres else "0" for flag in range(FLAGS)]
        lines.append("|".join([str(item), "Amélie", "01-Jan-1995", "", "http://x", *flags]))
    return ("\n".join(lines) + "\n").encode("latin-1")


def movielens_zip(path, files, folder="deep/ml-100k/"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.txt", "1")
        for name, data in files.items():
            archive.writestr(folder + name, data)
    return path


# Flags 1 Action, 5 Comedy, 0 unknown, 8 Drama. Sorted: Action, Comedy, Drama, unknown.
GROUPLENS = {"u.data": U_DATA, "u.user": U_USER, "u.item": u_item({1: [5, 8], 2: [0], 3: [1], 7: []})}
RECBOLE = {
    "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + U_DATA,
    "ml-100k.user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    + U_USER.replace("|", "\t"),
    "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "1\tAmélie\t1995\tComedy Drama\n2\tAmélie\t1995\tunknown\n3\tAmélie\t1995\tAction\n7\tAmélie\t1995\t\n",
}


@pytest.mark.parametrize("files", [GROUPLENS, RECBOLE], ids=["grouplens", "recbole"])
@pytest.mark.parametrize("as_folder", [False, True], ids=["zip", "folder"])
def test_movielens_is_read_from_either_edition(tmp_path, files, as_folder):
    source = movielens_zip(tmp_path / "ml.whl", files)
    if as_folder:
        zipfile.ZipFile(source).extractall(tmp_path / "unpacked")
        source = tmp_path / "unpacked"
    manifest = ingest([source], "movielens", tmp_path / "table", progress=False)
    table = open_table(tmp_path / "table")
    assert (table.actions, table.has_exposures) == (("click", "like"), True)
    assert raw_rows(table) == [(9, 1, 1, 0), (9, 2, 0, 0), (9, 3, 1, 1), (2, 3, 1, 0), (2, 1, 0, 0)]
    assert table.users.raw_id.tolist() == [-1, 9, 2]
    assert table.items.raw_id.tolist() == [-1, 3, 1, 2]
    assert table.users.gender.tolist() == [0, 1, 2]
    assert table.users.age.tolist() == [0, 1 + 2, 1 + 5]
    assert manifest.categories == ("Action", "Comedy", "Drama", "unknown")
    assert table.items.category.tolist() == [0, 1, 2, 4]
    events = events_of(tmp_path / "table", "rating", "timestamp")
    assert events["rating"] == [4, 3, 5, 4, 3]
    assert events["timestamp"] == [100, 100, 300, 40, 50]
    assert [source.name for source in manifest.sources] == (
        sorted(files, key=list(files).index) if as_folder else ["ml.whl"]
    )


MOVIELENS_REFUSALS = {
    "nothing": ({"u.base": U_DATA}, "holds no MovieLens-100K"),
    "no users": ({k: v for k, v in GROUPLENS.items() if k != "u.user"}, "but not deep/ml-100k/u.user"),
    "rating": (GROUPLENS | {"u.data": "9\t3\t6\t300\n"}, "u.data:1: column rating: '6' is not between"),
    "fields": (GROUPLENS | {"u.data": U_DATA + "9\t3\t5\n"}, "u.data:6: '9\\t3\\t5' has 3 fields instead of 4"),
    "empty": (GROUPLENS | {"u.data": ""}, "u.data is empty"),
    "unknown user": (GROUPLENS | {"u.data": U_DATA + "8\t3\t5\t1\n"}, "u.data:6: column user_id: '8' is not in "),
    "unknown item": (
        RECBOLE | {"ml-100k.inter": RECBOLE["ml-100k.inter"] + "9\t99\t5\t1\n"},
        "inter:7: column item_id: '99' is not in ",
    ),
    "gender": (GROUPLENS | {"u.user": U_USER + "5|30|X|none|0\n"}, "u.user:4: column gender: 'X' is neither M nor F"),
    "age": (GROUPLENS | {"u.user": U_USER + "5|old|F|none|0\n"}, "u.user:4: column age: 'old' is not"),
    "user twice": (
        GROUPLENS | {"u.user": U_USER + "9|3|F|none|0\n"},
        "u.user:4: column user_id: '9' stands on an earlier",
    ),
    "user fields": (GROUPLENS | {"u.user": U_USER + "5|30\n"}, "u.user:4: '5|30' has 2 fields instead of 5"),
    "item flag": (
        GROUPLENS | {"u.item": u_item({1: [], 2: [], 3: []}).replace(b"|0\n", b"|7\n")},
        "u.item:1: column item_id: '1' has a genre flag",
    ),
    "header": (RECBOLE | {"ml-100k.user": RECBOLE["ml-100k.user"][1:]}, "ml-100k.user:1: not the expected header"),
    "encoding": (RECBOLE | {"ml-100k.item": RECBOLE["ml-100k.item"].encode("latin-1")}, "is not UTF-8"),
}


@pytest.mark.parametrize("case", MOVIELENS_REFUSALS)
def test_movielens_that_is_not_as_it_should_be_is_refused_by_name(tmp_path, case):
    files, expected = MOVIELENS_REFUSALS[case]
    source = movielens_zip(tmp_path / "ml.zip", files)
    with pytest.raises(UserError, match=re.escape(expected)):
        ingest([source], "movielens", tmp_path / "table", progress=False)
    assert set(tmp_path.iterdir()) <= {source, tmp_path / "table"}
    assert not (tmp_path / "table" / "manifest.json").exists()


def test_movielens_twice_in_one_folder_or_not_in_an_archive_is_refused(tmp_path):
    (tmp_path / "both").mkdir()
    for name in ("a", "b"):
        (tmp_path / "both" / name).mkdir()
        write(tmp_path / "both" / name, U_DATA.encode(), "u.data")
    for source, expected in (
        (tmp_path / "both", "u.data 2 times: a/u.data, b/u.data"),
        (write(tmp_path, U_DATA.encode(), "u.data"), "is not a zip archive"),
        (tmp_path / "absent", "There is no file or folder"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)):
            ingest([source], "movielens", tmp_path / "table", progress=False)


def test_a_missing_licensed_file_says_where_to_get_it_and_what_to_do_without(tmp_path):
    with pytest.raises(UserError) as error:
        ingest([tmp_path / "data" / "QK-video.csv"], "qk_video", tmp_path / "table")
    for part in ("QK-video.csv", str(tmp_path / "data"), "2022-NIPS-Tenrec", "accepting its terms", "CC BY-NC 4.0"):
        assert part in str(error.value)
    assert "tenrec-jax synth --kind qb_video" in str(error.value)


def test_sources_that_cannot_be_a_log_are_refused(tmp_path):
    path = write(tmp_path, [ROW])
    for sources, kind, expected in (
        ([tmp_path], "qb_video", "is a folder"),
        ([tmp_path / "no.txt"], "sequences", "There is no file"),
        ([path, tmp_path / "." / path.name], "qb_video", "is named twice"),
        ([path, path], "movielens", "one folder or zip archive"),
        ([], "qb_video", "at least one source"),
        ([path], "qb_vidoe", "Did you mean qb_video?"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)):
            ingest(sources, kind, tmp_path / "table", progress=False)
    assert list(tmp_path.iterdir()) == [path]


def snapshot(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_the_same_sources_again_change_nothing(tmp_path):
    _, first = made(tmp_path, [ROW])
    before = snapshot(tmp_path / "log.csv.table")
    _, second = made(tmp_path, [ROW])
    assert snapshot(tmp_path / "log.csv.table") == before
    assert (first.is_new, second.is_new) == (True, False)
    assert first == second
    stated = json.loads(before["manifest.json"][1])
    assert (stated["kind"], stated["log_kind"]) == ("table", "qb_video")
    assert stated["files"] == {
        path.relative_to(tmp_path / "log.csv.table").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "log.csv.table").rglob("*")
        if path.is_file() and path.name not in ("manifest.json", "verified.json")
    }


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    made(tmp_path, [ROW])
    table = tmp_path / "log.csv.table"
    before = snapshot(table)
    (tmp_path / "busy").mkdir()
    write(tmp_path / "busy", b"mine", "notes.txt")
    changed = write(tmp_path, [ROW, ROW], "changed.csv")
    for source, kind, out, expected in (
        (tmp_path / "log.csv", "qk_video", table, "holds a table of kind qb_video, not qk_video"),
        (changed, "qb_video", table, "holds a table of other sources:\n  there: log.csv"),
        (changed, "qb_video", tmp_path / "busy", "exists and is not a table"),
        (changed, "qb_video", changed, "exists and is not a table"),
    ):
        with pytest.raises(UserError, match=re.escape(expected) + r"(.|\n)*Name another folder"):
            ingest([source], kind, out, progress=False)
    assert snapshot(table) == before
    assert (tmp_path / "busy" / "notes.txt").read_bytes() == b"mine"


def test_an_empty_folder_may_become_the_table(tmp_path):
    (tmp_path / "log.csv.table").mkdir()
    assert made(tmp_path, [ROW])[1].is_new


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ingest_module, "seal", stop)
    path = write(tmp_path, [ROW])
    with pytest.raises(KeyboardInterrupt):
        ingest([path], "qb_video", tmp_path / "table", progress=False)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_printed_without_progress(tmp_path, capfd):
    made(tmp_path, [ROW])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name",
    [
        "events/part-00000.parquet",
        "columns/item.npy",
        "columns/offsets.npy",
        "users.arrow",
        "items.arrow",
        "manifest.json",
    ],
)
def test_a_flipped_bit_or_a_lost_file_is_noticed(tmp_path, name):
    made(tmp_path, [ROW])
    table = tmp_path / "log.csv.table"
    path = table / name
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 128
    path.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(name)):
        open_table(table)
    with pytest.raises(UserError, match=re.escape(name)):
        ingest([tmp_path / "log.csv"], "qb_video", table, progress=False)
    path.unlink()
    with pytest.raises(UserError, match=re.escape(name)):
        open_table(table)


def test_pages_on_disk_carry_checksums(tmp_path):
    made(tmp_path, [(u, u * 7, 0, 0, 0, 0, 1, 0, 1, 4) for u in range(500)])
    path = tmp_path / "log.csv.table" / "events" / "part-00000.parquet"
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    data[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format_version": 3}, r"manifest\.json: format_version is 3"),
        ({"kind": "index"}, "'index', not table"),
        ({"kind": ["table"]}, "not table"),
        ({"counts": {"rows": "1"}, "actions": "click"}, r"manifest\.json cannot be read: counts, actions"),
        ({"sources": [{"name": "log.csv"}]}, r"manifest\.json cannot be read: sources"),
        ({"files": {"../log.csv": ""}}, "outside its folder"),
        ({"files": ["users.arrow"]}, "lists no files"),
        ({"files": {"": "", "\0": "", "\ud800": "", "x" * 300: ""}}, "is missing"),
    ],
)
def test_a_manifest_that_means_nothing_is_refused_though_its_hash_fits(tmp_path, change, expected):
    made(tmp_path, [ROW])
    path = tmp_path / "log.csv.table" / "manifest.json"
    write_stamped(path, read_stamped(path, remedy="") | change)
    with pytest.raises(UserError, match=expected):
        open_table(path.parent)


def test_a_folder_without_a_manifest_is_no_table(tmp_path):
    with pytest.raises(UserError, match=r"no manifest\.json"):
        open_table(tmp_path)


def test_an_open_table_cannot_be_written_to(tmp_path):
    table, _ = made(tmp_path, [ROW])
    arrays = [
        table.user_R,
        table.item_R,
        table.labels_RA,
        table.offsets,
        *vars(table.users).values(),
        *vars(table.items).values(),
    ]
    assert [array.dtype.name for array in arrays] == [
        *("int32", "int32", "int8", "int64"),
        *("int64", "int32", "int32"),
        *("int64", "int32"),
    ]
    assert not any(array.flags.writeable for array in arrays)


def test_raw_ids_are_found_and_others_are_unknown(tmp_path):
    rows = [(u, i, *ROW[2:]) for u, i in ((9, 50), (3, 20), (9, 2**63 - 1), (4, 0))]
    table, _ = made(tmp_path, rows)
    assert [table.dense_user(raw) for raw in (9, 3, 4, 5, -1, 0, 2**70)] == [1, 2, 3, 0, 0, 0, 0]
    found = table.dense_item([[50, 20, 7], [2**63 - 1, 0, -1]])
    assert found.tolist() == [[1, 2, 0], [3, 4, 0]]
    assert found.dtype == np.int32
    assert table.dense_item([]).shape == (0,)
    assert table.dense_item([2**64, 50]).tolist() == [0, 1]
    assert (table.rows_of(0), table.rows_of(1)) == (slice(0, 0), slice(0, 2))
    with pytest.raises(TypeError):
        table.dense_item([0.5])
    with pytest.raises(IndexError):
        table.rows_of(4)
