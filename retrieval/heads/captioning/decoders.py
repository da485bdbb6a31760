"""Decoders as they are used and kept, without torch: a folder with a card, and what the card's kind needs.

- decoder.json: the card, with the kind, name, fingerprint of the encoder, licence, settings and training record
- decoder.onnx: of a transformer, what comes next, with a cache of keys and values
- tokenizer.json: of a transformer, its pieces of words
- captions.npz: of a consensus, captions with their vectors, as arrays
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from indexes.vectors import Vectors, as_vectors, check_width, exact_search
from retrieval.bundle import new_folder
from retrieval.embedding import Progress
from retrieval.encoders import find_bundle
from retrieval.errors import ModelError
from retrieval.heads import check_fingerprint
from retrieval.heads.captioning.search import Past, search
from retrieval.heads.captioning.words import END, UNKNOWN, Words
from retrieval.sessions import OnnxRuntimeSession

FORMAT = 1
CARD, GRAPH, PIECES, MEMORY = "decoder.json", "decoder.onnx", "tokenizer.json", "captions.npz"
FOLDER = "decoder"  # beside a bundle's own files: the decoder that is meant when none is named
_BATCH = 64  # vectors at a time
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Card:
    """What decoder.json says. ``settings`` are how it is used, ``training`` is the record of data and scores."""

    kind: str
    name: str
    fingerprint: str  # of the encoder whose vectors it learnt from
    encoder: str  # how that is loaded
    dim: int
    licence: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Card:
        """Read it. ModelError when there is none, or it is damaged, or of a newer release."""
        file = folder / CARD
        if not file.is_file():
            raise ModelError(f"{folder} holds no decoder: it has no {CARD}; make one with  diptych caption fit")
        try:
            fields = json.loads(file.read_text("utf-8"))
            if fields.pop("format") > FORMAT:
                raise ModelError(f"{file} is of a newer release, this one reads up to format {FORMAT}: upgrade")
            card = cls(**fields)
            if card.kind not in KINDS or not isinstance(card.dim, int) or card.dim < 1:
                raise ValueError("a field is not what it should be")
        except (OSError, *_DAMAGED) as error:
            raise ModelError(f"{file} cannot be read as a decoder's card: {error}") from error
        return card

    def to_json(self) -> str:
        """The text of decoder.json."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"


class CaptionDecoder(Protocol):
    """A :class:`retrieval.heads.Decoder` with its card."""

    card: Card

    @property
    def fingerprint(self) -> str:
        """Of the encoder."""
        ...

    def decode(self, images: Vectors, beams: int | None = None) -> list[str]:
        """(N, D) unit rows -> one caption for each; ``beams`` are the card's unless they are given."""
        ...


class TransformerDecoder:
    """Goes on, piece by piece, from a prefix that is made of the vector."""

    def __init__(self, card: Card, words: Words, session: OnnxRuntimeSession) -> None:
        self.card, self.words, self._session = card, words, session
        shape = card.settings["past"]
        self._shape = tuple(int(shape[name]) for name in ("layers", "heads", "width"))
        self._length = int(card.settings["length"])
        self._beams, self._penalty = int(card.settings["beams"]), float(card.settings["length_penalty"])
        if min(*self._shape, self._length, self._beams) < 1 or not self._penalty >= 0:
            raise ValueError("a setting is not what it should be")

    @classmethod
    def load(cls, folder: Path, card: Card, threads: int) -> TransformerDecoder:
        """Read the graph and the pieces."""
        return cls(card, Words.load(folder / PIECES), OnnxRuntimeSession(folder / GRAPH, threads))

    @property
    def fingerprint(self) -> str:
        """Of the encoder."""
        return self.card.fingerprint

    def decode(self, images: Vectors, beams: int | None = None) -> list[str]:
        """See :class:`CaptionDecoder`."""
        said = search(
            self,
            images,
            beams=beams or self._beams,
            length=self._length,
            end=END,
            banned=(UNKNOWN,),
            penalty=self._penalty,
        )
        return self.words.decode(said)

    def begin(self, vectors: Vectors) -> tuple[NDArray[np.float32], Past]:
        """See :class:`retrieval.heads.captioning.search.Stepper`."""
        layers, heads, width = self._shape
        none = np.empty((len(vectors), 0), np.int64)
        return self._run(vectors[:, None], none, np.empty((layers, len(vectors), heads, 0, width), np.float32))

    def go_on(self, pieces: NDArray[np.int64], past: Past) -> tuple[NDArray[np.float32], Past]:
        """See :class:`retrieval.heads.captioning.search.Stepper`."""
        return self._run(np.empty((len(pieces), 0, self.card.dim), np.float32), pieces[:, None], past)

    def _run(self, vectors: Vectors, pieces: NDArray[np.int64], past: Past) -> tuple[NDArray[np.float32], Past]:
        scores, present = self._session.compute({"vectors": vectors, "pieces": pieces, "past": past})
        return scores, present


