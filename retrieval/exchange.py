"""Import and export of an index, with what `indexes.exchange` does not know: models, and a look at the pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexes.errors import ModelMismatch
from indexes.exchange import Imported, Progress, Roles, check_free, find_parts, import_parts, mark_of, width_of
from indexes.store import UNVERIFIED, ModelRef, Store
from indexes.vectors import as_vectors
from retrieval.bundle import Bundle
from retrieval.encoders import Encoder, find_bundle, lasting_spec, load_encoder
from retrieval.errors import ImageError, MissingExtra, ModelError, UsageError
from retrieval.images import read_header, read_photo
from retrieval.library import Library, place_for
from retrieval.sources import store_beside

_SAMPLE = 8  # pictures, and texts, that are encoded again
_STRANGER = 0.5  # cosines of one picture under two models lie around 0, under one model in two roundings near 1


@dataclass(frozen=True)
class ImportReport:
    """What an import made.

    Attributes:
        path: the index.
        root: the folder that its paths are relative to.
        model: what made the vectors. Its fingerprint is ``unverified`` if the model was only named.
        rows: what was taken in.
        agreement: the median cosine between a few of the vectors and what the model makes of the same pictures and
            texts now; None where nothing could be compared, or nothing had to be.

    """

    path: Path
    root: Path
    model: ModelRef
    rows: Imported
    agreement: float | None


def import_vectors(
    source: Path,
    *,
    root: Path = Path(),
    index: Path | None = None,
    encoder: Encoder | None = None,
    model: str | None = None,
    unverified: bool = False,
    metadata: Path | None = None,
    kind: str | None = None,
    path_column: str | None = None,
    caption_column: str | None = None,
    hashing: bool = True,
    progress: Progress | None = None,
    **loading: object,
) -> ImportReport:
    """Make an index of a folder from vectors that another tool (or an export) left; no picture is encoded.

    The model is loaded, and a few of the pictures and texts are encoded to see that it did make the vectors. That is
    not needed where an export of Diptych tells the model's fingerprint, nor possible with ``unverified``.

    Args:
        source: clip-retrieval's folder, a .npy file, or a folder that ``export_npy`` wrote.
        root: the folder of the pictures.
        index: where to make the index, if not in ``ROOT/.diptych``.
        encoder: what made the vectors.
        model: the same by its name; neither where the source tells it.
        unverified: the model is not at hand: its name is taken for it. Queries need it under that very name.
        metadata: the table of a .npy file.
        kind: image or text: of a .npy file whose table does not say so.
        path_column: the table's column of paths.
        caption_column: the table's column of captions.
        hashing: read every picture, for its size and date, and for the hash of its content, so that it is known again
            when it is moved.
        progress: called with (rows done, rows to do).
        **loading: device, threads, preprocess: handed to `load_encoder`.

    Raises:
        UsageError: no model is named, or there is no such folder.
        ModelError: there is no such model, or it did not make these vectors.
        ModelMismatch: the export says that another model made them.
        ExchangeError, VectorError, StoreError: as `import_parts` and `find_parts`.

    """
    root = root.expanduser().absolute()
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}: name the one that holds the pictures with --root")
    parts = find_parts(source.expanduser(), metadata and metadata.expanduser(), kind)
    mark = mark_of(parts)
    path, inside = place_for(root, index, store_beside(root / mark.source.path) if mark and mark.source else None)
    check_free(path)
    told = mark.model if mark else None
    made, encoder = _model(told, encoder or model, unverified, loading, width_of(parts))
    agreement: float | None = None

    def check(store: Store) -> None:
        nonlocal agreement
        if encoder is not None:
            agreement = _agreement(store, encoder)
        if agreement is not None and agreement < _STRANGER:
            raise ModelError(
                f"{made.name} did not make the vectors in {source}: pictures that it encodes now have a cosine of "
                f"{agreement:.2f} (median) with what is stored of them; name the right one with --model"
            )

    rows = import_parts(
        parts,
        path,
        root,
        made,
        inside=inside,
        roles=Roles(path_column, caption_column),
        hashing=hashing,
        look=read_header,
        check=check,
        progress=progress,
    )
    Library(Store.open(path), encoder, **loading).build_stale_index()
    return ImportReport(path, root, made, rows, agreement)


def _model(
    told: ModelRef | None, given: Encoder | str | None, unverified: bool, loading: dict[str, object], dim: int
) -> tuple[ModelRef, Encoder | None]:
    """What made the vectors, and the encoder that is to be tried on them, if any."""
    if given is None:
        if told is None or unverified:
            raise UsageError(
                "name the model that made the vectors with --model (builtin, NAME, ARCHITECTURE/PRETRAINED)"
            )
        return told, None
    if not isinstance(given, str):
        return _compared(told, ModelRef(given.name, given.fingerprint, given.dim), given)
    name = lasting_spec(given)
    if unverified:
        return ModelRef(name, UNVERIFIED, dim), None
    try:
        folder = find_bundle(given)
        if (
            folder is not None and told is not None and told.fingerprint != UNVERIFIED
        ):  # which tells its fingerprint without being loaded
            bundle = Bundle.load(folder)
            return _compared(told, ModelRef(name, bundle.fingerprint, bundle.dim), None)
        encoder = load_encoder(given, **loading)  # type: ignore[arg-type]
    except (ModelError, MissingExtra) as error:
        raise ModelError(f"{error}. If it made the vectors but is not at hand, add --unverified") from error
    return _compared(told, ModelRef(name, encoder.fingerprint, encoder.dim), encoder)


def _compared(told: ModelRef | None, made: ModelRef, encoder: Encoder | None) -> tuple[ModelRef, Encoder | None]:
    """Set a model against what the tables tell. Raises ModelMismatch."""
    if told is None or told.fingerprint == UNVERIFIED:
        return made, encoder
    if told.fingerprint != made.fingerprint:
        raise ModelMismatch(f"the vectors were made with {told.name}, not with {made.name}: leave out --model")
    return made, None


def _agreement(store: Store, encoder: Encoder) -> float | None:
    """The median cosine between stored vectors and what the model makes now of the same few pictures and texts."""
    rows = store.rows()
    is_text = np.array([kind == "text" for kind in rows["kind"].to_pylist()], bool)
    there = rows["size"].to_numpy() > 0
    found: list[float] = []
    images, positions = [], []
    for position in _few(np.flatnonzero(~is_text & there)):
        try:
            photo = read_photo(store.root / store.paths()[position], preprocessing=encoder.preprocessing)
            images.append(photo.image)
            positions.append(position)
        except (ImageError, OSError):
            continue
    if images:
        found += _cosines(store, positions, encoder.encode_images(images))
    captioned = _few(np.flatnonzero(is_text & rows["caption"].is_valid().to_numpy()))
    if captioned:
        sentences = [rows["caption"][position].as_py() for position in captioned]
        found += _cosines(store, captioned, encoder.encode_texts(sentences))
    return float(np.median(found)) if found else None


def _few(positions: NDArray[np.int64]) -> list[int]:
    """Some of them, spread evenly."""
    if len(positions) > _SAMPLE:
        positions = positions[np.linspace(0, len(positions) - 1, _SAMPLE).astype(int)]
    return [int(position) for position in positions]


def _cosines(store: Store, positions: list[int], vectors: NDArray[np.float32]) -> list[float]:
    stored = as_vectors(np.stack([store.snapshot.halves(position) for position in positions]))
    return [float(cosine) for cosine in (stored * vectors).sum(axis=1)]
