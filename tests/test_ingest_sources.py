"""Ingestion of every form of source, and what a crash, a full disk or a crowd of damaged rows leave behind."""

import bz2
import csv
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenrec_jax.__main__ import main
from tenrec_jax.data import shards
from tenrec_jax.data import sources as sources_module
from tenrec_jax.data.blocks import Layout, parse_block
from tenrec_jax.data.ingest import IngestOptions, ingest
from tenrec_jax.data.interactions import open_table, read_events
from tenrec_jax.data.manifest import note_verified, read_manifest
from tenrec_jax.data.schema import KINDS, custom_kind
from tenrec_jax.data.sources import TextBlock
from tenrec_jax.errors import UserError

HEADER = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age"
GOOD = "1,4,0,0,0,0,1,0,1,4"


def text(*rows, header=HEADER):
    return "".join(f"{line}\n" for line in (header, *rows)).encode()


def taken_in(folder, data, kind="qb_video", name="log.csv", **options):
    """The table and manifest that the bytes of a file give."""
    path = folder / name
    path.write_bytes(data)
    out = folder / f"{name}.table"
    manifest = ingest([path], kind, out, IngestOptions(**options), progress=False)
    return open_table(out), manifest


def raw_rows(table):
    users, items = table.users.raw_id[table.user_R], table.items.raw_id[table.item_R]
    return list(zip(users.tolist(), items.tolist(), *table.labels_RA.T.tolist(), strict=True))


def column(table_folder, name):
    return pa.Table.from_batches(read_events(table_folder, [name]))[name].to_pylist()


