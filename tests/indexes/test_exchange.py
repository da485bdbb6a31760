"""Vectors in from other tools and out to them, compared by value with what lies in the files."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from datetime import datetime
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from indexes.errors import ExchangeError, StoreError, VectorError
from indexes.exchange import Imported, Part, Roles, find_parts, import_parts, mark_of, to_halves
from indexes.export import export_clip_retrieval, export_npy
from indexes.segments import Row
from indexes.store import UNVERIFIED, ModelRef, Store
from indexes.vectors import as_vectors
from tests.indexes.test_store import ODD_NAMES

DIM = 6
MODEL = ModelRef("tiny", "ab" * 32, DIM)


def numbers(n: int, seed: int = 0):
    """Vectors of any length."""
    return np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)


def row(path: str, **fields) -> Row:
    return Row(**{"path": path, "size": 1, "mtime_ns": 2, "hash": "00ff", **fields})


def text(path: str, caption: str) -> Row:
    data = caption.encode()
    return Row(
        path=path, kind="text", caption=caption, size=len(data), mtime_ns=0, hash=hashlib.sha256(data).hexdigest()
    )


def make(path: Path, rows, vectors=None) -> Store:
    store = Store.create(path, path.parent, MODEL)
    with store.write() as writer:
        for one, vector in zip(rows, numbers(len(rows)) if vectors is None else vectors, strict=True):
            writer.add(one, vector)
    return store


def content(store: Store):
    """Every row with the bits of its vector, in order."""
    return [(store.row(int(row_id)), store.snapshot.halves(i).tobytes()) for i, row_id in enumerate(store.snapshot.ids)]


def bring(source: Path, path: Path, root: Path | None = None, metadata=None, kind=None, **options) -> Store:
    import_parts(find_parts(source, metadata, kind), path, root or path.parent, MODEL, **options)
    return Store.open(path)


def table(folder: Path, vectors, name="rows.parquet", **columns) -> tuple[Path, Path]:
    """A .npy with its table, as another tool writes them."""
    np.save(folder / "v.npy", vectors)
    pq.write_table(pa.table(columns), folder / name)
    return folder / "v.npy", folder / name


def clip_retrieval(folder: Path, parts: dict[str, dict], width: int = 1) -> Path:
    """A folder as clip-retrieval writes it: number -> {img, text, columns}."""
    for number, part in parts.items():
        for kind in ("img", "text"):
            if kind in part:
                (folder / f"{kind}_emb").mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{kind}_emb" / f"{kind}_emb_{number}.npy", part[kind])
        (folder / "metadata").mkdir(parents=True, exist_ok=True)
        if "columns" in part:
            pq.write_table(pa.table(part["columns"]), folder / "metadata" / f"metadata_{number}.parquet")
    return folder


# ---- round trips -----------------------------------------------------------------------------------------------------

NAMES = st.one_of(st.sampled_from(ODD_NAMES), st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
COLUMNS = st.dictionaries(
    st.sampled_from(["label", "score", "image_path", "tags", "when"]),
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        st.lists(st.sampled_from(["x", "y"]), max_size=2),
    ),
    max_size=3,
)  # fmt: skip
ROWS = st.lists(
    st.builds(
        Row,
        path=NAMES,
        kind=st.sampled_from(["image", "image", "text"]),
        size=st.integers(0, 2**40),
        mtime_ns=st.integers(0, 2**62),
        hash=st.sampled_from(["", "ab" * 32]),
        width=st.none() | st.integers(1, 9999),
        taken_at=st.none() | st.datetimes(datetime(1990, 1, 1), datetime(2030, 1, 1)),
        latitude=st.none() | st.floats(-90, 90),
        caption=st.none() | st.sampled_from(["", "a dog", "ein Füßchen 🐈", "two\nlines"]),
        columns=COLUMNS,
    ),
    max_size=8,
    unique_by=lambda one: (one.path, one.kind) if one.kind == "image" else id(one),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, seed=st.integers(0, 99))
def test_a_store_comes_back_bit_for_bit_from_npy(tmp_path_factory, rows, seed):
    folder = tmp_path_factory.mktemp("npy")
    store = make(folder / "a", rows, numbers(len(rows), seed))
    if len(rows) > 2:
        with store.write() as writer:
            writer.remove(1)
    export_npy(store, folder / "out")
    back = bring(folder / "out", folder / "b", root=folder / "nowhere")
    assert content(back) == content(store)
    assert mark_of(find_parts(folder / "out")).model == MODEL
    assert back.check() == []


def test_float32_out_and_in_again_is_off_by_the_last_bit_of_float16_at_most(tmp_path):
    store = make(tmp_path / "a", [row(f"{i}.jpg") for i in range(50)])
    export_npy(store, tmp_path / "out", np.float32)
    written = np.load(tmp_path / "out" / "vectors.npy")
    assert written.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(written, axis=1), 1, atol=2e-7)
    assert np.array_equal(written, store.vectors())
    back = bring(tmp_path / "out", tmp_path / "b")
    before, after = (np.stack([s.snapshot.halves(i) for i in range(50)]).view(np.int16) for s in (store, back))
    assert np.abs(before.astype(int) - after).max() <= 1


def paired_store(path: Path) -> Store:
    """Pictures with texts beside them, and what sets them apart: suffixes, folders, several texts, none."""
    rows = [
        row("a.jpg", width=7, columns={"label": "x"}),
        text("b.jpg", "b, first"),
        row("b.jpg", taken_at=datetime(2020, 2, 2)),
        text("a.jpg", "a as jpg"),
        row("a.png"),
        row("sub/a.jpg"),
        text("b.jpg", "b, second"),
        text("a.png", "a as png"),
        row("alone.jpg"),
        text("sub/a.jpg", "a in sub"),
    ]
    return make(path, rows)


def slow_pairs(store: Store) -> list[tuple]:
    """(path, caption, picture's bits, text's bits), by looking at every pair of rows."""
    rows = content(store)
    pictures = [(one, bits) for one, bits in rows if one.kind == "image"]
    texts = [(one, bits) for one, bits in rows if one.kind == "text"]
    out = [(p.path, t.caption, bits, words) for p, bits in pictures for t, words in texts if t.path == p.path]
    named = {t.path for t, _ in texts}
    return out + [(p.path, p.caption, bits, None) for p, bits in pictures if p.path not in named]


def read_folder(folder: Path) -> list[tuple]:
    """What clip-retrieval's own readers see: files in the order of their names, row i of all of them together."""
    out = []
    for file in sorted((folder / "metadata").glob("*.parquet")):
        number = file.stem.removeprefix("metadata_")
        rows = pq.read_table(file).to_pylist()
        found = {}
        for kind in ("img", "text"):
            npy = folder / f"{kind}_emb" / f"{kind}_emb_{number}.npy"
            found[kind] = [v.tobytes() for v in np.load(npy)] if npy.exists() else [None] * len(rows)
        out += [(r["image_path"], r["caption"], *v) for r, *v in zip(rows, found["img"], found["text"], strict=True)]
    return out


