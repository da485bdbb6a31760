"""The object a user holds: one folder of photos, kept searchable."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from indexes.errors import DiptychError, StoreNotFound, VectorError
from indexes.segments import ROW_SCHEMA, exact_name
from indexes.store import MANIFEST, UNVERIFIED, ModelRef, Store, Wanted
from indexes.vectors import Vectors
from retrieval.bundle import Bundle
from retrieval.encoders import BUILTIN, Encoder, data_folder, find_bundle, lasting_spec, load_encoder
from retrieval.errors import ImageError, ModelError, UsageError
from retrieval.origin import LIST, OFFSET, TEXTS, Folder, Source

if TYPE_CHECKING:
    from PIL import Image

    from indexes.filters import Condition
    from retrieval.duplicates import Duplicates, Grade, Thresholds
    from retrieval.heads import Translator
    from retrieval.indexing import IndexReport, Progress
    from retrieval.pairs import Picture

# What only indexes, filters, compares or reads pictures is imported where that is done: see indexes/store.py.

_NOT_SHOWN = {"mtime_ns", "hash", "latitude", "longitude"}  # columns that no match has
_HIDDEN = frozenset({*ROW_SCHEMA.names, OFFSET})  # of a match's columns: they have names of their own, or none
STORE_NAME = ".diptych"
_MAX_WEIGHT = 1000  # beside it, nothing else in the query counts
QUICK_SCAN = 20_000  # pictures; looking through a folder costs 5 microseconds a file, and all of a search 0.3 s
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
    """One picture or sentence found. ``score`` is the cosine between it and the query, from -1 to 1.

    ``file`` is where a picture lies; inside a tar, the tar's path with the name in it behind. ``picture`` has its bytes
    wherever it lies. A sentence is the ``caption`` of a match of kind "text", whose path is that of the picture it is
    about, or "". ``columns`` are whatever else the index knows of it.
    """

    path: str
    score: float
    file: Path
    width: int | None
    height: int | None
    taken_at: datetime | None
    id: int  # of its row: what filters.ids takes
    kind: str = "image"
    caption: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    picture: Picture | None = field(default=None, compare=False)


class Matches(list[Match]):
    """What a search found, best first. ``qualified``: how many rows the filter left it to choose from."""

    def __init__(self, found: Iterable[Match] = (), qualified: int = 0) -> None:
        super().__init__(found)
        self.qualified = qualified


class Library:
    """A folder of photos, or a corpus that is none, with its index. Get one from :meth:`open` or :meth:`create`.

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

        Instead of a folder it may be what a corpus was made from: a file, or a pattern of tars.

        Raises:
            StoreNotFound: there is none.
            ModelMismatch: ``encoder`` is not the model the index was made with.
        """
        folder = path.expanduser().absolute()
        found = index or find_store(folder)
        if found is None:
            above = " or a folder above it" if folder.is_dir() else ""
            raise StoreNotFound(f"no index for {folder}{above}: make one with  diptych index {folder}")
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
        texts: bool = False,
        images: Path | None = None,
        **loading: object,
    ) -> Library:
        """Make an empty index for a folder, a list of pictures, tars or sentences; nothing is encoded yet.

        The store lies in ``FOLDER/.diptych`` (of a file in ``FILE.diptych`` beside it), at ``index`` if given, or below
        ``$XDG_DATA_HOME/diptych`` when the folder cannot be written to.

        Args:
            folder: of pictures, or of tars; or a file or a pattern that :func:`retrieval.pairs.read_pairs` reads; or
                sentences, one a line or in a table or JSON without pictures.
            index: where the store is to lie.
            encoder: the model itself.
            model: or its name.
            texts: index the sentences instead of the pictures.
            images: where the pictures lie that a file lists.
            **loading: what `load_encoder` takes.

        Raises:
            UsageError, DataError: it is not there, or nothing that can be indexed.
        """
        from retrieval.sources import recognise

        corpus = recognise(folder, texts, images)
        folder = corpus.root if corpus else folder.expanduser().absolute()
        name = encoder.name if encoder else lasting_spec(model)
        encoder = encoder or load_encoder(model, **loading)  # type: ignore[arg-type]
        place, inside = place_for(folder, index, corpus.store if corpus else None)
        reference = ModelRef(name, encoder.fingerprint, encoder.dim)
        source = corpus.source if corpus else None
        return cls(Store.create(place, None if inside else folder, reference, source), encoder, **loading)

    @cached_property
    def encoder(self) -> Encoder:
        """The model the index was made with, loaded when first needed."""
        if self._given is not None:
            return self._given
        encoder = load_encoder(self.store.model.name, **self._loading)  # type: ignore[arg-type]
        self.store.check_model(encoder.fingerprint, self.store.model.name)  # a bundle may call itself otherwise
        return encoder

    @property
    def root(self) -> Path:
        """The indexed folder; of a file, the folder that it lies in."""
        return self.store.root

    @property
    def source(self) -> Source:
        """Where the rows come from."""
        if self.store.source is None:
            return Folder(self.root)
        from retrieval.sources import open_source

        return open_source(self.root, self.store.source)

    @property
    def place(self) -> Path:
        """What is indexed: the folder, or the file or pattern of a corpus."""
        source = self.store.source
        return self.root / source.path if source else self.root

    def check_source(self, given: Path, texts: bool = False, images: Path | None = None) -> None:
        """Refuse to index something else into this index than it was made from; the pictures may lie elsewhere now.

        Raises:
            UsageError: it was made from something else.
            StoreLocked, StoreError: the new place of the pictures cannot be noted.
        """
        source = self.store.source
        other = not given.expanduser().is_dir() and given.expanduser().resolve() != self.place.resolve()
        if other or (texts and self.unit != "sentences") or (images and not (source and source.kind == LIST)):
            what = "the sentences of " if self.unit == "sentences" else "the pictures of "
            raise UsageError(
                f"the index at {self.store.path} was made from {what}{self.place}: make a second one with --index PATH"
            )
        if images and source:
            from retrieval.sources import named

            place = named(images.expanduser().absolute(), self.root)
            if place != source.images:
                with self.store.write() as writer:
                    writer.note_source(replace(source, images=place, files=()))

    @property
    def unit(self) -> str:
        """What is counted while it is indexed: images or sentences."""
        return "sentences" if self.store.source and self.store.source.kind == TEXTS else "images"

    def counts(self) -> dict[str, int]:
        """How many pictures and how many sentences the index holds."""
        texts = self.store.snapshot.text_count
        return {"pictures": len(self.store) - texts, "texts": texts}

    def below(self, folder: Path) -> str:
        """A folder as the store names it: relative to the root, "" for the root itself and for folders outside it.

        Also "" for the file of a corpus, and always where sentences are indexed, which lie in no folder.
        """
        if self.unit == "sentences" or (self.store.source is not None and not folder.expanduser().is_dir()):
            return ""
        try:
            relative = folder.expanduser().resolve().relative_to(self.root.resolve())
        except ValueError:
            return ""
        return "" if relative == Path() else relative.as_posix()

    # ---- keeping the index current -------------------------------------------------------------------------------

    def pending(self, below: str = "") -> int:
        """How many files an :meth:`index` run would touch now: a look at names, sizes and times only."""
        return self.source.plan(self, below).pending

    @property
    def too_large_to_scan(self) -> bool:
        """Whether there are so many pictures that :meth:`catch_up` does not look for new ones."""
        return len(self.store) > QUICK_SCAN

    def catch_up(self, progress: Progress | None = None) -> int:
        """Take in what changed if that is a matter of a second or two; the number of files left for :meth:`index`.

        A folder of more than ``QUICK_SCAN`` pictures is not even looked through.
        """
        if self.too_large_to_scan:
            return 0
        pending = self.pending()
        if pending > QUICK_FILES:
            return pending
        if pending:
            self.index(progress=progress)
        return 0

    def index(
        self,
        below: str = "",
        *,
        progress: Progress | None = None,
        max_pixels: int | None = None,
        wait: float = 0.0,
        wanted: Wanted | None = None,
    ) -> IndexReport:
        """Take in what was added, changed, renamed or deleted since the last run.

        Args:
            below: only this folder, relative to the root.
            progress: called with (files done, files to do).
            max_pixels: a picture of more is a failure, not a memory problem; None is `retrieval.images.MAX_PIXELS`.
            wait: seconds to wait for another process that is writing.
            wanted: which FAISS index the store is to have from now on; None is what was wanted last, at first one that
                is chosen by size.

        Raises:
            StoreLocked: another process is writing.
            VectorError: FAISS cannot build what is wanted now on so many rows.
            UsageError: the folder is gone; or it is empty, and the index, which lies elsewhere, knows pictures in it.
        """
        from retrieval.images import MAX_PIXELS
        from retrieval.indexing import IndexReport, Run

        with self.store.write(wait=wait) as writer:
            started = time.perf_counter()
            plan = self.source.plan(self, below)
            scan = time.perf_counter() - started
            elsewhere = not self.store.path.is_relative_to(self.root)  # else the drive is there, for the index is
            if elsewhere and plan.missing and not plan.unchanged and not plan.todo and not below:
                raise UsageError(
                    f"{self.root / below} holds no picture any more, but its index knows {len(plan.missing)}: is a "
                    f"drive not mounted? If they are really gone, delete {self.store.path}"
                )
            run = Run(self, writer, plan, max_pixels or MAX_PIXELS, progress)
            counts = run.finish()
            elapsed = time.perf_counter() - started
        if wanted is not None and wanted != self.store.wanted:
            self.build_index(wanted)
        else:
            self.build_stale_index()
        failures = tuple(f for f in self.store.failures() if not below or f.path.startswith(below + "/"))
        return IndexReport(
            **counts, skipped=plan.unchanged, failures=failures, seconds=run.stages(scan), elapsed=elapsed
        )

    def build_index(self, wanted: Wanted | None = None) -> None:
        """Build the FAISS index over all rows, tuned on everyday queries. Raises what Store.rebuild_index does.

        `index` does this by itself when it is worth it.

        Args:
            wanted: a kind, or how to choose one; it is remembered. None is what was wanted last.
        """
        from retrieval.probes import probes

        try:
            queries = probes(self.encoder)
        except DiptychError:  # vectors from elsewhere, whose model is not at hand: stored rows alone are searched with
            queries = {}
        self.store.rebuild_index(wanted, queries)

    def build_stale_index(self) -> None:
        """Build the FAISS index where rows have outgrown it; `index` does this at its end."""
        if self.store.index_is_stale():
            with contextlib.suppress(VectorError):  # too few rows are left for a kind wanted once: search stays exact
                self.build_index()

    def check(self) -> list[str]:
        """Recompute every checksum of the index, and its model's fingerprint; a line for each thing that is wrong."""
        problems = self.store.check()
        verified = self.store.model.fingerprint != UNVERIFIED
        try:
            folder = find_bundle(self.store.model.name) if verified else None
            bundle = Bundle.load(folder) if folder is not None else None
        except ModelError as error:  # what is wrong with the index is told all the same
            return [*problems, f"its model cannot be checked: {error}"]
        if bundle is not None:
            if bundle.compute_fingerprint() != bundle.fingerprint:
                problems.append(f"the model in {folder} is damaged: its files do not fit its fingerprint")
            if bundle.fingerprint != self.store.model.fingerprint:
                problems.append(f"the model in {folder} is not the one that this index was made with")
        return problems

    # ---- searching -----------------------------------------------------------------------------------------------

    def search(
        self,
        query: str | Sequence[Term] | NDArray[np.floating[Any]],
        k: int = 10,
        *,
        below: str = "",
        where: Condition | str | None = None,
        threshold: float = -1.0,
        kind: str | None = None,
        prior: Translator | None = None,
    ) -> Matches:
        """The k pictures (or sentences) nearest to a query, best first.

        They are fewer only if fewer qualify: see ``qualified`` of the result.

        Args:
            query: a sentence, or terms whose weighted sum is searched, or a vector (D,) of the index's model, of any
                length but zero.
            k: how many.
            below: only pictures in this folder, relative to the root.
            where: only pictures that a filter leaves: a pyarrow expression over the columns of the rows and those of
                ``indexes.filters.DERIVED``, or a text as ``indexes.filters.parse`` takes it.
            threshold: only pictures with at least this cosine.
            kind: "image" or "text"; None is pictures, or sentences if the index holds nothing else.
            prior: from sentences to pictures: its share of each sentence's vector is searched with.

        Raises:
            ModelMismatch: the prior is of another model. UsageError: it is given where sentences are sought.
            FilterError: the filter names a column that is not there, compares different types, or cannot be read.
            VectorError: the vector has another width, or is zero, NaN or infinite.
        """
        if kind not in (None, "image", "text"):
            raise ValueError(f"kind is image or text, not {kind!r}")
        if not isinstance(query, np.ndarray):
            query = [Term.parse(query)] if isinstance(query, str) else list(query)
        if prior is not None and self._sought(kind) != prior.target:
            raise UsageError(f"the prior leads to {prior.target} vectors, and {self._sought(kind)} ones are searched")
        mask = self._mask(below, where, kind)
        vector = query if isinstance(query, np.ndarray) else self.query_vector(query, prior)
        qualified = len(self.store) if mask is None else int(np.count_nonzero(mask))
        if k < 1 or not qualified:
            return Matches(qualified=qualified)
        hits = self.store.search(vector[None, :], k, mask)
        found = hits.rows[0][(hits.rows[0] >= 0) & (hits.scores[0] >= threshold)]
        shown = [name for name in self.store.schema.names if name not in _NOT_SHOWN]
        rows = self.store.snapshot.records(found, *shown)
        source = self.source
        return Matches(
            (
                self._match(source, exact_name(fields), float(score), fields)
                for score, fields in zip(hits.scores[0], rows, strict=False)
            ),
            qualified,
        )

    def _mask(self, below: str, where: Condition | str | None, kind: str | None) -> NDArray[np.bool_] | None:
        """Which rows may be found; None: all. Sentences lie in no folder."""
        counts, sought = self.counts(), self._sought(kind)
        inside = None
        if below and sought == "image":
            from indexes import filters

            inside = filters.below(below)
        allowed = [self.store.mask(part) for part in (inside, where) if part is not None]
        if counts["pictures" if sought == "text" else "texts"]:
            allowed.append(self.store.texts() == (sought == "text"))
        return np.logical_and.reduce(allowed) if allowed else None

    def _sought(self, kind: str | None) -> str:
        """What is searched: pictures, where there are any, unless something else is asked for."""
        counts = self.counts()
        return kind or ("text" if counts["texts"] and not counts["pictures"] else "image")

    def _match(self, source: Source, path: str, score: float, fields: Mapping[str, Any]) -> Match:
        own = {name: fields[name] for name in ("width", "height", "taken_at", "id", "kind", "caption")}
        columns = {name: value for name, value in fields.items() if name not in _HIDDEN and value is not None}
        picture = source.picture(path, fields) if fields["kind"] == "image" else None
        file = picture if isinstance(picture, Path) else self.root / path if path else self.place
        return Match(path, score, file, **own, columns=columns, picture=picture)

    def duplicates(
        self,
        grade: Grade | None = None,
        *,
        below: str = "",
        thresholds: Thresholds | None = None,
        progress: Progress | None = None,
    ) -> Duplicates:
        """Groups of pictures that are there more than once. Nothing is changed, and the folder is not scanned for news.

        Args:
            grade: ``same-file`` (equal content), ``re-encoded`` (the same picture again: another format, size or
                quality, or light edits) or ``similar`` (another shot of the scene, or stronger edits). The groups are
                then those of everything linked at this grade or a finer one. None: each picture stands in one group,
                with all that it belongs to at any grade; the group's grade is the finest that holds all of it together.
            below: only pictures in this folder, relative to the root.
            thresholds: from where on pictures count as duplicates; the default is calibrated for the built-in model.
            progress: called with (pictures compared, pictures to compare), then with those whose pixels are looked at.

        Raises:
            UsageError: there is no such grade.
        """
        from retrieval.duplicates import find_duplicates

        return find_duplicates(self, grade, below=below, thresholds=thresholds, progress=progress)

    def query_vector(self, terms: Sequence[Term], prior: Translator | None = None) -> Vectors:
        """(D,) unit vector: the normalised weighted sum of the terms' vectors. UsageError when they cancel out.

        With a prior, that of each sentence has its share of what the prior makes of it.
        """
        if not terms:
            raise UsageError("the query is empty: say what the picture shows")
        total = np.zeros(self.encoder.dim, np.float32)
        texts = [term for term in terms if term.image is None]
        said = self.encoder.encode_texts([term.text for term in texts])
        if prior is not None and texts:
            from retrieval.heads import blended, check_fingerprint

            check_fingerprint("the prior", prior.fingerprint, self.store.model.fingerprint)
            said = blended(prior, said)
        for term, vector in zip(texts, said, strict=True):
            total += term.weight * vector
        for term in terms:
            if term.image is not None:
                total += term.weight * self.encoder.encode_images([_query_image(term.image, self.encoder)])[0]
        length = float(np.linalg.norm(total))
        if length < 1e-6:
            raise UsageError("the parts of the query cancel each other out: change a weight or leave one out")
        unit: Vectors = total / np.float32(length)
        return unit