class ConsensusDecoder:
    """Of the captions nearest to the picture, the one that is nearest to the others (Devlin et al. 2015).

    There it is the nearest pictures' captions, compared by their words (arXiv:1505.04467); in a shared space the
    captions themselves can be looked for, and compared.
    """

    def __init__(self, card: Card, vectors: Vectors, captions: Sequence[str]) -> None:
        self.card, self.vectors, self.captions = card, vectors, captions
        self._neighbours = int(card.settings["neighbours"])
        if vectors.shape != (len(captions), card.dim) or not len(captions) or self._neighbours < 1:
            raise ValueError("its captions and vectors do not fit each other")

    @classmethod
    def load(cls, folder: Path, card: Card, threads: int) -> ConsensusDecoder:  # noqa: ARG003 - numpy's own
        """Read captions and vectors."""
        with np.load(folder / MEMORY, allow_pickle=False) as stored:
            texts = stored["captions"].tobytes().decode("utf-8").split("\n")
            return cls(card, as_vectors(stored["vectors"]), texts)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What :meth:`load` reads from captions.npz."""
        text = np.frombuffer("\n".join(self.captions).encode("utf-8"), np.uint8)
        return {"captions": text, "vectors": self.vectors.astype(np.float16)}

    @property
    def fingerprint(self) -> str:
        """Of the encoder."""
        return self.card.fingerprint

    def decode(self, images: Vectors, beams: int | None = None) -> list[str]:  # noqa: ARG002 - nothing is searched for
        """See :class:`CaptionDecoder`."""
        if not len(images):
            return []
        hits = exact_search(self.vectors, images, min(self._neighbours, len(self.captions)))
        said = []
        for rows in hits.rows:
            near = self.vectors[rows]  # (K, D), the nearest first, which wins where several are as good
            said.append(self.captions[rows[int((near @ near.sum(0)).argmax())]])
        return said


Loader = Callable[[Path, Card, int], CaptionDecoder]
KINDS: Mapping[str, Loader] = {"transformer": TransformerDecoder.load, "consensus": ConsensusDecoder.load}


def load_decoder(folder: Path, fingerprint: str | None = None, threads: int = 1) -> CaptionDecoder:
    """Read a decoder of any kind.

    Args:
        folder: with its card.
        fingerprint: of the encoder that it is to be used with.
        threads: of its arithmetic.

    Raises:
        ModelError: there is none, or it is damaged.
        ModelMismatch: it is of another encoder.
    """
    card = Card.load(folder)
    if fingerprint is not None:
        check_fingerprint(f"the decoder in {folder}", card.fingerprint, fingerprint)
    try:
        found = KINDS[card.kind](folder, card, threads)
        unit = np.zeros((1, card.dim), np.float32)
        unit[0, 0] = 1
        found.decode(unit, 1)  # parts that do not fit each other show themselves
    except (OSError, *_DAMAGED) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{folder} cannot be read as a decoder: {reason}") from error
    return found


def decoder_of(model: str) -> Path:
    """The decoder that comes with a model. ModelError when none does."""
    bundle = find_bundle(model)
    if bundle is None or not (bundle / FOLDER / CARD).is_file():
        raise ModelError(
            f"no decoder comes with {model}: make one with  diptych caption fit, and name it with --decoder"
        )
    return bundle / FOLDER


def decode_all(
    decoder: CaptionDecoder, images: Vectors, beams: int | None = None, progress: Progress | None = None
) -> list[str]:
    """Captions of any number of vectors (N, D) of any length but zero, a batch at a time.

    Raises:
        VectorError: they have another width, or are zero, NaN or infinite.
    """
    check_width(images, decoder.card.dim)
    unit = as_vectors(images)
    said: list[str] = []
    for begin in range(0, len(unit), _BATCH):
        said += decoder.decode(unit[begin : begin + _BATCH], beams)
        if progress:
            progress(len(said), len(unit))
    return said


@contextmanager
def new_decoder(folder: Path, card: Card) -> Iterator[Path]:
    """A folder with the card in it, to put the rest into; there under its name when all went well. ModelError else."""
    with new_folder(folder) as staging:
        (staging / CARD).write_text(card.to_json(), "utf-8")
        yield staging