@pytest.mark.parametrize("rows_per_part", [1, 2, 3, 100])
def test_pictures_and_the_texts_beside_them_stay_together(tmp_path, rows_per_part):
    """clip-retrieval joins a.jpg and a.txt by names that keep their suffixes, and finds no pair (#345, #352, #385)."""
    store = paired_store(tmp_path / "a")
    export_clip_retrieval(store, tmp_path / "out", rows_per_part=rows_per_part)
    expected = [(str(tmp_path / path), *rest) for path, *rest in slow_pairs(store)]
    assert len(expected) == 6
    assert read_folder(tmp_path / "out") == expected
    back = bring(tmp_path / "out", tmp_path / "b")
    order = lambda found: sorted(found, key=lambda one: (one[0].path, one[0].kind, one[1]))  # noqa: E731
    assert order(content(back)) == order(content(store))


def test_more_than_ten_parts_are_in_order_by_name_and_by_number(tmp_path):
    store = make(tmp_path / "a", [row(f"{i}.jpg") for i in range(23)])
    export_clip_retrieval(store, tmp_path / "out", rows_per_part=2)
    assert sorted(f.name for f in (tmp_path / "out" / "img_emb").iterdir())[9:11] == [
        "img_emb_09.npy",
        "img_emb_10.npy",
    ]
    assert [Path(path).name for path, *_ in read_folder(tmp_path / "out")] == [f"{i}.jpg" for i in range(23)]
    for file in (tmp_path / "out").rglob("*_0*"):  # as a tool that does not pad them
        file.rename(file.with_name(file.name.replace("_0", "_")))
    assert content(bring(tmp_path / "out", tmp_path / "b")) == content(store)


