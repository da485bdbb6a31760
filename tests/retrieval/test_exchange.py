"""Vectors brought in for a folder of pictures: which model is taken, and what a later index run makes of them."""

from __future__ import annotations

import shutil
import tarfile
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from indexes.errors import ExchangeError, ModelMismatch, StoreError
from indexes.export import export_clip_retrieval, export_npy
from indexes.store import UNVERIFIED, Row
from retrieval.errors import ModelError, UsageError
from retrieval.exchange import import_vectors
from retrieval.library import Library
from tests.fakes import ColourEncoder
from tests.odd_photos import TINY_HEIC
from tests.retrieval.test_library import counts, did, paint

COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture
def folder(tmp_path):
    for colour in COLOURS:
        paint(tmp_path / "photos" / f"{colour}.png", colour)
    return tmp_path / "photos"


@pytest.fixture
def library(folder):
    library = Library.create(folder, encoder=ColourEncoder())
    library.index()
    return library


@pytest.fixture
def foreign(folder):
    """What another tool with the same model left of the folder."""
    return written(folder, ColourEncoder())


def written(folder: Path, encoder, change=lambda vectors: vectors) -> Path:
    output = folder.parent / "emb"
    names = [f"{colour}.png" for colour in COLOURS]
    (output / "img_emb").mkdir(parents=True)
    (output / "metadata").mkdir()
    vectors = encoder.encode_images([Image.open(folder / name) for name in names])
    np.save(output / "img_emb" / "img_emb_0.npy", change(vectors).astype(np.float16))
    pq.write_table(
        pa.table({"image_path": [f"{folder}/{name}" for name in names]}), output / "metadata/metadata_0.parquet"
    )
    return output


def test_the_next_index_run_encodes_only_what_is_new(folder, foreign):
    report = import_vectors(foreign, root=folder, encoder=ColourEncoder())
    assert (report.path, report.rows.images, report.rows.missing) == (folder / ".diptych", 4, 0)
    assert report.agreement == pytest.approx(1, abs=1e-3)
    encoder = ColourEncoder()
    library = Library.open(folder, encoder=encoder)
    assert counts(library.index()) == did(skipped=4)
    (folder / "red.png").rename(folder / "rot.png")
    (folder / "green.png").touch()
    paint(folder / "white.png", "white")
    assert counts(library.index()) == did(added=1, changed=1, renamed=1, embedded=1, skipped=2)
    assert encoder.encoded == 1
    assert library.search("red", k=1)[0].path == "rot.png"


def test_size_and_date_are_read_in_the_header(folder, tmp_path):
    shutil.copyfile(TINY_HEIC, folder / "tiny.heic")
    np.save(tmp_path / "v.npy", np.ones((3, 3)))
    rows = {"path": ["tiny.heic", "red.png", "gone.png"], "width": [None, 7, 8], "height": [None, None, 9]}
    pq.write_table(pa.table(rows), tmp_path / "r.parquet")
    given = {"root": folder, "metadata": tmp_path / "r.parquet", "model": "m", "unverified": True}
    report = import_vectors(tmp_path / "v.npy", **given)
    table = Library.open(folder).store.rows()
    assert table.select(["width", "height"]).to_pylist() == [
        {"width": 64, "height": 96}, {"width": 7, "height": 30}, {"width": 8, "height": 9},
    ]  # fmt: skip
    assert table["taken_at"].to_pylist() == [datetime(2021, 7, 4, 9, 30, 15), None, None]
    assert report.rows.missing == 1
    import_vectors(tmp_path / "v.npy", hashing=False, index=tmp_path / "b", **given)
    assert Library.open(folder, index=tmp_path / "b").store.rows()["width"].to_pylist() == [None, 7, 8]


def test_without_hashes_only_what_is_moved_or_touched_is_encoded_anew(folder, foreign):
    import_vectors(foreign, root=folder, encoder=ColourEncoder(), hashing=False)
    encoder = ColourEncoder()
    library = Library.open(folder, encoder=encoder)
    assert counts(library.index()) == did(skipped=4)
    (folder / "red.png").rename(folder / "rot.png")
    (folder / "green.png").touch()
    assert counts(library.index()) == did(added=1, changed=1, deleted=1, embedded=2, skipped=2)
    assert sorted(library.store.paths()) == ["blue.png", "green.png", "rot.png", "yellow.png"]


