"""A bundle: a folder that is a model.

    model.json       what it is called, how pictures are prepared, the fingerprint, licence and training record
    image.onnx       pixels uint8 (B, H, W, 3) -> embedding float32 (B, D)
    text.onnx        ids int64 (B, L) -> embedding float32 (B, D)
    tokenizer.json   a `tokenizers` file; its truncation and padding settings are the model's

The fingerprint is a SHA-256 over what decides a vector: both graphs with their weights, the tokenizer and the
preprocessing. A licence line in model.json, or a file laid beside the model, leaves it alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from retrieval.errors import ModelError
from retrieval.preprocessing import Preprocessing

FORMAT = 1
MODEL_FILE, IMAGE_FILE, TEXT_FILE, TOKENIZER_FILE = "model.json", "image.onnx", "text.onnx", "tokenizer.json"
FILES = (MODEL_FILE, IMAGE_FILE, TEXT_FILE, TOKENIZER_FILE)


@dataclass(frozen=True)
class Bundle:
    """What model.json says, and the folder it lies in.

    ``score_scale`` turns a cosine into the logit the model was trained with; ``source`` names the towers, so that
    training can rebuild them in torch; ``training`` is the record of data, commands and scores.
    """

    path: Path
    name: str
    dim: int
    preprocessing: Preprocessing
    context_length: int
    score_scale: float
    fingerprint: str = ""
    precision: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""
    source: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read a bundle folder's model.json. ModelError names what is missing or wrong."""
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder} is not a complete model: {', '.join(missing)} missing")
        file = folder / MODEL_FILE
        try:
            fields = json.loads(file.read_text("utf-8"))
            if fields["format"] > FORMAT:
                raise ModelError(
                    f"it has format {fields['format']}, this release reads up to {FORMAT}: upgrade diptych"
                )
            bundle = cls(
                path=folder,
                name=str(fields["name"]),
                dim=int(fields["dim"]),
                preprocessing=Preprocessing.from_json(fields["preprocessing"]),
                context_length=int(fields["context_length"]),
                score_scale=float(fields["score_scale"]),
                fingerprint=str(fields["fingerprint"]),
                precision=dict(fields.get("precision", {})),
                licence=str(fields.get("licence", "")),
                source=dict(fields.get("source", {})),
                training=dict(fields.get("training", {})),
            )
            if min(bundle.dim, bundle.context_length) < 1:
                raise ValueError("a number is not what it should be")
        except ModelError as error:
            raise ModelError(f"{file}: {error}") from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelError(f"{file} cannot be read as a model description: {error!r}") from error
        return bundle

    def compute_fingerprint(self) -> str:
        """SHA-256, in hex, over the files and fields that decide a vector, as they are on disk now."""
        digest = hashlib.sha256()
        for name in (IMAGE_FILE, TEXT_FILE, TOKENIZER_FILE):
            digest.update(hashlib.sha256((self.path / name).read_bytes()).digest())
        digest.update(json.dumps(self.preprocessing.to_json(), sort_keys=True).encode())
        return digest.hexdigest()

    def save(self) -> Bundle:
        """Write model.json beside the three other files, with the fingerprint computed anew, and return that bundle."""
        sealed = replace(self, fingerprint=self.compute_fingerprint())
        fields = {
            "format": FORMAT,
            "name": sealed.name,
            "dim": sealed.dim,
            "preprocessing": sealed.preprocessing.to_json(),
            "context_length": sealed.context_length,
            "score_scale": sealed.score_scale,
            "precision": dict(sealed.precision),
            "fingerprint": sealed.fingerprint,
            "licence": sealed.licence,
            "source": dict(sealed.source),
            "training": dict(sealed.training),
        }
        (self.path / MODEL_FILE).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return sealed

    def copy_to(self, folder: Path) -> Bundle:
        """Copy the bundle's own files into a new folder, whole or not at all."""
        with new_folder(folder) as staging:
            for name in FILES:
                shutil.copyfile(self.path / name, staging / name)
        return replace(self, path=folder)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which is there under its own name when all went well, and not at all otherwise."""
    if folder.exists():
        raise ModelError(f"{folder} exists already: choose another name or remove it first")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            staging = Path(scratch) / folder.name
            staging.mkdir()
            yield staging
            staging.rename(folder)
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error.strerror or error}") from error


def is_bundle(folder: Path) -> bool:
    """Whether a folder says of itself that it is a bundle."""
    return (folder / MODEL_FILE).is_file() and (folder / IMAGE_FILE).is_file()