@pytest.mark.parametrize("kind", ["SQfp16", "Flat", "HNSW32"])
def test_faiss_files_rank_by_cosine_in_the_order_of_the_metadata(tmp_path, kind):
    store = paired_store(tmp_path / "a")
    export_clip_retrieval(store, tmp_path / "out", rows_per_part=2, faiss_kind=kind)
    rows = read_folder(tmp_path / "out")
    queries = as_vectors(numbers(5, seed=3))
    for name, column in (("image.index", 2), ("text.index", 3)):
        index = faiss.read_index(str(tmp_path / "out" / name))
        bits = [one[column] for one in rows if one[column] is not None]
        vectors = as_vectors(np.array([np.frombuffer(b, np.float16) for b in bits]))
        assert index.ntotal == len(bits)
        assert index.metric_type == faiss.METRIC_INNER_PRODUCT
        scores, found = index.search(queries, len(bits))
        exact = queries @ vectors.T
        np.testing.assert_allclose(scores, -np.sort(-exact, axis=1), atol=2e-3)
        np.testing.assert_allclose(np.take_along_axis(exact, found, axis=1), scores, atol=2e-3)
        _, _, again = index.search_and_reconstruct(queries[:1], 3)  # as its server does
        np.testing.assert_allclose(again[0], vectors[found[0, :3]], atol=1e-3)


def test_no_faiss_files_where_none_are_wanted(tmp_path):
    export_clip_retrieval(paired_store(tmp_path / "a"), tmp_path / "out", faiss_kind=None)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["img_emb", "metadata", "text_emb"]
    with pytest.raises(ExchangeError, match="'IVF4,Flat': it needs training"):
        export_clip_retrieval(Store.open(tmp_path / "a"), tmp_path / "out2", faiss_kind="IVF4,Flat")
    with pytest.raises(ExchangeError, match="'Nonsense'"):
        export_clip_retrieval(Store.open(tmp_path / "a"), tmp_path / "out2", faiss_kind="Nonsense")
    assert not (tmp_path / "out2").exists()


def test_texts_of_no_picture_are_exported_apart(tmp_path):
    store = make(tmp_path / "a", [row("a.jpg"), text("", "a sentence"), text("gone.jpg", "another")])
    with pytest.raises(ExchangeError, match="2 of 2 texts belong to no picture"):
        export_clip_retrieval(store, tmp_path / "out")
    export_clip_retrieval(store, tmp_path / "texts", kind="text")
    export_clip_retrieval(store, tmp_path / "pictures", kind="image")
    assert content(bring(tmp_path / "texts", tmp_path / "b")) == content(store)[1:]
    assert content(bring(tmp_path / "pictures", tmp_path / "c")) == content(store)[:1]
    assert pq.read_table(tmp_path / "texts" / "metadata")["image_path"].to_pylist() == [
        None,
        str(tmp_path / "gone.jpg"),
    ]


@pytest.mark.parametrize("export", [export_npy, export_clip_retrieval])
def test_an_empty_store_makes_the_journey_too(tmp_path, export):
    store = Store.create(tmp_path / "a", tmp_path, MODEL)
    export(store, tmp_path / "out")
    back = bring(tmp_path / "out", tmp_path / "b")
    assert (len(back), back.check()) == (0, [])


def test_a_column_called_image_path_gives_way(tmp_path):
    store = make(tmp_path / "a", [row("a.jpg", columns={"image_path": "theirs"})])
    export_clip_retrieval(store, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "metadata").to_pylist()
    assert (rows[0]["image_path"], rows[0]["source_image_path"]) == (str(tmp_path / "a.jpg"), "theirs")


def test_an_export_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    store = paired_store(tmp_path / "a")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    with pytest.raises(ExchangeError, match="taken exists and is not empty"):
        export_npy(store, tmp_path / "taken")
    (tmp_path / "empty").mkdir()
    export_npy(store, tmp_path / "empty")
    monkeypatch.setattr("indexes.export._write_table", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(StoreError, match="No space left"):
        export_npy(store, tmp_path / "full")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "empty", "taken"]