def scattered(rows, users, seed=0):
    generator = random.Random(seed)
    return [
        f"{generator.randrange(users)},{generator.randrange(50)},{generator.randrange(2)},0,0,0,1,0,1,4"
        for _ in range(rows)
    ]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=60),
    bucket=st.integers(1, 5),
    chunk=st.integers(1, 9),
    group=st.integers(1, 7),
)
def test_users_become_contiguous_in_file_order_whatever_the_sizes_of_chunks_and_buckets(rows, bucket, chunk, group):
    data = text(*(f"{user},{item},{click},0,0,0,1,0,1,4" for user, item, click in rows))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_module, "BLOCK_BYTES", 64)
        patch.setattr(shards, "BUCKET_USERS", bucket)
        patch.setattr(shards, "CHUNK_ROWS", chunk)
        patch.setattr(shards, "ROW_GROUP_ROWS", group)
        table, _ = taken_in(Path(name), data)
        folder = Path(name) / "log.csv.table"
        parts = sorted((folder / "events").iterdir())
        groups = [
            set(pq.ParquetFile(part).read_row_group(g)["user"].to_pylist())
            for part in parts
            for g in range(pq.ParquetFile(part).num_row_groups)
        ]
        assert column(folder, "user") == table.user_R.tolist()
        assert column(folder, "click") == table.labels_RA[:, 0].tolist()
    order = list(dict.fromkeys(user for user, _, _ in rows))
    expected = [row for user in order for row in rows if row[0] == user]
    assert [row[:3] for row in raw_rows(table)] == expected
    assert len(parts) == len({(table.dense_user(user) - 1) // bucket for user in order})
    assert sum(map(len, groups)) == len(order)  # no row group shares a user with another


def test_compressed_files_give_the_table_of_the_plain_one(tmp_path):
    data = text(*scattered(300, 20))
    plain, _ = taken_in(tmp_path, data)
    zipped, manifest = taken_in(tmp_path, gzip.compress(data), name="log.csv.gz")
    squeezed, _ = taken_in(tmp_path, pa.Codec("zstd").compress(data, asbytes=True), name="log.csv.zst")
    assert plain.sha256 == zipped.sha256 == squeezed.sha256
    assert manifest.sources[0].name == "log.csv.gz"


def test_a_compressed_file_that_ends_early_is_refused(tmp_path):
    data = gzip.compress(text(*scattered(3000, 20)))
    with pytest.raises(UserError, match=r"log\.csv\.gz is damaged gzip data"):
        taken_in(tmp_path, data[: len(data) // 2], name="log.csv.gz")
    assert not (tmp_path / "log.csv.gz.table").exists()


BAD_ROWS = {
    "missing last field": ("1,4,0,0,0,0,1,0,1", "", "has 9 fields"),
    "extra field": (f"{GOOD},9", "", "has 11 fields"),
    "empty line": ("", "", "blank line"),
    "text in an integer": ("1,abc,0,0,0,0,1,0,1,4", "item_id", "plain integer"),
    "float in an integer": ("1,4.0,0,0,0,0,1,0,1,4", "item_id", "plain integer"),
    "negative id": ("-1,4,0,0,0,0,1,0,1,4", "user_id", "is not between"),
    "beyond int64": ("1,9223372036854775808,0,0,0,0,1,0,1,4", "item_id", "is not between"),
    "click of 2": ("1,4,2,0,0,0,1,0,1,4", "click", "is not between 0 and 1"),
    "click of -7": ("1,4,-7,0,0,0,1,0,1,4", "click", "is not between 0 and 1"),
    "null where not allowed": ("1,4,0,0,0,0,1,0,\\N,4", "gender", "plain integer"),
    "unbalanced quote": ('1,"4,0,0,0,0,1,0,1,4', "item_id", "plain integer"),
    "NUL byte": ("1,4\0,0,0,0,0,1,0,1,4", "item_id", "NUL"),
    "wrong encoding": ("1,é,0,0,0,0,1,0,1,4", "item_id", "plain integer"),
    "carriage return inside": ("1,4,\r0,0,0,0,1,0,1,4", "", "carriage return"),
    "header again": (HEADER, "user_id", "plain integer"),
    "too large for its type": ("1,4,0,0,0,0,1,2147483648,1,4", "watching_times", "is not between"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_listed_with_line_column_value_and_reason_and_the_others_are_kept(tmp_path, case):
    row, where, reason = BAD_ROWS[case]
    data = "".join(f"{line}\n" for line in (HEADER, GOOD, row, *[GOOD] * 8)).encode("latin-1")
    table, manifest = taken_in(tmp_path, data, max_bad_fraction=0.1)
    assert (table.num_rows, manifest.counts["bad_rows"]) == (9, 1)
    with (tmp_path / "log.csv.table" / "quarantine.csv").open(encoding="utf-8", newline="") as file:
        (listed,) = csv.DictReader(file)
    assert (listed["file"], listed["line"], listed["column"]) == (str(tmp_path / "log.csv"), "3", where)
    assert reason in listed["reason"]
    value = row.split(",")[HEADER.split(",").index(where)] if where else row
    assert listed["value"] == value.encode("latin-1").decode("utf-8", "backslashreplace")


def test_all_bad_rows_are_listed_and_the_first_ten_named_when_there_are_too_many(tmp_path):
    rows = [GOOD if k % 3 else f"1,x{k},0,0,0,0,1,0,1,4" for k in range(60)]
    (tmp_path / "log.csv").write_bytes(text(*rows))
    with pytest.raises(UserError) as error:
        ingest([tmp_path / "log.csv"], "qb_video", tmp_path / "t", IngestOptions(max_bad_fraction=0.3), progress=False)
    message = str(error.value)
    assert "holds 20 bad rows of 60, more than max_bad_fraction 0.3 allows; the first 10" in message
    assert message.count("plain integer") == 10
    with (tmp_path / "t" / "quarantine.csv").open(encoding="utf-8") as file:
        assert [int(row["line"]) for row in csv.DictReader(file)] == [2 + 3 * k for k in range(20)]
    with pytest.raises(UserError, match="is not a table"):
        open_table(tmp_path / "t")
    # Corrected, or with more allowed, the same command goes through.
    manifest = ingest(
        [tmp_path / "log.csv"], "qb_video", tmp_path / "t", IngestOptions(max_bad_fraction=0.4), progress=False
    )
    assert manifest.counts["rows"] == 40
    with pytest.raises(UserError, match="left out 20 bad rows, more than max_bad_fraction 0 allows"):
        ingest([tmp_path / "log.csv"], "qb_video", tmp_path / "t", progress=False)


def test_a_log_of_bad_rows_alone_is_no_table(tmp_path):
    with pytest.raises(UserError, match="2 bad rows of 2"):
        taken_in(tmp_path, text("x", "y"), max_bad_fraction=0.9)


def test_a_file_that_may_have_been_cut_short_is_noted(tmp_path, capsys):
    (tmp_path / "log.csv").write_bytes(text(GOOD)[:-1])
    assert main(["ingest", str(tmp_path / "log.csv"), "--kind", "qb_video", "--out", str(tmp_path / "t")]) == 0
    assert "note: log.csv does not end with a line end: it may have been cut short" in capsys.readouterr().out


fields = st.sampled_from(
    ["0", "1", "7", "10", "123456", "01", "+1", " 1", "1 ", "", "0x1F", "0X0", "1e2", "-0", "-3", r"\N", "٣"]
)


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(st.lists(fields, min_size=10, max_size=10), min_size=1, max_size=6))
def test_the_fast_reader_accepts_exactly_what_reading_value_by_value_accepts(rows):
    columns = KINDS["qb_video"].columns
    block = TextBlock("log.csv", 2, "".join(",".join(row) + "\n" for row in rows).encode())
    parsed = parse_block(block, Layout(KINDS["qb_video"].header, columns))

    def allowed(column, value):
        if value in column.nulls:
            return True
        plain = value.isascii() and value.lstrip("-").isdigit() and str(int(value)) == value
        return plain and column.low <= int(value) <= column.high

    good = [row for row in rows if all(allowed(c, value) for c, value in zip(columns, row, strict=True))]
    expected = [
        [None if value in c.nulls else int(value) for c, value in zip(columns, row, strict=True)] for row in good
    ]
    assert [list(row.values()) for row in parsed.rows.to_pylist()] == expected
    assert len(parsed.bad) == len(rows) - len(good)


ARTICLE = {
    "qb_article": "1,7,1.0,1,5,4440447,429537,22761,4179,91.0,\\N,3.0,11206,112,2.0",
    "qk_article": "4153556,7356,1.0,1,5,4440447,429537,22761,4179,91.0,,3.0,11206,112,2.0,True,102.0,False,True,False,False",
    "cold": "4153556,7356,1,1,5,429537,22761,4179,91.0,,3.0,11206,112,2.0,True,102.0,False,True,False,False",
    "task_0": "5,6,0,1,1,0,\\N,3,2,7",
    "task_1": "5,6,0,1,1,True,False,True,False,0",
    "task_2": "5,6,1,0,1,0,0,3,2,7",
    "task_3": "5,6,1,1,1",
    "sbr_1m": "5,6,1,0,1,0,0,3,2,7",
}


@pytest.mark.parametrize("kind", ARTICLE)
def test_every_published_file_is_read_under_its_name(tmp_path, kind):
    header = ",".join(KINDS[kind].header)
    table, manifest = taken_in(tmp_path, text(ARTICLE[kind], header=header), kind)
    values = dict(zip(KINDS[kind].header, ARTICLE[kind].split(","), strict=True))
    flag = {"True": 1, "False": 0, "1.0": 1, "1": 1, "0": 0}
    assert raw_rows(table) == [
        (int(values["user_id"]), int(values["item_id"]), *(flag[values[action]] for action in table.actions))
    ]
    assert table.actions == tuple(a for a in ("click", "like", "share", "follow") if a in values)
    for name, value in values.items():
        if name not in ("user_id", "item_id"):
            stored = column(tmp_path / "log.csv.table", name)[0]
            assert stored == (None if value in ("", "\\N") else flag.get(value) if value in flag else float(value))
    if "category_first" in values:
        assert table.items.category.tolist() == [0, 112 + 1]
    if kind.startswith("task"):
        _, by_header = taken_in(tmp_path, text(ARTICLE[kind], header=header), "task", name="again.csv")
        assert by_header.sha256 == manifest.sha256


def test_a_file_of_clicks_alone_refuses_a_row_without_one(tmp_path):
    with pytest.raises(UserError, match="column click: '0' is not between 1 and 1"):
        taken_in(tmp_path, text(GOOD), "sbr_1m")


CUSTOM = {"user": "uid", "item": "vid", "click": "watched", "like": "liked", "category": "topic", "time": "at"}


def test_a_log_of_ones_own_is_read_by_its_mapping_in_any_order_and_with_text_ids(tmp_path):
    rows = [
        "topic;uid;note;vid;at;liked;watched",
        'news;ann;"a;b ""c""";v-1;2021-09-17 08:30:00;1.0;1',
        ";bob;x;v-2;2021-09-17;0;False",
        "sport;ann;;v-2;2021-09-16T23:59:59Z;False;True",
        "news;ann;;007;1631860000.5;0;0",
    ]
    table, manifest = taken_in(tmp_path, "\n".join(rows).encode() + b"\n", "custom", columns=CUSTOM)
    assert raw_rows(table) == [("ann", "v-2", 1, 0), ("ann", "007", 0, 0), ("ann", "v-1", 1, 1), ("bob", "v-2", 0, 0)]
    assert (table.actions, table.has_exposures, manifest.categories) == (("click", "like"), True, ("news", "sport"))
    assert table.items.category[table.dense_item(["v-1", "v-2", "007", "none"])].tolist() == [1, 2, 1, 0]
    assert [table.dense_user(name) for name in ("ann", "bob", "cy")] == [1, 2, 0]
    with pytest.raises(TypeError):
        table.dense_item([7])


def test_integer_ids_of_ones_own_log_stay_integers_and_a_text_among_them_is_bad(tmp_path):
    rows = ("uid,vid", "7,9", "-3,8")
    table, _ = taken_in(tmp_path, "\n".join(rows).encode(), "custom", columns={"user": "uid", "item": "vid"})
    assert (table.users.raw_id.dtype, raw_rows(table)) == (np.int64, [(7, 9, 1), (-3, 8, 1)])
    assert not table.has_exposures
    with pytest.raises(UserError, match=r"other\.csv:4: column vid: 'x' is not a plain integer"):
        taken_in(
            tmp_path,
            "\n".join([*rows, "4,x"]).encode(),
            "custom",
            name="other.csv",
            columns={"user": "uid", "item": "vid"},
        )


WRONG_COLUMNS = {
    "role": ({"user": "uid", "itm": "vid"}, "Did you mean 'item'"),
    "no item": ({"user": "uid"}, "say which column of the log is the item"),
    "twice": ({"user": "uid", "item": "uid"}, "stands for two things"),
    "like without click": ({"user": "uid", "item": "vid", "like": "b"}, "name the column of clicks too"),
    "absent": ({"user": "uid", "item": "item"}, "there is no column 'item'. The columns are uid, vid, b"),
    "none": ({}, "needs columns, for example"),
    "a name of the table's": (
        {"user": "uid", "item": "vid", "category": "item"},
        "the table has a column 'item' of its own",
    ),
    "the name of the label": (
        {"user": "uid", "item": "vid", "category": "click"},
        "the table has a column 'click' of its own",
    ),
}


@pytest.mark.parametrize("case", WRONG_COLUMNS)
def test_a_mapping_that_does_not_fit_is_refused_by_what_is_wrong(tmp_path, case):
    columns, expected = WRONG_COLUMNS[case]
    with pytest.raises(UserError, match=expected):
        taken_in(tmp_path, b"uid,vid,b\n1,2,0\n", "custom", columns=columns)
    with pytest.raises(UserError, match="columns are for the kind custom alone"):
        taken_in(tmp_path, text(GOOD), columns={"user": "user_id", "item": "item_id"})


@settings(max_examples=500, deadline=None)
@given(
    lines=st.lists(st.text(st.sampled_from('ab",;\r '), max_size=9), min_size=1, max_size=4),
    separator=st.sampled_from(",;"),
)
def test_quoted_lines_are_read_as_pythons_csv_reads_them_or_refused(lines, separator):
    columns = custom_kind({"user": "uid", "item": "vid"}).columns
    block = TextBlock("log.csv", 2, "".join(f"{line}\n" for line in lines).encode())
    parsed = parse_block(block, Layout(("uid", "vid"), columns, separator, quoted=True))
    bad = {row.line - 2 for row in parsed.bad}
    good = [line for place, line in enumerate(lines) if place not in bad]
    read = [next(csv.reader([line.removesuffix("\r")], delimiter=separator)) for line in good]
    assert [list(row.values()) for row in parsed.rows.to_pylist()] == read
    assert parsed.lines == len(lines)
    plain = [place for place, line in enumerate(lines) if '"' not in line and "\r" not in line]
    whole = [place for place in plain if lines[place].count(separator) == 1 and all(lines[place].split(separator))]
    assert not bad & set(whole)


UNFIT_FILES = {
    "lone carriage returns": (
        b"uid,vid\r1,2\r",
        r":1 holds a carriage return inside the line. Lines must end with \\n",
    ),
    "a carriage return in a row": (b"uid,vid\n1,2\n3\r,4\n", ":3: .* holds a carriage return"),
    "blank first line": (b"\nuid,vid\n1,2\n", ":1 is blank. Put the header line first"),
    "header that goes on": (b'uid,vid,"a\nb"\n1,2,3\n', ":1 holds an unbalanced quote"),
    "text behind a closing quote": (b'uid,vid\n"1"0,2\n3,4\n', ":2: .* goes on behind its closing quote"),
    "decimal ids": (b"uid,vid\n1.0,2\n3.0,4\n", ":2: column uid: '1.0' is a decimal number. Write ids as integers"),
    "zip": (b"PK\x03\x04uid,vid\n", " is a zip archive; unpack it"),
    "bzip2": (bz2.compress(b"uid,vid\n1,2\n"), " is bzip2 data; unpack it"),
    "xz": (lzma.compress(b"uid,vid\n1,2\n"), " is xz data; unpack it"),
    "Parquet": (b"PAR1", " is a Parquet file; give it a name that ends in .parquet"),
}


@pytest.mark.parametrize("case", UNFIT_FILES)
def test_a_file_of_ones_own_that_is_not_as_it_should_be_is_refused_by_what_is_wrong(tmp_path, case):
    data, expected = UNFIT_FILES[case]
    with pytest.raises(UserError, match=rf"log\.csv{expected}|log\.csv holds 1 bad row(.|\n)*log\.csv{expected}"):
        taken_in(tmp_path, data, "custom", columns={"user": "uid", "item": "vid"})


def test_a_long_header_and_a_long_quoted_field_are_read(tmp_path):
    unread = ",".join(f"c{k}" for k in range(40_000))
    data = f'uid,vid,{unread}\n"{"a" * 300_000}",b,{unread}\n'.encode()
    table, _ = taken_in(tmp_path, data, "custom", columns={"user": "uid", "item": "vid"})
    assert raw_rows(table) == [("a" * 300_000, "b", 1)]


def test_custom_quotes_that_do_not_close_make_one_bad_row(tmp_path):
    data = b'uid,vid,note\n1,2,"fine, really"\n3,4,"open\n5,6,x\n'
    table, manifest = taken_in(tmp_path, data, "custom", columns={"user": "uid", "item": "vid"}, max_bad_fraction=0.4)
    assert raw_rows(table) == [(1, 2, 1), (5, 6, 1)]
    assert manifest.counts["bad_rows"] == 1


def test_a_folder_of_parquet_shards_gives_the_table_of_the_text(tmp_path):
    rows = scattered(500, 30)
    plain, _ = taken_in(tmp_path, text(*rows))
    values = np.asarray([list(map(int, row.split(","))) for row in rows])
    shard = pa.table({name: values[:, k] for k, name in enumerate(HEADER.split(","))})
    (tmp_path / "spark").mkdir()
    pq.write_table(shard.slice(0, 200), tmp_path / "spark" / "part-0.parquet")
    pq.write_table(shard.slice(200), tmp_path / "spark" / "part-1.parquet", row_group_size=50)
    ingest([tmp_path / "spark"], "qb_video", tmp_path / "t", progress=False)
    assert open_table(tmp_path / "t").sha256 == plain.sha256


def test_parquet_is_checked_like_text(tmp_path):
    columns = {name: pa.array([0, 0, 1, 0], pa.int64()) for name in HEADER.split(",")}
    columns |= {
        "user_id": pa.array([1, 2, -3, 4]),
        "click": pa.array([1.0, 0.5, 1.0, 0.0]),
        "gender": pa.array([0, 1, 2, None], pa.int32()),
        "video_category": pa.array([None, 0, 1, 1], pa.int32()),
    }
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    with pytest.raises(UserError) as error:
        ingest([tmp_path / "log.parquet"], "qb_video", tmp_path / "t", progress=False)
    for expected in (
        "log.parquet:2: column click: '0.5'",
        "log.parquet:3: column user_id: '-3' is not between",
        "log.parquet:4: column gender",
    ):
        assert expected in str(error.value)
    pq.write_table(pa.table(columns).drop_columns("age"), tmp_path / "short.parquet")
    with pytest.raises(UserError, match=r"short\.parquet has no column age"):
        ingest([tmp_path / "short.parquet"], "qb_video", tmp_path / "u", progress=False)


def test_shards_in_folders_below_are_refused_and_not_left_out(tmp_path):
    shard = pa.table({name: pa.array([0, 1], pa.int8()) for name in HEADER.split(",")})
    (tmp_path / "log" / "_temporary" / "0").mkdir(parents=True)
    (tmp_path / "log" / "_SUCCESS").touch()
    pq.write_table(shard, tmp_path / "log" / "part-0.parquet")
    ingest([tmp_path / "log"], "qb_video", tmp_path / "t", progress=False)
    pq.write_table(shard, tmp_path / "log" / "_temporary" / "0" / "part-1.parquet")
    with pytest.raises(UserError, match=r"part-1\.parquet lies in a folder of"):
        ingest([tmp_path / "log"], "qb_video", tmp_path / "u", progress=False)


UNFIT_TYPES = {
    "decimals": ("user_id", pa.array([1, 2, 3], pa.decimal128(18, 0)), "column user_id is of type decimal128.*numbers or text"),
    "timestamps": ("age", pa.array([1, 2, 3], pa.timestamp("us")), "column age is of type timestamp"),
    "lists": ("age", pa.array([[1], [2], [3]]), "column age is of type list"),
    "bytes": ("item_id", pa.array([b"1", b"2", b"3"]), "column item_id is of type binary"),
    "nulls alone": ("click", pa.nulls(3), ":1: column click: 'None' is null"),
    "doubles that round": ("user_id", pa.array([1.0, 2.0**53 - 1, 2.0**53]), ":3: column user_id: .*rounds integers of this size"),
    "floats that round": ("item_id", pa.array([1, 2, 2**24], pa.float32()), ":3: column item_id: .*rounds integers"),
    "too large": ("item_id", pa.array([1, 2, 2**63], pa.uint64()), ":3: column item_id: .*is not between"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT_TYPES)
def test_parquet_whose_type_cannot_hold_a_column_exactly_is_refused_by_what_is_wrong(tmp_path, case):
    name, values, expected = UNFIT_TYPES[case]
    good = {column: pa.array([0, 1, 0], pa.int8()) for column in HEADER.split(",")}
    pq.write_table(pa.table(good | {name: values}), tmp_path / "log.parquet")
    with pytest.raises(UserError, match=expected):
        ingest([tmp_path / "log.parquet"], "qb_video", tmp_path / "t", progress=False)


def test_parquet_without_any_value_in_a_column_that_may_be_missing_is_read(tmp_path):
    good = {column: pa.array([0, 1, 0], pa.int8()) for column in HEADER.split(",")}
    pq.write_table(pa.table(good | {"video_category": pa.nulls(3)}), tmp_path / "log.parquet")
    ingest([tmp_path / "log.parquet"], "qb_video", tmp_path / "t", progress=False)
    assert column(tmp_path / "t", "video_category") == [None] * 3


def test_custom_parquet_takes_timestamps_and_text(tmp_path):
    times = pa.array([3_000_000, 1_000_000, 2_000_000], pa.timestamp("us"))
    rows = pa.table({"who": ["a", "a", "a"], "what": ["x", "y", "z"], "when": times, "did": [True, False, True]})
    pq.write_table(rows, tmp_path / "log.parquet")
    columns = {"user": "who", "item": "what", "click": "did", "time": "when"}
    ingest([tmp_path / "log.parquet"], "custom", tmp_path / "t", IngestOptions(columns), progress=False)
    assert raw_rows(open_table(tmp_path / "t")) == [("a", "y", 0), ("a", "z", 1), ("a", "x", 1)]


def test_sequences_may_have_ids_of_text(tmp_path):
    table, _ = taken_in(tmp_path, b"ann B00 7\nbob B01 B00 B02\n", "sequences", name="log.txt")
    assert raw_rows(table) == [
        ("ann", "B00", 1),
        ("ann", "7", 1),
        ("bob", "B01", 1),
        ("bob", "B00", 1),
        ("bob", "B02", 1),
    ]


# Per form of source: a log whose ids are integers with one text among them, first and later.
MIXED_IDS = {
    "sequences": (b"{0} 5 6\n8 7\n9 {1}\n", None),
    "custom": (b"uid,vid\n{0},5\n8,7\n9,{1}\n", {"user": "uid", "item": "vid"}),
}


@pytest.mark.parametrize("kind", MIXED_IDS)
def test_ids_of_both_types_are_refused_by_line_until_a_person_says_what_they_are(tmp_path, kind):
    pattern, columns = MIXED_IDS[kind]
    later = pattern.replace(b"{0}", b"7").replace(b"{1}", b"B00")
    first = pattern.replace(b"{0}", b"B00").replace(b"{1}", b"7")
    line = 1 if kind == "sequences" else 2
    with pytest.raises(
        UserError, match=rf"later:{line + 2}: column \w+( 1)?: 'B00' is not a plain integer.*--ids text"
    ):
        taken_in(tmp_path, later, kind, name="later", columns=columns)
    with pytest.raises(
        UserError, match=rf"first:{line}: column \w+: 'B00' is text, and the ids after it are integers.*--ids text"
    ):
        taken_in(tmp_path, first, kind, name="first", columns=columns)
    table, _ = taken_in(tmp_path, later, kind, name="text", columns=columns, ids="text")
    assert (table.users.raw_id.tolist()[1:], "B00" in table.items.raw_id) == (["7", "8", "9"], True)
    table, manifest = taken_in(tmp_path, first, kind, name="some", columns=columns, ids="integer", max_bad_fraction=0.5)
    assert (table.users.raw_id.tolist()[1:], manifest.counts["bad_rows"]) == ([8, 9], 1)
    with pytest.raises(UserError, match="made with ids integer, not auto"):
        ingest([tmp_path / "some"], kind, tmp_path / "some.table", IngestOptions(columns, max_bad_fraction=0.5))


def test_what_ids_are_is_not_asked_where_the_kind_says_it(tmp_path):
    with pytest.raises(
        UserError, match="ids is for the kinds custom and sequences alone; those of qb_video are integers"
    ):
        taken_in(tmp_path, text(GOOD), ids="text")


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), *[st.integers(0, 1)] * 2), min_size=1, max_size=25)
)
def test_dropping_duplicates_keeps_the_first_of_equal_rows(rows):
    data = text(*(f"{user},{item},{click},0,{like},0,1,0,1,4" for user, item, click, like in rows))
    with tempfile.TemporaryDirectory() as name:
        kept, manifest = taken_in(Path(name), data, duplicates="drop_exact")
    users = list(dict.fromkeys(row[0] for row in rows))
    distinct = [row for user in users for row in dict.fromkeys(rows) if row[0] == user]
    assert [(user, item, click, like) for user, item, click, like, *_ in raw_rows(kept)] == distinct
    assert (manifest.counts["rows"], manifest.counts["duplicate_rows"]) == (len(distinct), len(rows) - len(distinct))


def running_ingest(source, out, largest_file=-1):
    """An ingest in a process of its own, which may write files of at most so many bytes."""
    code = (
        "import resource, sys; from tenrec_jax.data import sources; sources.BLOCK_BYTES = 4096\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest_file}, {largest_file}))\n"
        "from tenrec_jax.__main__ import main\n"
        f"sys.exit(main(['ingest', {str(source)!r}, '--kind', 'qb_video', '--out', {str(out)!r}]))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_ingest_leaves_no_table_and_the_next_one_starts_afresh(tmp_path):
    source, out = tmp_path / "log.csv", tmp_path / "t"
    source.write_bytes(text(*scattered(200_000, 500)))
    process = running_ingest(source, out)
    partial = tmp_path / ".t.partial"
    while process.poll() is None and not partial.exists():
        time.sleep(0.01)
    assert process.poll() is None, "it finished before it could be killed"
    with pytest.raises(UserError, match="Another process is writing"):
        ingest([source], "qb_video", out, progress=False)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    assert partial.exists()
    ingest([source], "qb_video", out, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "t"]
    assert open_table(out).num_rows == 200_000


def test_a_full_disk_is_one_clear_message_and_nothing_is_left(tmp_path):
    source, out = tmp_path / "log.csv", tmp_path / "t"
    source.write_bytes(text(*scattered(100_000, 500)))
    process = running_ingest(source, out, largest_file=200_000)
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert "cannot be written" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_a_table_is_hashed_again_when_a_file_has_changed_and_not_otherwise(tmp_path):
    table, _ = taken_in(tmp_path, text(*scattered(100, 5)))
    path = tmp_path / "log.csv.table" / "columns" / "item.npy"
    stamp = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"item\.npy is damaged"):
        open_table(path.parents[1])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(UserError, match=r"item\.npy is damaged"):
        open_table(path.parents[1])
    note_verified(path.parents[1], read_manifest(path.parents[1]))
    assert open_table(path.parents[1]).num_rows == table.num_rows  # same size and times: trusted


def test_the_command_line_takes_the_mapping_from_a_file(tmp_path, capsys):
    (tmp_path / "log.csv").write_bytes(b"uid,vid\na,b\n")
    (tmp_path / "map.json").write_text(json.dumps({"user": "uid", "item": "vid"}))
    arguments = ["ingest", str(tmp_path / "log.csv"), "--kind", "custom", "--out", str(tmp_path / "t")]
    assert main([*arguments, "--columns", str(tmp_path / "map.json")]) == 0
    assert main([*arguments, "--columns", '{"user": "uid", "item": "vid"}']) == 0
    assert "nothing to do" in capsys.readouterr().out
    for wrong, expected in (
        ("{", "no readable JSON"),
        (str(tmp_path / "none.json"), "cannot be read"),
        ("[]", "cannot be read"),
    ):
        assert main([*arguments[:-1], str(tmp_path / "u"), "--columns", wrong]) == 2
        assert expected in capsys.readouterr().err


def test_custom_kinds_have_no_columns_beyond_the_mapping():
    kind = custom_kind(CUSTOM)
    assert kind.header == tuple(CUSTOM.values())
    assert kind.actions == ("click", "like")


@pytest.mark.parametrize("role", ["category", "gender", "age"])
def test_what_is_known_only_after_the_exposure_is_no_feature_unless_allowed(role: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("uid,vid,click,watching_times\n1,5,1,2\n1,6,0,1\n")
    columns = {"user": "uid", "item": "vid", "click": "click", role: "watching_times"}
    with pytest.raises(UserError, match=rf"'watching_times' is known only after .* \({role}\).*allow_post_event"):
        IngestOptions(columns)
    allowed = IngestOptions(columns, allow_post_event_features=True)
    assert ingest([tmp_path / "log.csv"], "custom", tmp_path / "table", allowed, progress=False).counts["rows"] == 2
    # As a label or left out it is no feature.
    IngestOptions({"user": "uid", "item": "vid", "click": "watching_times"})