def test_what_has_changed_since_an_export_is_encoded_anew(folder, library):
    export_npy(library.store, folder.parent / "out")
    shutil.rmtree(folder / ".diptych")
    paint(folder / "red.png", "green", size=(10, 10))
    report = import_vectors(folder.parent / "out", root=folder)
    assert (report.rows.changed, report.agreement) == (1, None)
    again = Library.open(folder, encoder=ColourEncoder())
    assert counts(again.index()) == did(changed=1, embedded=1, skipped=3)
    assert {match.path for match in again.search("green", k=2)} == {"red.png", "green.png"}


def tars(folder: Path) -> Path:
    with tarfile.open(folder / "shard-0.tar", "w") as tar:
        for colour in COLOURS:
            tar.add(folder / f"{colour}.png", f"{colour}.png")
    return folder / "shard-0.tar"


def sentences(folder: Path) -> Path:
    (folder / "sentences.txt").write_text("".join(f"{colour}\n" for colour in COLOURS))
    return folder / "sentences.txt"


def listed(folder: Path) -> Path:
    (folder / "list.csv").write_text("image,label\n" + "".join(f"{colour}.png,{colour}\n" for colour in COLOURS))
    return folder / "list.csv"


@pytest.mark.parametrize("corpus", [tars, sentences, listed])
@pytest.mark.parametrize("export", [export_npy, export_clip_retrieval])
def test_a_corpus_that_is_no_folder_is_known_again(folder, corpus, export):
    given = corpus(folder)
    library = Library.create(given, encoder=ColourEncoder())
    library.index()
    export(library.store, folder.parent / "out")
    place = library.store.path
    shutil.rmtree(place)
    report = import_vectors(folder.parent / "out", root=folder)
    assert (report.path, report.rows.missing, report.rows.changed) == (place, 0, 0)
    again = Library.open(given, encoder=ColourEncoder())
    assert counts(again.index()) == did(skipped=4)
    assert again.store.rows().drop_columns(["id"]).equals(library.store.rows().drop_columns(["id"]))


def test_an_index_run_leaves_texts_alone(folder, library):
    """A text names its picture in the column of paths; it is no file of that name."""
    with library.store.write() as writer:
        vector = library.encoder.encode_texts(["blue"])[0]
        writer.add(Row(path="red.png", kind="text", caption="blue", size=4, mtime_ns=0, hash=""), vector)
        writer.add(Row(path="", kind="text", caption="blue", size=4, mtime_ns=0, hash=""), vector)
    assert counts(library.index()) == did(skipped=4)
    export_clip_retrieval(library.store, folder.parent / "texts", kind="text")
    (folder / "red.png").unlink()
    assert counts(library.index()) == did(deleted=1, skipped=3)
    assert library.store.rows()["kind"].to_pylist().count("text") == 2


def test_pictures_and_texts_of_a_pair_are_compared_with_the_model(folder, library):
    vectors = library.encoder.encode_texts(COLOURS)
    with library.store.write() as writer:
        for colour, vector in zip(COLOURS, vectors, strict=True):
            writer.add(Row(path=f"{colour}.png", kind="text", caption=colour, size=0, mtime_ns=0, hash=""), vector)
    export_clip_retrieval(library.store, folder.parent / "emb")
    for file in (folder.parent / "emb" / "metadata").iterdir():  # as if another tool had written it
        pq.write_table(pq.read_table(file).select(["image_path", "caption"]).replace_schema_metadata(None), file)
    with pytest.raises(UsageError, match="name the model that made the vectors with --model"):
        import_vectors(folder.parent / "emb", root=folder, index=folder.parent / "b")
    report = import_vectors(folder.parent / "emb", root=folder, index=folder.parent / "b", encoder=ColourEncoder())
    assert (report.rows.images, report.rows.texts) == (4, 4)
    assert report.agreement == pytest.approx(1, abs=1e-3)
    store = Library.open(folder, index=folder.parent / "b").store
    assert store.check() == []


def test_vectors_of_another_model_are_refused(folder):
    output = written(folder, ColourEncoder(), lambda vectors: np.roll(vectors, 1, axis=0) - 0.5)
    with pytest.raises(ModelError, match=r"colours did not make the vectors in .*emb: .* a cosine of -?0\.\d\d"):
        import_vectors(output, root=folder, encoder=ColourEncoder())
    assert not list(folder.glob(".diptych*"))


