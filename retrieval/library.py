"""The object a user holds: one folder of photos, kept searchable."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from indexes.errors import StoreNotFound
from indexes.store import MANIFEST, ModelRef, Store
from indexes.vectors import Vectors
from retrieval.bundle import Bundle
from retrieval.encoders import BUILTIN, Encoder, data_folder, find_bundle, lasting_spec, load_encoder
from retrieval.errors import ImageError, UsageError
from retrieval.images import MAX_PIXELS, read_photo
from retrieval.indexing import IndexReport, Progress, Run, make_plan

STORE_NAME = ".diptych"
_MAX_WEIGHT = 1000  # beside it, nothing else in the query counts
QUICK_SCAN = 100_000  # pictures; looking through a folder costs about 5 microseconds a file
QUICK_FILES = 50  # embedding one costs tens of milliseconds


@dataclass(frozen=True)
class Term:
    """One part of a query: a sentence or a picture, and how much it counts. Negative: away from it."""

    text: str = ""
    image: Path | None = None
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str, sign: float = 1.0) -> Term:
        """A sentence as typed, a weight in front of it as rclip writes it: ``2:golden retriever``."""
        weighted = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+):(.*)", text, re.DOTALL)
        weight, rest = (float(weighted[1]), weighted[2]) if weighted else (1.0, text)
        if not rest.strip():
            raise UsageError("the query is empty: say what the picture shows")
        if weight > _MAX_WEIGHT:
            raise UsageError(f"the weight of {rest.strip()!r} is too large: {_MAX_WEIGHT} is the most")
        return cls(text=rest.strip(), weight=sign * weight)


@dataclass(frozen=True)
class Match:
    """One picture found. ``score`` is the cosine between query and picture, from -1 to 1."""

    path: str
    score: float
    file: Path
    width: int | None
    height: int | None
    taken_at: datetime | None


class Library:
    """A folder of photos with its index. Get one from :meth:`open` or :meth:`create`.

    >>> library = Library.create(Path("~/Pictures").expanduser())  # doctest: +SKIP
    >>> library.index()  # doctest: +SKIP
    >>> library.search("two dogs playing in snow", k=5)  # doctest: +SKIP
    """

    def __init__(self, store: Store, encoder: Encoder | None = None, **loading: object) -> None:
        self.store = store
        self._given = encoder
        self._loading = loading  # device, threads, preprocess: handed to load_encoder when the model is first needed

    @classmethod
    def open(
        cls, path: Path = Path(), *, index: Path | None = None, encoder: Encoder | None = None, **loading: object
    ) -> Library:
        """Open the index that covers a folder: its own, that of a folder above it, or the one at ``index``.

        Raises:
            StoreNotFound: there is none.
            ModelMismatch: ``encoder`` is not the model the index was made with.
        """
        folder = path.expanduser().absolute()
        found = index or find_store(folder)
        if found is None:
            raise StoreNotFound(f"no index for {folder} or a folder above it: make one with  diptych index {folder}")
        library = cls(Store.open(found), encoder, **loading)
        if encoder is not None:
            library.store.check_model(encoder.fingerprint, encoder.name)
        return library

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        index: Path | None = None,
        encoder: Encoder | None = None,
        model: str = BUILTIN,
        **loading: object,
    ) -> Library:
        """Make an empty index for a folder; nothing is read yet.

        The store lies in ``FOLDER/.diptych``, at ``index`` if given, or below ``$XDG_DATA_HOME/diptych`` when the
        folder cannot be written to.
        """
        folder = folder.expanduser().absolute()
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}")
        name = encoder.name if encoder else lasting_spec(model)
        encoder = encoder or load_encoder(model, **loading)  # type: ignore[arg-type]
        inside = index is None and os.access(folder, os.W_OK)
        place = folder / STORE_NAME if inside else (index or _outside_store(folder)).expanduser().absolute()
        reference = ModelRef(name, encoder.fingerprint, encoder.dim)
        return cls(Store.create(place, root=None if inside else folder, model=reference), encoder, **loading)

    @cached_property
    def encoder(self) -> Encoder:
        """The model the index was made with, loaded when first needed."""
        if self._given is not None:
            return self._given
        encoder = load_encoder(self.store.model.name, **self._loading)  # type: ignore[arg-type]
        self.store.check_model(encoder.fingerprint, encoder.name)
        return encoder

    @property
    def root(self) -> Path:
        """The indexed folder."""
        return self.store.root

    def below(self, folder: Path) -> str:
        """A folder as the store names it: relative to the root, "" for the root itself and for folders outside it."""
        try:
            relative = folder.expanduser().resolve().relative_to(self.root.resolve())
        except ValueError:
            return ""
        return "" if relative == Path() else relative.as_posix()

    # ---- keeping the index current -------------------------------------------------------------------------------

    def pending(self, below: str = "") -> int:
        """How many files an :meth:`index` run would touch now: a look at names, sizes and times only."""
        return make_plan(self, below).pending

    def catch_up(self, progress: Progress | None = None) -> int:
        """Take in what changed if that is a matter of a second or two; the number of files left for :meth:`index`.

        A folder of more than ``QUICK_SCAN`` pictures is not even looked through.
        """
        if len(self.store) > QUICK_SCAN:
            return 0
        pending = self.pending()
        if pending > QUICK_FILES:
            return pending
        if pending:
            self.index(progress=progress)
        return 0

    def index(
        self, below: str = "", *, progress: Progress | None = None, max_pixels: int = MAX_PIXELS, wait: float = 0.0
    ) -> IndexReport:
        """Take in what was added, changed, renamed or deleted since the last run.

        Args:
            below: only this folder, relative to the root.
            progress: called with (files done, files to do).
            max_pixels: a picture of more is a failure, not a memory problem.
            wait: seconds to wait for another process that is writing.

        Raises:
            StoreLocked: another process is writing.
            UsageError: the folder is gone; or it is empty, and the index, which lies elsewhere, knows pictures in it.
        """
        with self.store.write(wait=wait) as writer:
            plan = make_plan(self, below)
            elsewhere = not self.store.path.is_relative_to(self.root)  # else the drive is there, for the index is
            if elsewhere and plan.missing and not plan.unchanged and not plan.todo and not below:
                raise UsageError(
                    f"{self.root / below} holds no picture any more, but its index knows {len(plan.missing)}: is a "
                    f"drive not mounted? If they are really gone, delete {self.store.path}"
                )
            report = Run(self, writer, plan, max_pixels, progress).finish()
        if self.store.index_is_stale():
            self.store.rebuild_index()
        failures = tuple(f for f in self.store.failures() if not below or f.path.startswith(below + "/"))
        return IndexReport(**report, skipped=plan.unchanged, failures=failures)

    def check(self) -> list[str]:
        """Recompute every checksum of the index, and its model's fingerprint; a line for each thing that is wrong."""
        problems = self.store.check()
        folder = find_bundle(self.store.model.name)
        if folder is not None:
            bundle = Bundle.load(folder)
            if bundle.compute_fingerprint() != bundle.fingerprint:
                problems.append(f"the model in {folder} is damaged: its files do not fit its fingerprint")
            if bundle.fingerprint != self.store.model.fingerprint:
                problems.append(f"the model in {folder} is not the one that this index was made with")
        return problems

    # ---- searching -----------------------------------------------------------------------------------------------

    def search(
        self, query: str | Sequence[Term], k: int = 10, *, below: str = "", threshold: float = -1.0
    ) -> list[Match]:
        """The k pictures nearest to a query, best first; fewer if there are fewer.

        Args:
            query: a sentence, or terms whose weighted sum is searched.
            k: how many.
            below: only pictures in this folder, relative to the root.
            threshold: only pictures with at least this cosine.
        """
        terms = [Term.parse(query)] if isinstance(query, str) else list(query)
        vector = self.query_vector(terms)
        if k < 1 or not len(self.store):
            return []
        hits = self.store.search(vector[None, :], k, self._rows_below(below))
        found = hits.rows[0][(hits.rows[0] >= 0) & (hits.scores[0] >= threshold)]
        picked = self.store.rows().take(found)
        paths = self.store.paths()
        return [
            Match(
                paths[row], float(score), self.root / paths[row], fields["width"], fields["height"], fields["taken_at"]
            )
            for row, score, fields in zip(found, hits.scores[0], picked.to_pylist(), strict=False)
        ]

    def query_vector(self, terms: Sequence[Term]) -> Vectors:
        """(D,) unit vector: the normalised weighted sum of the terms' vectors. UsageError when they cancel out."""
        if not terms:
            raise UsageError("the query is empty: say what the picture shows")
        total = np.zeros(self.encoder.dim, np.float32)
        texts = [term for term in terms if term.image is None]
        for term, vector in zip(texts, self.encoder.encode_texts([term.text for term in texts]), strict=True):
            total += term.weight * vector
        for term in terms:
            if term.image is not None:
                total += term.weight * self.encoder.encode_images([_query_image(term.image)])[0]
        length = float(np.linalg.norm(total))
        if length < 1e-6:
            raise UsageError("the parts of the query cancel each other out: change a weight or leave one out")
        unit: Vectors = total / np.float32(length)
        return unit

    def _rows_below(self, below: str) -> NDArray[np.bool_] | None:
        if not below:
            return None
        prefix = below + "/"
        return np.fromiter((path.startswith(prefix) for path in self.store.paths()), bool, len(self.store))


def _query_image(path: Path) -> Image.Image:
    try:
        return read_photo(path.expanduser()).image
    except ImageError as error:
        raise ImageError(f"{path} cannot be searched with: {error}") from error


def describe(library: Library) -> dict[str, Any]:
    """What an index holds and was made with, in plain values."""
    store = library.store
    failures = [{"path": str(library.root / f.path), "reason": f.reason} for f in store.failures()]
    return {
        "folder": str(library.root),
        "index": str(store.path),
        "pictures": len(store),
        "model": store.model.name,
        "fingerprint": store.model.fingerprint,
        "dim": store.model.dim,
        "bytes": sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()),
        "failures": failures,
    }


def find_store(folder: Path) -> Path | None:
    """The store that covers a folder: in it or the nearest folder above, as git looks for ``.git``."""
    for place in (folder, *folder.parents):
        for store in (place / STORE_NAME, _outside_store(place)):
            if (store / MANIFEST).is_file():
                return store
    return None


def _outside_store(folder: Path) -> Path:
    """Where the store of a folder that cannot be written to lies: named after the folder, below the data directory."""
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return data_folder() / "indexes" / name
