"""Tables as people and their tools write them."""

from __future__ import annotations

import decimal
from datetime import date, datetime, timezone

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from indexes.errors import ExchangeError
from indexes.segments import ROW_SCHEMA, Row, encode_rows, extra_columns, with_columns, with_embeddings, write_segment
from indexes.tables import extras, read_table, texts


def write(file, text: str | bytes):
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def test_csv_is_read_as_evaluate_reads_it(tmp_path):
    file = write(
        tmp_path / "rows.CSV",
        ',image, caption,code,score,n,empty\r\n0,a.jpg,"two\nlines, ""quoted""",007,1.5,1,\r\n1,b.jpg,,12,2,,\r\n',
    )
    table = read_table(file)
    assert table.to_pydict() == {
        "image": ["a.jpg", "b.jpg"],
        "caption": ['two\nlines, "quoted"', None],
        "code": ["007", "12"],  # a code is no number
        "score": [1.5, 2.0],
        "n": [1, None],
        "empty": [None, None],
    }


@pytest.mark.parametrize(("name", "mark"), [("t.tsv", "\t"), ("t.csv", ";"), ("t.csv", "|"), ("t.csv", "\t")])
def test_separators_are_found(tmp_path, name, mark):
    file = write(tmp_path / name, f"\ufeffpath{mark}label\na,b.jpg{mark}cat\n")
    assert read_table(file).to_pydict() == {"path": ["a,b.jpg"], "label": ["cat"]}


def test_jsonl_is_read(tmp_path):
    file = write(
        tmp_path / "rows.jsonl", '{"path": "a.jpg", "labels": ["x", "y"]}\n{"path": "b.jpg", "more": {"n": 1}}\n'
    )
    table = read_table(file)
    assert table["path"].to_pylist() == ["a.jpg", "b.jpg"]
    assert extras(table.drop_columns("path"), ()).to_pydict() == {
        "labels": [["x", "y"], None],
        "more": [None, '{"n": 1}'],
    }


def test_pandas_row_numbers_are_left_out(tmp_path):
    pq.write_table(pa.table({"path": ["a"], "__index_level_0__": [7]}), tmp_path / "rows.parquet")
    assert read_table(tmp_path / "rows.parquet").column_names == ["path"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.parquet", b"PAR1 and no more", "cannot be read"),
        ("rows.parquet", b"", "cannot be read"),
        ("rows.csv", b"", "it is empty"),
        ("rows.csv", b"a,b\n1,2,3\n", "cannot be read"),
        ("rows.csv", b"a,a\n1,2\n", "two columns of one name: a"),
        ("rows.csv", b"path\ncaf\xe9.jpg\n", "cannot be read"),
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', "cannot be read"),
        ("rows.jsonl", b'{"a": 1}\n{"a": "x"}\n', "cannot be read"),
        ("rows.xlsx", b"PK", "give .parquet, .csv"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, name, content, told):
    file = write(tmp_path / name, content)
    with pytest.raises(ExchangeError) as caught:
        read_table(file)
    assert str(file) in str(caught.value)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ExchangeError, match=r"gone\.parquet is missing"):
        read_table(tmp_path / "gone.parquet")


def every_kind() -> pa.Table:
    moment = datetime(2024, 5, 1, 12, tzinfo=timezone.utc)
    return pa.table(
        {
            "yes": pa.array([True, None]),
            "small": pa.array([1, 2], pa.int8()),
            "unsigned": pa.array([1, 2], pa.uint64()),
            "huge": pa.array([2**64 - 1, 2], pa.uint64()),
            "half": pa.array(np.array([0.5, 0.25], np.float16)),
            "money": pa.array([decimal.Decimal("1.50"), None]),
            "word": pa.array(["a", None], pa.large_string()),
            "category": pa.array(["x", "y"]).dictionary_encode(),
            "when": pa.array([moment, None], pa.timestamp("ns", tz="Europe/Berlin")),
            "day": pa.array([date(2024, 5, 1), None]),
            "tags": pa.array([["a", "b"], []], pa.large_list(pa.string())),
            "box": pa.array([[1, 2], None]),
            "nested": pa.array([{"a": 1}, None]),
            "bytes": pa.array([b"ok", b"\xff"]),
            "nothing": pa.nulls(2),
        }
    )


def test_every_kind_of_column_is_brought_to_one_that_an_index_holds(tmp_path):
    found = extras(every_kind(), ())
    assert found.to_pydict() == {
        "yes": [True, None],
        "small": [1, 2],
        "unsigned": [1, 2],
        "huge": ["18446744073709551615", "2"],
        "half": [0.5, 0.25],
        "money": [1.5, None],
        "word": ["a", None],
        "category": ["x", "y"],
        "when": [datetime(2024, 5, 1, 12), None],
        "day": [datetime(2024, 5, 1), None],
        "tags": [["a", "b"], []],
        "box": ["[1, 2]", None],
        "nested": ['{"a": 1}', None],
        "bytes": ["ok", "\\xff"],
    }
    # And an index does hold them: a segment refuses columns of other kinds when it is opened.
    rows = encode_rows({0: Row(path="a", size=0, mtime_ns=0, hash=""), 1: Row(path="b", size=0, mtime_ns=0, hash="")})
    for name in found.column_names:
        rows = rows.append_column(name, found[name])
    extra = extra_columns(rows.schema)
    table = with_embeddings(with_columns(rows, extra), np.ones((2, 1), np.float16))
    ref = write_segment(tmp_path / "00000001.parquet", [table], 1, extra)
    from indexes.segments import Segment

    assert (
        Segment(tmp_path / "00000001.parquet", ref, 1).group(0).select(found.column_names).to_pydict()
        == found.to_pydict()
    )


def test_names_that_are_taken_get_others():
    table = pa.table({"hash": [1], "source_hash": [2], "id": [3], "label": ["x"]})
    found = extras(table, ROW_SCHEMA.names).to_pydict()
    assert found == {"source_source_hash": [1], "source_hash": [2], "source_id": [3], "label": ["x"]}


def test_a_text_of_each_row():
    assert texts(pa.chunked_array([[["a", "b"], [], None]])).to_pylist() == ["a", None, None]
    assert texts(pa.chunked_array([[1, None]])).to_pylist() == ["1", None]
    assert texts(pa.chunked_array([pa.array(["x"]).dictionary_encode()])).to_pylist() == ["x"]