# ---- other people's files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v,
        lambda v: v.astype(np.float64) * 1e30,
        lambda v: v.astype(">f4"),
        lambda v: v.astype(">f2"),
        lambda v: np.asfortranarray(v),
        lambda v: np.asfortranarray(v.astype(np.float16)),
        lambda v: (v * 1000).astype(np.int16),
        lambda v: (v * 1000).astype(np.int8),
        lambda v: v.astype(np.longdouble),
    ],
    ids=["f4", "f8", ">f4", ">f2", "fortran", "fortran f2", "i2", "i1", "longdouble"],
)
def test_vectors_of_any_kind_of_number_become_unit_rows(tmp_path, change):
    given = change(numbers(9))
    npy, rows = table(tmp_path, given, path=[f"{i}.jpg" for i in range(9)])
    back = bring(npy, tmp_path / "b", metadata=rows)
    expected = as_vectors(given.astype(np.float64)).astype(np.float16)
    assert np.array_equal([back.snapshot.halves(i) for i in range(9)], expected)


@pytest.mark.parametrize("dim", [1, 2, 6, 512, 4096])
def test_rounded_unit_rows_stay_as_they_are_bit_for_bit(dim):
    unit = as_vectors(np.random.default_rng(1).standard_normal((400, dim)) * np.geomspace(1e-6, 1, dim))
    halves = unit.astype(np.float16)
    halves[0, 0] = np.float16(-0.0)
    halves[0] = as_vectors(halves[:1].astype(np.float32))[0].astype(np.float16) if dim > 1 else 1
    for same in (halves, halves.astype(np.float32), halves.astype(">f2"), np.asfortranarray(halves)):
        assert to_halves(same).tobytes() == halves.tobytes()


def test_float16_rows_of_another_length_are_brought_to_length_1():
    halves = np.array([[3, 4], [0.5, 0.5], [60000, 60000], [6e-8, 0]], np.float16)
    assert np.array_equal(to_halves(halves), as_vectors(halves).astype(np.float16))
    assert np.array_equal(to_halves(halves)[0], np.array([0.6, 0.8], np.float16))


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
def test_rows_without_a_direction_are_named(tmp_path, bad):
    given = numbers(5000)
    given[[17, 4999]] = 0
    given[17, 2] = given[4999, 0] = bad
    npy, rows = table(tmp_path, given, path=[f"{i}.jpg" for i in range(5000)])
    with pytest.raises(VectorError, match=r"v\.npy: 2 of 5000 vectors .* rows 17, 4999 \(counted from 0\)"):
        bring(npy, tmp_path / "b", metadata=rows)
    assert not (tmp_path / "b").exists()


def refused(tmp_path, told: str, *arguments, **options):
    with pytest.raises(ExchangeError) as caught:
        bring(*arguments, tmp_path / "b", **options)
    assert told in str(caught.value), caught.value
    assert "\n" not in str(caught.value)
    assert sorted(f.name for f in tmp_path.iterdir() if f.name.startswith("b")) == []


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.array([["a", None]] * 2, object), "v.npy is no array of vectors"),
        (np.array([["a", "b"]] * 2), "v.npy holds <U1 of shape (2, 2)"),
        (np.ones(2, np.float32), "v.npy holds float32 of shape (2,)"),
        (np.ones((2, 1, 3)), "v.npy holds float64 of shape (2, 1, 3)"),
        (np.ones((2, 0)), "v.npy holds float64 of shape (2, 0)"),
        (np.ones((2, 6), complex), "v.npy holds complex128"),
        (np.ones((2, 6), bool), "v.npy holds bool"),
        (np.ones((2, 5)), "vectors of width 5, and those of tiny have 6"),
        (np.ones((3, 6)), "rows.parquet has 2 rows, and"),
    ],
)
def test_arrays_that_are_no_vectors_are_refused(tmp_path, array, told):
    npy, rows = table(tmp_path, array, path=["1.jpg", "2.jpg"])
    refused(tmp_path, told, npy, metadata=rows)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"", b"\x93NUMPY", b"PK\x03\x04 archive", b"text"])
def test_files_that_are_no_arrays_are_refused_and_never_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    npy, rows = table(tmp_path, np.ones((2, DIM)), path=["1.jpg", "2.jpg"])
    npy.write_bytes(content)
    refused(tmp_path, "v.npy is no ", npy, metadata=rows)
    np.save(npy, np.array([[Evil()]], object), allow_pickle=True)
    refused(tmp_path, "v.npy is no array of vectors", npy, metadata=rows)
    assert not (tmp_path / "evil").exists()


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    npy, rows = table(tmp_path, np.ones((200, DIM)), path=[f"{i}" for i in range(200)])
    npy.write_bytes(npy.read_bytes()[:1000])
    refused(tmp_path, "v.npy is no array of vectors", npy, metadata=rows)


