"""Extra columns: what goes in comes out, through commits, merges and renames, and mixed kinds become one."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from indexes.columns import unified
from indexes.errors import ColumnError, StoreCorrupt
from indexes.segments import ROW_SCHEMA
from indexes.store import Store
from tests.indexes.test_store import DIM, MODEL, row, unit

FULL = {
    "sharp": True,
    "likes": -(2**63),
    "ratio": 0.1,
    "seen": datetime(2024, 2, 29, 1, 2, 3, 4),
    "tags": ["a dog 🐕", ""],
    "licence": "CC BY 4.0",
    "a.b c/日本": "odd name",
}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.create(tmp_path / ".diptych", None, MODEL)


def put(store: Store, *columns: dict) -> list[int]:
    """One row for each mapping, all in one segment."""
    with store.write() as writer:
        return [writer.add(row("x", columns=one), unit(1)[0]) for one in columns]


def extra(store: Store) -> list[dict]:
    return store.rows().drop_columns(ROW_SCHEMA.names).to_pylist()


def kinds(store: Store) -> dict[str, str]:
    return {field.name: str(field.type) for field in list(store.rows().schema)[len(ROW_SCHEMA) :]}


def test_every_kind_comes_back_and_rows_without_them_stay_bare(store):
    with_all, bare = row("a", columns=FULL), row("b", caption="no columns")
    with store.write() as writer:
        ids = [writer.add(one, unit(1)[0]) for one in (with_all, bare)]
    for one in (store, Store.open(store.path)):
        assert [one.row(i) for i in ids] == [with_all, bare]
        assert kinds(one) == {
            "sharp": "bool", "likes": "int64", "ratio": "double", "seen": "timestamp[us]",
            "tags": "list<element: string>", "licence": "string", "a.b c/日本": "string",
        }  # fmt: skip
        assert extra(one) == [FULL, dict.fromkeys(FULL)]
        assert one.check() == []


def test_a_segment_without_extra_columns_is_as_it_always_was(store):
    put(store, {}, {"nothing": None})
    (file,) = (store.path / "segments").iterdir()
    assert pq.read_schema(file).names == [*ROW_SCHEMA.names, "embedding"]
    assert store.rows().column_names == ROW_SCHEMA.names


def test_columns_stand_between_caption_and_embedding(store):
    put(store, {"b": 1, "a": "x"})
    (file,) = (store.path / "segments").iterdir()
    assert pq.read_schema(file).names == [*ROW_SCHEMA.names, "b", "a", "embedding"]
    codecs = {c["path_in_schema"]: c["compression"] for c in pq.read_metadata(file).row_group(0).to_dict()["columns"]}
    assert (codecs["a"], codecs["b"], codecs["embedding.list.element"]) == ("ZSTD", "ZSTD", "UNCOMPRESSED")


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("values", "kind", "read"),
    [
        ([1, 2.5], "double", [1.0, 2.5]),
        ([2**60 + 1, 0.5], "double", [float(2**60), 0.5]),
        ([1, "one"], "string", ["1", "one"]),
        ([True, 2], "string", ["true", "2"]),
        ([True, 0.5], "string", ["true", "0.5"]),
        ([datetime(2024, 1, 2), "x"], "string", ["2024-01-02 00:00:00.000000", "x"]),
        (["a", ["b", "c"]], "list<element: string>", [["a"], ["b", "c"]]),
        ([["b"], 7], "list<element: string>", [["b"], ["7"]]),
        ([1, 2.5, "x"], "string", None),
        ([None, 1, None], "int64", [None, 1, None]),
        ([None, ["a"], None, "b"], "list<element: string>", [None, ["a"], None, ["b"]]),
    ],
)
def test_kinds_that_differ_become_one(store, values, kind, read, together):
    """In one segment, in several, and after they are merged."""
    rows = [{"v": value} for value in values]
    if together:
        put(store, *rows)
    else:
        for one in rows:
            put(store, one)
    for _ in range(2):
        assert kinds(store) == {"v": kind}
        if read:
            assert [one["v"] for one in extra(store)] == read
        store.rebuild_index("Flat")  # merges all segments


def test_random_histories_equal_a_dictionary(tmp_path):
    """Commits of any size, renames, changed columns, deletions and merges, against a dict."""
    chance = random.Random(5)
    make = {
        "n": lambda: chance.choice([None, 3, -1]),
        "x": lambda: chance.choice([None, 0.5, 2.0]),
        "t": lambda: chance.choice([None, "a", "ü"]),
        "l": lambda: chance.choice([None, [], ["p", "q"]]),
        "b": lambda: chance.choice([None, True, False]),
    }
    store = Store.create(tmp_path / "s", tmp_path, MODEL)
    model: dict[int, dict] = {}

    def some() -> dict:
        return {name: make[name]() for name in chance.sample(list(make), chance.randrange(4))}

    for _ in range(40):
        with store.write() as writer:
            for _ in range(chance.choice([1, 2, 30])):
                action, known = chance.random(), chance.choice(list(model)) if model else None
                columns = some()
                if known is None or action < 0.6:
                    model[writer.add(row("a", columns=columns), unit(1)[0])] = columns
                elif action < 0.7:
                    writer.remove(known)
                    del model[known]
                else:
                    model[writer.replace(known, row("b", columns=columns))] = columns
                    del model[known]
        expected = {i: {k: v for k, v in one.items() if v is not None} for i, one in sorted(model.items())}
        for one in (store, Store.open(store.path)):
            assert {i: one.row(i).columns for i in model} == expected
            assert one.check() == []
    assert len(store.snapshot.segments) <= 17
    store.rebuild_index("Flat")
    assert {i: store.row(i).columns for i in sorted(model)} == expected


def test_zones_dates_and_numpy_values(store):
    noon = datetime(2024, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    (i,) = put(store, {"t": noon, "d": date(2024, 1, 1), "n": np.int32(7), "f": np.float32(0.5), "b": np.bool_(True)})
    assert store.row(i).columns == {
        "t": datetime(2024, 1, 1, 10), "d": datetime(2024, 1, 1), "n": 7, "f": 0.5, "b": True,
    }  # fmt: skip


def test_text_that_is_no_text_is_kept_readable(store):
    (i,) = put(store, {"t": "half \ud83d", "l": ["\udcff"]})
    assert store.row(i).columns == {"t": "half ?", "l": ["?"]}


@pytest.mark.parametrize("name", [*ROW_SCHEMA.names, "embedding", "", 7, "half \ud83d"])
def test_names_that_are_taken_or_no_names(store, name):
    with pytest.raises(ColumnError, match="cannot be called"):
        put(store, {name: 1})
    assert len(store) == 0


@pytest.mark.parametrize("value", [{"a": 1}, b"x", [1], ["a", None], 2**63, object(), 1j])
def test_values_that_no_column_holds(store, value):
    with store.write() as writer:
        i = writer.add(row("a", columns={"v": 1}), unit(1)[0])
        with pytest.raises(ColumnError, match=r"column 'v'.*it takes"):
            writer.add(row("b", columns={"v": value}), unit(1)[0])
        with pytest.raises(ColumnError, match="column 'v'"):
            writer.replace(i, row("b", columns={"v": value}))
    assert [store.row(i).columns] == [{"v": 1}]


def test_a_file_with_columns_that_nobody_wrote_is_damaged(store):
    put(store, {"a": 1})
    (file,) = (store.path / "segments").iterdir()
    manifest = store.snapshot.manifest  # of a release that noted no checksum of the footer
    replace(manifest, segments=(replace(manifest.segments[0], footer=""),)).write(store.path)
    table = pq.read_table(file)
    for field, values in (
        (pa.field("size", pa.int64()), [1]),
        (pa.field("b", pa.int64(), nullable=False), [1]),
        (pa.field("b", pa.binary()), [b"x"]),
    ):
        pq.write_table(table.add_column(len(ROW_SCHEMA), field, [values]), file)
        with pytest.raises(StoreCorrupt, match="other columns than expected"):
            Store.open(store.path).rows()


def test_the_order_of_names_is_that_of_their_first_rows():
    one, other = pa.schema([("a", pa.int64()), ("b", pa.string())]), pa.schema([("c", pa.bool_()), ("a", pa.float64())])
    assert unified([one, other]) == pa.schema([("a", pa.float64()), ("b", pa.string()), ("c", pa.bool_())])
    assert unified([]) == pa.schema([])


def test_vectors_and_search_do_not_mind(store):
    put(store, {"a": 1}, {})
    put(store, {"b": ["x"]})
    assert store.search(unit(1), 5).rows.shape == (1, 3)
    assert store.vectors().shape == (3, DIM)