def _query_image(path: Path, encoder: Encoder) -> Image.Image:
    from retrieval.images import read_photo

    try:
        return read_photo(path.expanduser(), preprocessing=encoder.preprocessing).image
    except ImageError as error:
        raise ImageError(f"{path} cannot be searched with: {error}") from error


def describe(library: Library) -> dict[str, Any]:
    """What an index holds and was made with, in plain values."""
    store = library.store
    failures = [{"path": str(library.root / f.path), "reason": f.reason} for f in store.failures()]
    return {
        "folder": str(library.root),
        **({"source": str(library.place)} if store.source else {}),
        "index": str(store.path),
        **library.counts(),
        "model": store.model.name,
        "fingerprint": store.model.fingerprint,
        "dim": store.model.dim,
        "bytes": sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()),
        "search": _describe_search(store),
        "failures": failures,
    }


def _describe_search(store: Store) -> dict[str, Any]:
    """How it is searched, and what that was measured to find."""
    from indexes.choice import EXACT

    ann, wanted = store.ann, store.wanted
    if ann is None:
        return {"kind": EXACT} if wanted.factory in (None, EXACT) else {"kind": EXACT, "wanted": wanted.factory}
    effort = {"effort": ann.effort} if ann.effort else {}
    measured = asdict(ann.measured) if ann.measured else {}
    return {"kind": ann.factory, "rows": ann.rows, "refine": ann.refine, **effort, **measured}


def find_store(folder: Path) -> Path | None:
    """The store that covers a folder: in it or the nearest folder above, as git looks for ``.git``.

    Of a file or a pattern: the one beside it.
    """
    if not folder.is_dir():
        from retrieval.pair_formats import is_pattern
        from retrieval.sources import store_beside

        if folder.is_file() or is_pattern(folder):
            beside = store_beside(folder)
            return next((store for store in (beside, _outside_store(beside)) if (store / MANIFEST).is_file()), None)
    for place in (folder, *folder.parents):
        for store in (place / STORE_NAME, _outside_store(place)):
            if (store / MANIFEST).is_file():
                return store
    return None


def place_for(folder: Path, index: Path | None, beside: Path | None = None) -> tuple[Path, bool]:
    """Where a new store of a folder goes, and whether that is its own place inside: `beside`, or FOLDER/.diptych."""
    own = folder / STORE_NAME
    inside = index is None and os.access(folder, os.W_OK)
    if inside:
        return beside or own, True
    return (index or _outside_store(folder if beside in (None, own) else beside)).expanduser().absolute(), False


def _outside_store(folder: Path) -> Path:
    """Where the store of a folder that cannot be written to lies: named after the folder, below the data directory."""
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return data_folder() / "indexes" / name