def part(n: int, start: int = 0, texts: bool = True, pictures: bool = True) -> dict:
    names = [f"{i}.jpg" for i in range(start, start + n)]
    columns = {"image_path": names, "caption": [f"no. {i}" for i in range(start, start + n)]}
    return {
        **({"img": numbers(n, start)} if pictures else {}),
        **({"text": numbers(n, start + 50)} if texts else {}),
        "columns": columns,
    }


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("img_emb/img_emb_1.npy", "there is text_emb_1.npy, but no img_emb/img_emb of number 1"),
        ("text_emb/text_emb_0.npy", "there is img_emb_0.npy, but no text_emb/text_emb of number 0"),
        ("metadata/metadata_1.parquet", "there is img_emb_1.npy, but no metadata/metadata of number 1"),
    ],
)
def test_parts_that_are_missing_are_named(tmp_path, gone, told):
    folder = clip_retrieval(tmp_path / "emb", {"0": part(3), "1": part(2, 3)})
    (folder / gone).unlink()
    refused(tmp_path, told, folder)


def test_parts_that_do_not_fit_are_named(tmp_path):
    folder = clip_retrieval(tmp_path / "emb", {"0": part(3), "1": {**part(2, 3), "text": numbers(1)}})
    refused(tmp_path, "metadata_1.parquet has 2 rows, and", folder)
    np.save(folder / "text_emb" / "text_emb_1.npy", np.ones((2, DIM + 1)))
    refused(tmp_path, "text_emb_1.npy has vectors of width 7", folder)
    np.save(folder / "text_emb" / "text_emb_1.npy", numbers(2))
    np.save(folder / "text_emb" / "text_emb_01.npy", numbers(2))
    refused(tmp_path, "have one number", folder)


def test_a_part_of_an_export_that_is_lost_altogether_is_missed(tmp_path):
    export_clip_retrieval(make(tmp_path / "a", [row(f"{i}.jpg") for i in range(6)]), tmp_path / "out", rows_per_part=2)
    for file in (tmp_path / "out").rglob("*_1.*"):
        file.unlink()
    refused(tmp_path, "has 2 of the 3 parts that were written", tmp_path / "out")


def test_folders_without_vectors_say_what_is_wanted(tmp_path):
    refused(tmp_path, "there is no ", tmp_path / "gone")
    (tmp_path / "emb").mkdir()
    refused(tmp_path, "holds no vectors: neither vectors.npy nor img_emb/ nor text_emb/", tmp_path / "emb")
    (tmp_path / "emb" / "image.index").touch()
    refused(tmp_path, "give the folder that  clip-retrieval inference  wrote", tmp_path / "emb")
    (tmp_path / "emb" / "img_emb").mkdir()
    refused(tmp_path, "no files of vectors", tmp_path / "emb")
    np.save(tmp_path / "v.npy", numbers(2))
    refused(tmp_path, "nothing says what the vectors in", tmp_path / "v.npy")
    refused(tmp_path, "x.csv is missing", tmp_path / "v.npy", metadata=tmp_path / "x.csv")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_clip_retrievals_own_folder(tmp_path, dtype):
    """As its 2.45 writes it: float16 unit rows, image_path as it was typed, captions, and keys of .json files."""
    numbers_ = [str(i).zfill(2) for i in range(11)]
    parts = {n: part(2, 2 * i) for i, n in enumerate(numbers_)}
    for one in parts.values():
        one["img"], one["text"] = (as_vectors(one[kind]).astype(dtype) for kind in ("img", "text"))
        one["columns"]["image_path"] = [f"./photos/{name}" for name in one["columns"]["image_path"]]
        one["columns"] |= {"hash": [5, 6], "width": [640.0, 480.0], "height": [1.5, 2.0], "similarity": [0.25, 0.5]}
    folder = clip_retrieval(tmp_path / "emb", parts)
    counts = import_parts(find_parts(folder), tmp_path / "b", tmp_path, MODEL)
    assert counts == Imported(images=22, texts=22, missing=22)
    rows = content(Store.open(tmp_path / "b"))
    expected = []
    for i, one in enumerate(parts.values()):
        for j in range(2):
            columns = {"source_hash": (5, 6)[j], "source_height": (1.5, 2.0)[j], "similarity": (0.25, 0.5)[j]}
            path, size = f"photos/{2 * i + j}.jpg", (640, 480)[j]
            expected.append((Row(path=path, size=0, mtime_ns=0, hash="", width=size, columns=columns), one["img"][j]))
        expected += [(text(f"photos/{2 * i + j}.jpg", f"no. {2 * i + j}"), one["text"][j]) for j in range(2)]
    assert rows == [(known, vector.astype(np.float16).tobytes()) for known, vector in expected]


