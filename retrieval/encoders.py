"""What an encoder is, and the one door through which every model is loaded."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol

from indexes.vectors import Vectors
from retrieval.bundle import FILES, MODEL_FILE, Bundle, is_bundle
from retrieval.errors import MissingExtra, ModelError
from retrieval.onnx_encoder import OnnxEncoder
from retrieval.sessions import RunPrecision

if TYPE_CHECKING:
    from PIL import Image

    from retrieval.images import Preprocessing
    from retrieval.pairs import Record

BUILTIN = "builtin"
Precision = Literal["fp32", "fp16"]  # of weights as training and torch write them; `conversion` knows int8 as well
_BUILTIN_FOLDER = Path(__file__).parent / "models" / BUILTIN
_CHECKPOINT_SUFFIXES = {".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".npz"}


class Encoder(Protocol):
    """A model that puts pictures and sentences into one space.

    ``fingerprint`` changes whenever a vector would; two encoders with the same one are interchangeable. An encoder may
    say with ``batch_size`` how many pictures at a time keep it busy; whoever has many hands them over like that.
    """

    name: str
    fingerprint: str
    dim: int
    preprocessing: Preprocessing
    score_scale: float

    def encode_images(self, images: Sequence[Image.Image]) -> Vectors:
        """Pictures -> (N, D) unit rows. Prepares them itself; one already of the model's size stays as it is."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Vectors:
        """Sentences -> (N, D) unit rows."""
        ...


def load_encoder(
    spec: str = BUILTIN,
    *,
    device: str = "cpu",
    threads: int | None = None,
    preprocess: str | None = None,
    precision: RunPrecision = "auto",
) -> Encoder:
    """Load a model by the name a user types.

    Args:
        spec: ``builtin`` | the name of an imported model | a folder (bundle or training run) | ``NAME/PRETRAINED`` of
            open_clip | ``hf-hub:org/name`` | ``local-dir:/path`` | ``NAME//path/to/checkpoint`` with ``preprocess``.
        device: ``cpu``, ``cuda``, … Bundles run on the CPU only; open_clip models anywhere that torch does.
        threads: of the model; as many as the process may use when None.
        preprocess: only for a bare checkpoint file, which does not say how its pictures were prepared:
            the open_clip tag it was trained like (``openai``), or a JSON file as in a bundle's ``preprocessing``.
        precision: the arithmetic: ``fp32``, ``bf16``, or ``auto``, the fastest that the processor has. Of a bundle it
            is that of the image tower, whose weights must not be in int8: those are computed as they are.

    Raises:
        ModelError: no such model, or it cannot be used.
        MissingExtra: the model needs torch and open_clip, which are not installed.
    """
    folder = find_bundle(spec)
    if folder is not None:
        if device not in ("cpu", "auto"):
            raise ModelError(f"{spec} is an ONNX bundle and runs on the CPU: leave out --device {device}")
        if preprocess is not None:
            raise ModelError(f"{spec} says itself how to prepare pictures: leave out --preprocess")
        encoder = OnnxEncoder(Bundle.load(folder), threads, precision)
        if precision != "auto":
            _ = encoder.precision  # raises now, not at the first picture
        return encoder
    torch_encoder = _torch_encoder(spec)
    loaded: Encoder = torch_encoder.load(
        spec, device=device, threads=threads, preprocess=preprocess, precision=precision
    )
    return loaded


def device_beside(device: str) -> str:
    """Where an encoder runs beside what learns on a device: bundles, which run on the CPU in any case, then fit too."""
    return "cpu" if device == "cpu" else "auto"


def lasting_spec(spec: str) -> str:
    """The spec as it can be written down: a folder's path made absolute, everything else as it is."""
    prefix = "local-dir:" if spec.startswith("local-dir:") else ""
    path = Path(spec.removeprefix(prefix)).expanduser()
    return f"{prefix}{path.absolute()}" if prefix or (spec and spec != BUILTIN and path.is_dir()) else spec


def find_bundle(spec: str) -> Path | None:
    """Find the bundle folder that a spec names: None when it names a model for torch, ModelError when nothing."""
    if spec == BUILTIN:
        return _BUILTIN_FOLDER
    if spec.startswith("hf-hub:"):
        return _fetch_bundle(spec.removeprefix("hf-hub:"))
    path = Path(spec.removeprefix("local-dir:")).expanduser()
    if (spec and path.is_dir()) or spec.startswith("local-dir:"):
        if not path.is_dir():
            raise ModelError(f"{path} is not a folder")
        if is_bundle(path):
            return path
        if spec.startswith("local-dir:"):
            return None
        raise ModelError(
            f"{path} holds no model: a bundle has {', '.join(FILES)}; for an open_clip folder write local-dir:{spec}"
        )
    written_as_path = spec.startswith(("/", "./", "../", "~"))
    if "//" not in spec or written_as_path:
        _refuse_file(path, written_as_path)
    imported = models_folder() / spec
    if "/" not in spec and spec and is_bundle(imported):
        return imported
    if "/" in spec:
        return None
    known = [BUILTIN, *list_imported()]
    import difflib

    close = difflib.get_close_matches(spec, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}."
    raise ModelError(f"no model is called {spec!r}; {hint} open_clip models are named ARCHITECTURE/PRETRAINED")