def test_pictures_that_cannot_be_read_say_nothing_of_the_model(folder, foreign):
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(b"no picture")
    assert import_vectors(foreign, root=folder, encoder=ColourEncoder()).agreement is None


def test_an_export_tells_its_model(folder, library):
    output = folder.parent / "out"
    export_npy(library.store, output)
    for number, given in enumerate(({}, {"encoder": ColourEncoder()})):
        report = import_vectors(output, root=folder, index=folder.parent / f"b{number}", **given)
        assert (report.model, report.agreement) == (library.store.model, None)
    other = ColourEncoder()
    other.name, other.fingerprint = "others", "others-1"
    with pytest.raises(ModelMismatch, match="were made with colours, not with others"):
        import_vectors(output, root=folder, index=folder.parent / "c", encoder=other)


def test_a_name_alone_is_taken_where_that_is_said(folder, foreign):
    with pytest.raises(ModelError, match=r"no model is called 'mine'.* add --unverified"):
        import_vectors(foreign, root=folder, model="mine")
    with pytest.raises(UsageError, match="name the model"):
        import_vectors(foreign, root=folder, unverified=True)
    report = import_vectors(foreign, root=folder, model="mine", unverified=True)
    assert (report.model.name, report.model.fingerprint, report.model.dim) == ("mine", UNVERIFIED, 3)
    assert Library.open(folder).check() == []
    with pytest.raises(ModelError, match="no model is called 'mine'"):
        Library.open(folder).search("red")
    with pytest.raises(ModelMismatch, match="imported as those of mine"):
        Library.open(folder, encoder=ColourEncoder())
    mine = ColourEncoder()
    mine.name = "mine"
    assert Library.open(folder, encoder=mine).search("red", k=1)[0].path == "red.png"


def test_a_name_alone_may_be_made_good_later(folder, foreign):
    import_vectors(foreign, root=folder, model="mine", unverified=True, index=folder.parent / "a")
    export_npy(Library.open(folder, index=folder.parent / "a").store, folder.parent / "out")
    report = import_vectors(folder.parent / "out", root=folder, encoder=ColourEncoder())
    assert (report.model.fingerprint, report.agreement) == ("colours-1", pytest.approx(1, abs=1e-3))


def test_what_a_bundle_calls_itself_does_not_matter_to_its_index(folder, tmp_path):
    """An index remembers the name that was typed; the bundle behind it calls itself otherwise."""
    vectors = np.random.default_rng(0).standard_normal((1, 512))
    np.save(tmp_path / "v.npy", vectors)
    pq.write_table(pa.table({"path": ["red.png"]}), tmp_path / "r.parquet")
    given = {"root": folder, "metadata": tmp_path / "r.parquet"}
    import_vectors(tmp_path / "v.npy", model="builtin", unverified=True, **given)
    library = Library.open(folder)
    assert library.encoder.name != "builtin"
    assert library.check() == []
    with pytest.raises(ExchangeError, match=r"v\.npy has vectors of width 512, and those of colours have 3"):
        import_vectors(tmp_path / "v.npy", encoder=ColourEncoder(), index=tmp_path / "b", **given)


def test_an_import_is_refused_before_a_model_is_loaded(folder, foreign, library):
    with pytest.raises(StoreError, match=r"something at .*\.diptych already"):
        import_vectors(foreign, root=folder, model="no such model")
    with pytest.raises(UsageError, match=r"there is no folder .*gone"):
        import_vectors(foreign, root=folder / "gone", model="no such model")
    (foreign / "img_emb" / "img_emb_0.npy").write_bytes(b"")
    with pytest.raises(ExchangeError, match=r"is no \.npy file"):
        import_vectors(foreign, root=folder, index=folder / "b", model="no such model")


def test_a_large_import_gets_its_faiss_index(folder, foreign, monkeypatch):
    monkeypatch.setattr("indexes.choice._EXACT_ROWS", 1)
    monkeypatch.setattr("indexes.store._STALE_ROWS", 1)
    import_vectors(foreign, root=folder, encoder=ColourEncoder())
    assert Library.open(folder).store.ann.factory == "RaBitQfs"