def test_pictures_without_vectors_of_texts_keep_their_captions(tmp_path):
    folder = clip_retrieval(tmp_path / "emb", {"0": part(2, texts=False)})
    assert [one.caption for one, _ in content(bring(folder, tmp_path / "b"))] == ["no. 0", "no. 1"]
    folder = clip_retrieval(tmp_path / "emb2", {"0": part(2, pictures=False)})
    assert [(one.kind, one.caption) for one, _ in content(bring(folder, tmp_path / "c"))] == [
        ("text", "no. 0"),
        ("text", "no. 1"),
    ]


def test_rows_that_repeat_a_picture_are_one(tmp_path):
    given = numbers(5)
    given[3] = given[0]
    npy, rows = table(tmp_path, given, path=["a.jpg", "b.jpg", "c.jpg", "./a.jpg", "d.jpg"], n=[0, 1, 2, 3, 4])
    counts = import_parts(find_parts(npy, rows), tmp_path / "b", tmp_path, MODEL)
    assert (counts.images, counts.repeated) == (4, 1)
    assert [(one.path, one.columns["n"]) for one, _ in content(Store.open(tmp_path / "b"))] == [
        ("a.jpg", 0), ("b.jpg", 1), ("c.jpg", 2), ("d.jpg", 4),
    ]  # fmt: skip
    given[3, 0] += 1
    np.save(npy, given)
    with pytest.raises(ExchangeError, match=r"a\.jpg has two vectors, row 0 of .*v\.npy and row 3 of"):
        bring(npy, tmp_path / "c", metadata=rows)


def test_texts_may_say_the_same(tmp_path):
    npy, rows = table(tmp_path, numbers(3), text=["same", "same", None])
    back = bring(npy, tmp_path / "b", metadata=rows, kind="text")
    assert [(one.kind, one.path, one.caption) for one, _ in content(back)] == [
        ("text", "", "same"), ("text", "", "same"), ("text", "", None),
    ]  # fmt: skip


