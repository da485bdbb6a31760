"""Vectors of an index handed out to other tools, without encoding anything: the counterpart of `indexes.exchange`.

Vectors are copied from the segments into memory-mapped .npy files group by group, as float16 bit for bit; the table of
rows is held in Arrow.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from indexes import runtime
from indexes.errors import ExchangeError, StoreError
from indexes.exchange import CLIP_RETRIEVAL, MARK, METADATA, NPY, VECTORS, Mark
from indexes.segments import unit_rows
from indexes.store import Store
from indexes.vectors import as_vectors

LAYOUTS = (NPY, CLIP_RETRIEVAL)
ROWS_PER_PART = 1_000_000  # as clip-retrieval writes them
FAISS_KIND = "SQfp16"  # inner products with float16 rows: what the vectors are, in half the memory of Flat
_BLOCK = 2048
_ZEROS = 1 << 20
_NOWHERE = -1


@dataclass(frozen=True)
class Exported:
    """What an export wrote: rows of vectors of pictures and of texts. A picture counts once for each of its texts."""

    images: int
    texts: int


@dataclass(frozen=True)
class _Rows:
    """Rows to write that lie in one part: for each the position of its picture and of its text, where it has them."""

    images: NDArray[np.int64] | None
    texts: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.images if self.images is not None else self.texts)  # type: ignore[arg-type]

    def split(self, size: int) -> list[_Rows]:
        cuts = range(0, max(1, len(self)), size)
        return [_Rows(*(None if p is None else p[i : i + size] for p in (self.images, self.texts))) for i in cuts]


def export_npy(store: Store, folder: Path, dtype: type[np.floating[Any]] = np.float16) -> Exported:
    """Write ``vectors.npy`` and ``metadata.parquet``: row i of both is position i of the index.

    The table has every column of the index but the ids, and says which model made the vectors. float16 is what the
    index holds, bit for bit; float32 has rows of length 1 to within float32's rounding.

    Raises:
        ExchangeError: the folder exists and is not empty.
        StoreError: the index cannot be read, or the folder cannot be written.

    """
    rows = store.rows()
    with _appearing(folder) as aside:
        _copy(store, [(aside / VECTORS, np.arange(len(rows)))], dtype)
        _write_table(rows.drop_columns(["id"]), aside / METADATA, Mark(NPY, store.model, source=store.source))
    images = pc.sum(pc.equal(rows["kind"], "image")).as_py() or 0
    return Exported(images, len(rows) - images)


def export_clip_retrieval(
    store: Store,
    folder: Path,
    dtype: type[np.floating[Any]] = np.float16,
    *,
    kind: str | None = None,
    faiss_kind: str | None = FAISS_KIND,
    rows_per_part: int = ROWS_PER_PART,
) -> Exported:
    """Write a folder as clip-retrieval's ``inference`` and ``index`` do.

    A picture and a text that names it are one row: they are matched by the picture's whole path, its suffix included,
    and a picture with several texts has several rows. Pictures without a text follow, in parts of their own.

    Args:
        store: the index.
        folder: the folder to make.
        dtype: of the .npy files.
        kind: only image or only text rows; None is all of them.
        faiss_kind: a FAISS factory string for ``image.index`` and ``text.index``; None writes none.
        rows_per_part: rows in one numbered file at most.

    Raises:
        ExchangeError: the folder exists and is not empty; or there are texts of no picture beside pictures.
        StoreError: the index cannot be read, or the folder cannot be written.

    """
    rows = store.rows()
    parts = [part for group in _paired(rows, kind) for part in group.split(rows_per_part)]
    width = len(str(len(parts)))  # clip-retrieval reads files in the order of their names
    images = [(i, part.images) for i, part in enumerate(parts) if part.images is not None]
    texts = [(i, part.texts) for i, part in enumerate(parts) if part.texts is not None]
    with _appearing(folder) as aside:
        for name, index, found in (("img_emb", "image.index", images), ("text_emb", "text.index", texts)):
            if found:
                files = [(aside / name / f"{name}_{i:0{width}d}.npy", positions) for i, positions in found]
                (aside / name).mkdir()
                _copy(store, files, dtype)
                if faiss_kind is not None:
                    _write_faiss([file for file, _ in files], aside / index, faiss_kind)
        (aside / "metadata").mkdir()
        for i, part in enumerate(parts):
            present = (part.images is not None, part.texts is not None)
            mark = Mark(CLIP_RETRIEVAL, store.model, *present, len(parts), store.source)
            table = _table(rows, part, store.root)
            _write_table(table, aside / "metadata" / f"metadata_{i:0{width}d}.parquet", mark)
    return Exported(sum(len(p) for _, p in images), sum(len(p) for _, p in texts))


def _paired(rows: pa.Table, kind: str | None) -> list[_Rows]:
    """Which rows to write, in groups: pictures with a text, then those without; or texts alone."""
    is_text = pc.equal(rows["kind"], "text").to_numpy()
    images, texts = np.flatnonzero(~is_text), np.flatnonzero(is_text)
    if kind == "image" or (kind is None and not len(texts)):
        return [_Rows(images, None)]
    if kind == "text" or not len(images):
        return [_Rows(None, texts)]
    keys = pc.coalesce(rows["path_bytes"], rows["path"].cast(pa.binary())).combine_chunks()
    found = pc.index_in(keys.take(pa.array(texts)), keys.take(pa.array(images))).fill_null(_NOWHERE).to_numpy()
    alone = int((found == _NOWHERE).sum())
    if alone:
        raise ExchangeError(
            f"{alone} of {len(texts)} texts belong to no picture of the index, and in this layout a row is a picture "
            "with its text: export pictures and texts apart (--kind image, --kind text), or with --format npy"
        )
    order = np.argsort(found, kind="stable")
    without = np.setdiff1d(np.arange(len(images)), found)
    groups = [_Rows(images[found[order]], texts[order])]
    return groups + ([_Rows(images[without], None)] if len(without) else [])


def _table(rows: pa.Table, part: _Rows, root: Path) -> pa.Table:
    """The metadata of a part: image_path and caption, as clip-retrieval has them, and all that is known besides."""
    table = rows.take(pa.array(part.images if part.images is not None else part.texts))
    caption = table["caption"] if part.texts is None else rows["caption"].take(pa.array(part.texts))
    paths = [str(root / path) if path else None for path in table["path"].to_pylist()]
    columns = {"image_path": pa.array(paths, pa.string()), "caption": caption}
    for name in table.column_names:
        if name in ("id", "kind") or (name == "path_bytes" and table[name].null_count == len(table)):
            continue
        columns.setdefault(f"source_{name}" if name == "image_path" else name, table[name])
    return pa.table(columns)


def _write_table(table: pa.Table, file: Path, mark: Mark) -> None:
    import pyarrow.parquet as pq

    with file.open("wb") as stream:  # not Arrow's own open: it takes no names that are not UTF-8
        pq.write_table(table.replace_schema_metadata({MARK: mark.dump()}), stream, compression="zstd")


def _copy(store: Store, files: Sequence[tuple[Path, NDArray[np.int64]]], dtype: type[np.floating[Any]]) -> None:
    """Write the vectors at some positions, in any order and repeated at will, reading each group of rows once."""
    dim = store.model.dim
    outs = [_mapped(file, (len(positions), dim), dtype) for file, positions in files]
    orders = [np.argsort(positions, kind="stable") for _, positions in files]
    sorted_ = [positions[order] for (_, positions), order in zip(files, orders, strict=True)]
    for first, vectors in _groups(store, dtype):
        for out, order, positions in zip(outs, orders, sorted_, strict=True):
            begin, end = np.searchsorted(positions, (first, first + len(vectors)))
            if end > begin:
                out[order[begin:end]] = vectors[positions[begin:end] - first]
    for out in outs:
        out.flush()


def _mapped(file: Path, shape: tuple[int, int], dtype: type[np.floating[Any]]) -> Any:
    """Map a new .npy file. It is filled with zeros first: a disk that is full later kills who writes to the map."""
    out = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    with file.open("r+b") as stream:
        stream.seek(out.offset)
        for start in range(0, out.nbytes, _ZEROS):
            stream.write(bytes(min(_ZEROS, out.nbytes - start)))
    return out


def _groups(store: Store, dtype: type[np.floating[Any]]) -> Iterator[tuple[int, NDArray[Any]]]:
    """All vectors by position, a few thousand at a time, with the position of the first."""
    live, slot = store.snapshot.live, 0
    for segment in store.snapshot.segments:
        for i in range(len(segment.group_starts) - 1):
            halves = segment.halves(i)
            begin, end = np.searchsorted(live, (slot, slot + len(halves)))
            picked = halves[live[begin:end] - slot]
            slot += len(halves)
            yield int(begin), picked if dtype is np.float16 else unit_rows(picked, segment.file)


def _write_faiss(files: Sequence[Path], index_file: Path, kind: str) -> None:
    """Build an index of inner products over files of vectors, one after the other."""
    faiss = runtime.faiss()
    arrays = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
    try:
        index = faiss.index_factory(arrays[0].shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            raise RuntimeError("it needs training; give a kind that needs none: SQfp16, Flat, HNSW32")
        for array in arrays:
            for start in range(0, len(array), _BLOCK):
                index.add(as_vectors(array[start : start + _BLOCK]))
    except RuntimeError as error:
        raise ExchangeError(f"FAISS cannot write an index of kind {kind!r}: {str(error).splitlines()[0]}") from error
    with index_file.open("wb") as stream:
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name when the block is left, or not at all."""
    folder = folder.absolute()
    aside = folder.with_name(f"{folder.name}.exporting")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ExchangeError(f"{folder} exists and is not empty: choose another name, or remove it first")
        shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
        aside.mkdir(parents=True)
        yield aside
        os.replace(aside, folder)  # noqa: PTH105 - onto an empty folder, too
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be written ({error.strerror or error}): make room or choose another"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