def _refuse_file(path: Path, must_exist: bool) -> None:
    if path.is_file():
        raise ModelError(
            f"{path} is a bare checkpoint: it does not say its architecture, nor how its pictures were prepared. "
            f"Name both: --model ARCHITECTURE/{path.absolute()} --preprocess openai (or another open_clip tag)"
        )
    if must_exist or path.suffix.lower() in _CHECKPOINT_SUFFIXES:
        raise ModelError(f"{path} does not exist")


def data_folder() -> Path:
    """Where what belongs to no folder of photos is kept: ``$XDG_DATA_HOME/diptych``."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "diptych"


def models_folder() -> Path:
    """Where imported bundles live."""
    return data_folder() / "models"


def list_imported() -> list[str]:
    """Names of the imported bundles."""
    folder = models_folder()
    return sorted(path.name for path in folder.iterdir() if is_bundle(path)) if folder.is_dir() else []


def import_bundle(source: str, name: str | None = None) -> tuple[str, Path]:
    """Copy a bundle into the data directory. Returns the name to load it by, and its folder."""
    folder = find_bundle(source)
    if folder is None:
        raise ModelError(f"{source} is not a bundle: write one with  diptych models export {source} FOLDER")
    bundle = Bundle.load(folder)
    name = name or bundle.name
    if name == BUILTIN or not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise ModelError(f"{name!r} cannot be a model's name: letters, digits, dots, dashes; give another with --name")
    return name, bundle.copy_to(models_folder() / name).path


def export_bundle(
    spec: str,
    folder: Path,
    precision: str | None = None,
    preprocess: str | None = None,
    calibrate: Sequence[Record] = (),
) -> Bundle:
    """Write any model as a bundle into a new folder.

    Args:
        spec: the model, as for :func:`load_encoder`.
        folder: where to.
        precision: fp32, fp16 or int8, of both towers or of each: ``int8/fp16`` (pictures first). None leaves a
            bundle as it is; of other models it is fp32.
        preprocess: as for :func:`load_encoder`.
        calibrate: captioned photos, for int8; see :func:`retrieval.conversion.convert`.
    """
    towers = stored_precision(precision) if precision else None
    found = find_bundle(spec)
    if found is not None:
        bundle = Bundle.load(found)
        if towers is None or dict(bundle.precision) == towers:
            return bundle.copy_to(folder)
        from retrieval.conversion import convert

        return convert(bundle, folder, towers, calibrate)
    encoder = _torch_encoder(spec).load(spec, preprocess=preprocess, precision="fp32")
    from retrieval.conversion import convert
    from retrieval.training.export import export_open_clip

    if towers is None or towers == {"image": "fp32", "text": "fp32"}:
        return export_open_clip(encoder, folder)
    with tempfile.TemporaryDirectory() as scratch:
        return convert(export_open_clip(encoder, Path(scratch) / folder.name), folder, towers, calibrate)


def stored_precision(text: str) -> dict[str, str]:
    """``int8``, or ``fp16/int8`` -> the precision of each tower's weights. ModelError when it is none."""
    image, _, text_tower = text.partition("/")
    towers = {"image": image, "text": text_tower or image}
    if not {*towers.values()} <= {"fp32", "fp16", "int8"}:
        raise ModelError(f"{text!r} is no precision: fp32, fp16 or int8, or two of them as image/text: int8/fp16")
    return towers


def _fetch_bundle(repository: str) -> Path | None:
    """Download (or find in the cache) a hub repository that holds a bundle; None if it holds something else."""
    from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(repository, MODEL_FILE)
        folder = Path(snapshot_download(repository, allow_patterns=list(FILES)))
        return folder if is_bundle(folder) else None  # others too may call a file model.json
    except LocalEntryNotFoundError as error:  # the cache may still hold a model for open_clip
        if isinstance(try_to_load_from_cache(repository, "open_clip_config.json"), str):
            return None
        raise not_downloaded(f"hf-hub:{repository}") from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"hf-hub:{repository} cannot be fetched: {str(error).splitlines()[0]}") from error


def not_downloaded(spec: str) -> ModelError:
    """Say in an error that a model is not in the cache and the hub cannot, or must not, be asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return ModelError(f"{spec} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids a download: unset it")
    return ModelError(
        f"{spec} cannot be downloaded, {constants.ENDPOINT} does not answer: "
        "go online once, or copy its folder here and name it local-dir:/path"
    )


def _torch_encoder(spec: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module("retrieval.torch_encoder")
    except ImportError as error:
        if (error.name or "").split(".")[0] in {"torch", "torchvision", "open_clip"}:
            raise MissingExtra(f"the model {spec}", "'diptych[torch]'") from error
        raise
    except RuntimeError as error:  # a torchvision built for another torch fails like this as it is imported
        if "torchvision" not in str(error):
            raise
        raise ModelError(
            f"torch and torchvision do not fit together ({str(error).splitlines()[0]}), so {spec} cannot be loaded: "
            "pip install --force-reinstall torch torchvision, both from the same index"
        ) from error