def test_paths_are_made_relative_to_the_root(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    names = [
        f"{tmp_path}/link/a.jpg",
        f"{tmp_path}/real/b.jpg",
        "./c//d/../e.jpg",
        "https://x.org/a//b.jpg",
        "sub/f.jpg",
    ]
    npy, rows = table(tmp_path, numbers(5), image=names)
    back = bring(npy, tmp_path / "index", root=tmp_path / "link", metadata=rows)
    assert back.paths() == ["a.jpg", "b.jpg", "c/e.jpg", "https://x.org/a//b.jpg", "sub/f.jpg"]
    for bad in ("../up.jpg", "/elsewhere/a.jpg", "a/../../b.jpg", f"{tmp_path}/linked/a.jpg"):
        npy, rows = table(tmp_path, numbers(1), image=[bad])
        refused(tmp_path, f"1 of 1 paths lie outside {tmp_path / 'link'}", npy, metadata=rows, root=tmp_path / "link")


def test_columns_can_be_named_and_must_be_there(tmp_path):
    npy, rows = table(tmp_path, numbers(2), path=["x", "y"], key=["a.jpg", "b.jpg"], words=["one", "two"])
    back = bring(npy, tmp_path / "c", metadata=rows, roles=Roles("key", "words"))
    assert [(one.path, one.caption, one.columns) for one, _ in content(back)] == [
        ("a.jpg", "one", {"source_path": "x"}), ("b.jpg", "two", {"source_path": "y"}),
    ]  # fmt: skip
    refused(
        tmp_path, "has no column 'kee': its columns are 'path', 'key', 'words'", npy, metadata=rows, roles=Roles("kee")
    )
    npy, rows = table(tmp_path, numbers(2), words=["one", "two"])
    refused(
        tmp_path, "does not say which picture row 0 is: name the column of paths with --path-column", npy, metadata=rows
    )


def test_a_column_of_kinds_is_heeded(tmp_path):
    npy, rows = table(tmp_path, numbers(2), path=["a.jpg", None], kind=["image", "text"], text=[None, "words"])
    assert [one.kind for one, _ in content(bring(npy, tmp_path / "c", metadata=rows))] == ["image", "text"]
    npy, rows = table(tmp_path, numbers(2), path=["a.jpg", "b.jpg"], kind=["cat", "dog"])
    assert [(one.kind, one.columns) for one, _ in content(bring(npy, tmp_path / "d", metadata=rows))] == [
        ("image", {"source_kind": "cat"}), ("image", {"source_kind": "dog"}),
    ]  # fmt: skip


def test_csv_and_jsonl_beside_a_npy(tmp_path):
    np.save(tmp_path / "v.npy", numbers(2))
    (tmp_path / "r.csv").write_text("filename,caption,n\na.jpg,a dog,1\nb.jpg,,2\n")
    (tmp_path / "r.jsonl").write_text(
        '{"filename": "a.jpg", "caption": "a dog", "n": 1}\n{"filename": "b.jpg", "n": 2}\n'
    )
    one = bring(tmp_path / "v.npy", tmp_path / "one", metadata=tmp_path / "r.csv")
    two = bring(tmp_path / "v.npy", tmp_path / "two", metadata=tmp_path / "r.jsonl")
    assert content(one) == content(two)
    assert [(r.path, r.caption, r.columns) for r, _ in content(one)] == [
        ("a.jpg", "a dog", {"n": 1}),
        ("b.jpg", None, {"n": 2}),
    ]


def test_a_mark_that_is_no_mark_is_a_foreign_table(tmp_path):
    whole = {"format": 1, "layout": "npy", "model": {"name": "m", "fingerprint": "f", "dim": DIM}}
    wrong = ["", "[]", "{}", '{"format": 2}', '{"format": 1}']
    changes = ({"layout": "x"}, {"model": 3}, {"source": {}}, {"more": 1}, {"parts": "2"})
    wrong += [json.dumps({**whole, **change}) for change in changes]
    for i, mark in enumerate(wrong):
        rows = pa.table({"path": ["a.jpg"], "hash": ["x"]}).replace_schema_metadata({b"diptych": mark})
        np.save(tmp_path / "v.npy", numbers(1))
        pq.write_table(rows, tmp_path / "r.parquet")
        parts = find_parts(tmp_path / "v.npy", tmp_path / "r.parquet")
        assert mark_of(parts) is None
        path = tmp_path / f"b{i}"
        import_parts(parts, path, tmp_path, MODEL)
        assert content(Store.open(path))[0][0].columns == {"source_hash": "x"}


# ---- files behind the rows -------------------------------------------------------------------------------------------


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def photo(folder: Path, name: str, data: bytes = b"picture") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def test_files_of_foreign_rows_are_looked_at_and_read(tmp_path):
    root = tmp_path / "photos"
    photo(root, "a.jpg")
    photo(root, "ü/b.jpg", b"other")
    (root / "folder.jpg").mkdir()
    npy, rows = table(tmp_path, numbers(5), path=["a.jpg", "ü/b.jpg", "gone.jpg", "folder.jpg", "bad\0name"])
    counts = import_parts(find_parts(npy, rows), tmp_path / "b", root, MODEL)
    assert (counts.images, counts.missing, counts.changed) == (5, 3, 0)
    known = {one.path: (one.size, one.mtime_ns, one.hash) for one, _ in content(Store.open(tmp_path / "b"))}
    assert known == {
        "a.jpg": (7, (root / "a.jpg").stat().st_mtime_ns, sha(b"picture")),
        "ü/b.jpg": (5, (root / "ü/b.jpg").stat().st_mtime_ns, sha(b"other")),
        **dict.fromkeys(("gone.jpg", "folder.jpg", "bad\0name"), (0, 0, "")),
    }
    import_parts(find_parts(npy, rows), tmp_path / "c", root, MODEL, hashing=False)
    assert [one.hash for one, _ in content(Store.open(tmp_path / "c"))] == [""] * 5
    assert content(Store.open(tmp_path / "c"))[0][0].size == 7


def test_files_of_an_export_are_read_only_where_their_time_has_changed(tmp_path, monkeypatch):
    root = tmp_path / "photos"
    files = {name: photo(root, name, name.encode()) for name in ("same", "touched", "changed", "rewritten", "gone")}
    rows = [
        row(name, size=f.stat().st_size, mtime_ns=f.stat().st_mtime_ns, hash=sha(name.encode()))
        for name, f in files.items()
    ]
    export_npy(make(tmp_path / "a", rows), tmp_path / "out")
    os.utime(files["touched"], ns=(5, 5))
    files["changed"].write_bytes(b"longer than before")
    files["rewritten"].write_bytes(b"REWRITTEN")
    os.utime(files["rewritten"], ns=(6, 6))
    files["gone"].unlink()
    read = []
    monkeypatch.setattr("indexes.exchange.sha256_of", lambda f: read.append(f.name) or sha(f.read_bytes()))
    counts = import_parts(find_parts(tmp_path / "out"), tmp_path / "b", root, MODEL)
    assert (counts.missing, counts.changed, sorted(read)) == (1, 2, ["rewritten", "touched"])
    back = [one for one, _ in content(Store.open(tmp_path / "b"))]
    assert back == [rows[0], row("touched", size=7, mtime_ns=5, hash=rows[1].hash), *rows[2:]]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_counts_as_missing(tmp_path):
    photo(tmp_path, "a.jpg").chmod(0)
    npy, rows = table(tmp_path, numbers(1), path=["a.jpg"])
    assert import_parts(find_parts(npy, rows), tmp_path / "b", tmp_path, MODEL).missing == 1


# ---- the new index ---------------------------------------------------------------------------------------------------


def test_an_import_appears_whole_or_not_at_all(tmp_path):
    npy, rows = table(tmp_path, numbers(3), path=["a", "b", "c"])
    (tmp_path / "b.importing" / "segments").mkdir(parents=True)  # of an import that was killed
    (tmp_path / "b.importing" / "manifest.json").write_text("old")

    def interrupt(_done, _total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bring(npy, tmp_path / "b", metadata=rows, progress=interrupt)

    def disagree(store):
        assert len(store) == 3
        raise ExchangeError("no")

    with pytest.raises(ExchangeError):
        bring(npy, tmp_path / "b", metadata=rows, check=disagree)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["rows.parquet", "v.npy"]
    assert len(bring(npy, tmp_path / "b", metadata=rows)) == 3
    with pytest.raises(StoreError, match="there is something at"):
        bring(npy, tmp_path / "b", metadata=rows)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["b", "rows.parquet", "v.npy"]


def test_an_index_inside_its_folder_moves_with_it(tmp_path):
    npy, rows = table(tmp_path, numbers(1), path=["a.jpg"])
    (tmp_path / "photos").mkdir()
    import_parts(find_parts(npy, rows), tmp_path / "photos" / ".diptych", tmp_path / "photos", MODEL, inside=True)
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert Store.open(tmp_path / "moved" / ".diptych").root == tmp_path / "moved"


def test_an_imported_store_can_be_written_on(tmp_path):
    npy, rows = table(tmp_path, numbers(3000), path=[f"{i}" for i in range(3000)], n=list(range(3000)))
    done = []
    store = bring(npy, tmp_path / "b", metadata=rows, progress=lambda *now: done.append(now))
    assert done == [(2048, 3000), (3000, 3000)]
    with store.write() as writer:
        writer.remove(7)
        assert writer.add(row("new", columns={"label": "x"}), numbers(1)[0]) == 3000
    assert store.check() == []
    assert [store.row(i).columns for i in (8, 3000)] == [{"n": 8}, {"label": "x"}]
    hits = store.search(numbers(3000)[8:9], 1)
    assert store.paths()[hits.rows[0, 0]] == "8"


def test_a_model_that_was_only_named_is_taken_by_its_name(tmp_path):
    from indexes.errors import ModelMismatch

    npy, rows = table(tmp_path, numbers(1), path=["a"])
    import_parts(find_parts(npy, rows), tmp_path / "b", tmp_path, ModelRef("ViT-B-32/openai", UNVERIFIED, DIM))
    store = Store.open(tmp_path / "b")
    store.check_model("cd" * 32, "ViT-B-32/openai")
    with pytest.raises(ModelMismatch, match="imported as those of ViT-B-32/openai: leave out --model"):
        store.check_model("cd" * 32, "builtin")


def test_parts_are_what_they_seem(tmp_path):
    npy, rows = table(tmp_path, numbers(1), path=["a"])
    assert find_parts(npy, rows) == [Part(npy, rows, None)]
    assert find_parts(npy, rows, "text") == [Part(npy, rows, "text")]
    rows.rename(tmp_path / "metadata.parquet")
    npy.rename(tmp_path / "vectors.npy")
    assert find_parts(tmp_path) == [Part(tmp_path / "vectors.npy", tmp_path / "metadata.parquet", None)]
    folder = clip_retrieval(tmp_path / "emb", {"0": part(1)})
    with pytest.raises(ExchangeError, match="has its own tables"):
        find_parts(folder, rows)
