"""The encoder over torch: every model that open_clip knows, on any device."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import json
import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import open_clip
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor

from indexes.runtime import thread_count
from indexes.vectors import Vectors, as_vectors
from retrieval.encoders import not_downloaded
from retrieval.errors import DiptychError, MissingExtra, ModelError
from retrieval.images import Preprocessing
from retrieval.sessions import RunPrecision, multiplies_in_bf16
from retrieval.training.export import NormalisedTower, any_length_text, bound_tower
from retrieval.training.tokenizer_json import identity

# How many at a time. A processor's core gains nothing above 8, measured. A GPU's number keeps thousands of multipliers
# at work, and is small beside its memory.
_BATCH: Mapping[str, int] = {"cpu": 8, "mps": 32, "cuda": 256}
_IN_FLIGHT = 2  # batches in each lane: one computes while the next is prepared and copied


class TorchEncoder:
    """Pictures and sentences to unit vectors with an open_clip model.

    Attributes beyond those of an Encoder: ``model`` and ``tokenizer`` are open_clip's own, the model in the precision
    and on the (first) device that it computes with; ``architecture`` is its configuration as open_clip writes it;
    ``precision`` is the arithmetic's, "fp32" or "bf16"; ``batch_size`` is how many pictures keep all devices busy.

    The fingerprint is that of the weights as they were given. The arithmetic is no part of it: cosines between vectors
    of the same picture in bf16 and fp32 are about 0.999.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        preprocessing: Preprocessing,
        *,
        name: str,
        architecture: Mapping[str, Any],
        devices: Sequence[torch.device] = (torch.device("cpu"),),
        threads: int | None = None,
        precision: RunPrecision = "auto",
    ) -> None:
        """Take a model in fp32 on the CPU over: it is moved and cast in place, and copied for further devices."""
        self.tokenizer, self.architecture = tokenizer, architecture
        self.name, self.preprocessing = name, preprocessing
        self.dim = int(architecture["embed_dim"])
        self.score_scale = float(model.logit_scale.exp())
        self.fingerprint = _fingerprint(model, tokenizer, preprocessing, architecture)
        bf16 = precision == "bf16" or (precision == "auto" and all(map(_computes_bf16, devices)))
        self.precision = "bf16" if bf16 else "fp32"
        models = [model.eval(), *(copy.deepcopy(model) for _ in devices[1:])]
        dtype = torch.bfloat16 if bf16 else torch.float32
        lanes = threads or thread_count()
        self._replicas = [_Replica(*pair, preprocessing, dtype, lanes) for pair in zip(models, devices, strict=True)]
        self.model = self._replicas[0].model
        self._padding = int(tokenizer([""])[0, -1]) if any_length_text(model) else None
        self.batch_size = sum(replica.lanes * replica.batch for replica in self._replicas)

    def encode_images(self, images: Sequence[Image.Image]) -> Vectors:
        """Pictures of any size and mode -> (N, D) unit rows."""
        return self._encode(
            images,
            lambda part: torch.from_numpy(self.preprocessing.pixels(part)),
            lambda replica: replica.image_tower,
        )

    def encode_texts(self, texts: Sequence[str]) -> Vectors:
        """Sentences -> (N, D) unit rows. What is longer than the context length is cut off."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together: little padding
        rows = self._encode([texts[i] for i in order], self._tokens, lambda replica: replica.encode_text)
        unsorted = np.empty_like(rows)
        unsorted[order] = rows
        return unsorted

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        """Sentences -> ids (B, L), without the columns of mere padding where the tower does not need them."""
        ids: Tensor = self.tokenizer(list(texts))
        if self._padding is None:
            return ids
        used = (ids != self._padding).any(0).nonzero()
        return (
            ids[:, : int(used.max()) + 2] if len(used) else ids
        )  # one more: some models end a text with their padding

    def _encode(
        self, items: Sequence[Any], prepare: Callable[[Sequence[Any]], Tensor], tower: Callable[[_Replica], _Tower]
    ) -> Vectors:
        """Batches to the devices in turn, results back in order: what is prepared next never waits for a device."""
        waiting: deque[Callable[[], Tensor]] = deque()
        rows: list[Tensor] = []
        lanes = sum(replica.lanes for replica in self._replicas)
        # Few items are shared out as well, but not one by one: a batch of two takes hardly longer than one of one.
        step = min(min(replica.batch for replica in self._replicas), max(2, -(-len(items) // lanes)))
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            for replica in self._replicas:
                stack.enter_context(replica.working(len(items) > step))
            for start, replica in zip(range(0, len(items), step), cycle(self._replicas)):
                waiting.append(replica.start(tower(replica), prepare(items[start : start + step])))
                if len(waiting) == _IN_FLIGHT * lanes:
                    rows.append(waiting.popleft()())
            rows += [result() for result in waiting]
        return as_vectors(torch.cat(rows).numpy()) if rows else torch.empty((0, self.dim)).numpy()


_Tower = Callable[[Tensor], Tensor]


class _Replica:
    """The model on one device, and the way there and back.

    A processor computes several batches side by side, in ``lanes``, each on one thread: threads that share one batch
    wait for each other at every layer, and the more so the more else there is to do. Measured on two cores, ViT-B-32 in
    bf16 beside other work: 24 ms of processor time a picture and not 34, 1.4 times the pictures a second.
    """

    def __init__(
        self, model: Any, device: torch.device, preprocessing: Preprocessing, dtype: torch.dtype, lanes: int
    ) -> None:
        self.model, self.device = model.to(device, dtype), device
        self.batch, self.lanes = _BATCH.get(device.type, 32), lanes if device.type == "cpu" else 1
        if device.type == "cuda":  # pixels come as (B, H, W, C), which its convolutions want; on CPUs nothing is gained
            model.to(memory_format=torch.channels_last)
        tower = bound_tower(model, lambda pixels: model.encode_image(pixels.to(dtype)))
        self.image_tower = NormalisedTower(tower, preprocessing).to(device)
        self.encode_text: _Tower = any_length_text(model) or model.encode_text
        self._copying: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pool: ThreadPoolExecutor | None = None

    @contextmanager
    def working(self, several: bool) -> Iterator[None]:
        """Open the lanes, if there are several batches; torch's number of threads is the process's, and put back."""
        if self.device.type != "cpu":
            yield
            return
        before = torch.get_num_threads()
        side_by_side = several and self.lanes > 1
        torch.set_num_threads(1 if side_by_side else self.lanes)
        try:
            if not side_by_side:
                yield
                return
            with ThreadPoolExecutor(self.lanes, "encode", initializer=partial(torch.set_num_threads, 1)) as self._pool:
                yield
        finally:
            self._pool = None
            torch.set_num_threads(before)

    def start(self, tower: _Tower, batch: Tensor) -> Callable[[], Tensor]:
        """Begin to compute tower(batch); what is returned waits for the result, (B, D) float32 on the CPU."""
        if self._pool is not None:
            return self._pool.submit(self._compute, tower, batch).result
        if self._copying is None:
            rows = self._compute(tower, batch)
            return lambda: rows
        with torch.cuda.device(self.device):
            computing = torch.cuda.current_stream()
            with torch.cuda.stream(self._copying):  # goes on while the batch before is computed
                there = batch.pin_memory().to(self.device, non_blocking=True)
            computing.wait_stream(self._copying)
            there.record_stream(computing)
            back = tower(there).float().to("cpu", non_blocking=True)
            done = computing.record_event()

        def result() -> Tensor:
            done.synchronize()
            return back

        return result

    def _compute(self, tower: _Tower, batch: Tensor) -> Tensor:
        with torch.inference_mode():  # which counts for one thread only
            return tower(batch.to(self.device)).float().cpu()


def _computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there. On CPUs, measured: 3.6 times on ViT-B-32 with avx512_bf16."""
    if device.type == "cuda":
        return bool(torch.cuda.get_device_capability(device) >= (8, 0))  # Ampere; before, it is emulated
    return device.type == "cpu" and multiplies_in_bf16()


def load(
    spec: str,
    *,
    device: str = "cpu",
    threads: int | None = None,
    preprocess: str | None = None,
    precision: RunPrecision = "auto",
) -> TorchEncoder:
    """Load an open_clip model; the arguments are those of :func:`retrieval.encoders.load_encoder`.

    Args:
        spec: which model.
        device: one, or several with commas between them (``cuda:0,cuda:1``), which share the batches; ``auto`` is a
            GPU where there is one.
        threads: of the model on the CPU.
        preprocess: for a bare checkpoint.
        precision: of the arithmetic, and of ``model``: fp32 for whoever goes on with its weights. ``auto`` is bf16
            where all devices are fast at it.

    Raises:
        ModelError: no such architecture or weights, no connection, weights of another architecture, pickled objects.
        MissingExtra: its text tower or tokenizer needs transformers.
    """
    name, weights = _parse(spec, preprocess)
    try:
        with _quiet(), _weights_only():
            devices = [_device(one.strip()) for one in device.split(",")]
            model, architecture = _create(name, weights)
            tokenizer = open_clip.get_tokenizer(name)
            return TorchEncoder(
                model,
                tokenizer,
                _preprocessing(model, name, preprocess),
                name=spec,
                architecture=architecture,
                devices=devices,
                threads=threads,
                precision=precision,
            )
    except DiptychError:
        raise
    except ImportError as error:
        raise MissingExtra(f"the model {spec}", error.name or "transformers") from error
    except Exception as error:  # open_clip, torch, safetensors, transformers and the hub client each have their own
        raise _explained(spec, error) from error


def _parse(spec: str, preprocess: str | None) -> tuple[str, str | None]:
    """Bring a spec to open_clip's terms: the name of a model, and the tag or checkpoint file of its weights, if any."""
    checkpoint = None
    if spec.startswith(("hf-hub:", "local-dir:")):
        schema, _, place = spec.partition(":")
        name, weights = spec, None
        if schema == "local-dir":
            folder = Path(place).expanduser().absolute()
            if not (folder / "open_clip_config.json").is_file():
                raise ModelError(f"{folder} holds no model: neither a bundle nor an open_clip_config.json")
            name = f"local-dir:{folder}"
    elif "//" in spec:
        name, _, path = spec.partition("//")
        weights = checkpoint = "/" + path
    else:
        name, _, weights = spec.rpartition("/")
    if checkpoint and not Path(checkpoint).is_file():
        raise ModelError(f"{checkpoint} is not a file")
    if checkpoint and not preprocess:
        raise ModelError(
            f"{checkpoint} does not say how its pictures were prepared: "
            "add --preprocess with the open_clip tag it was trained like (openai), or a JSON file"
        )
    if preprocess and not checkpoint:
        raise ModelError(f"--preprocess is for a bare checkpoint file only: {spec} says itself how to prepare pictures")
    if weights is None:
        return name, None
    name = name.replace("/", "-")  # ViT-B/32, as OpenAI writes it
    if name not in open_clip.list_models():
        raise ModelError(f"open_clip has no architecture {name!r}: {_suggest(name, open_clip.list_models())}")
    if not checkpoint:
        _pretrained(name, weights)
    return name, weights


def _pretrained(name: str, tag: str) -> Mapping[str, Any]:
    """Look up what open_clip knows of an architecture's pretrained weights: preprocessing, activation."""
    known: Mapping[str, Any] = open_clip.get_pretrained_cfg(name, tag)
    if not known:
        tags = open_clip.list_pretrained_tags_by_model(name)
        hint = _suggest(tag, tags) if tags else "open_clip names none, give a checkpoint file: NAME//path/to/file"
        raise ModelError(f"open_clip has no weights {tag!r} for {name}: {hint}")
    return known


def _suggest(word: str, known: Sequence[str]) -> str:
    lower = {name.lower(): name for name in known}
    close = [lower[match] for match in difflib.get_close_matches(word.lower(), lower, 3, cutoff=0.5)]
    return f"did you mean {' or '.join(close)}?" if close else f"it knows {', '.join(known)}"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except Exception as error:  # each back end raises its own
        raise ModelError(f"the device {name!r} cannot be used here: {_reason(error)}. Try --device cpu") from error


def _create(name: str, weights: str | None) -> tuple[Any, dict[str, Any]]:
    if name.startswith("hf-hub:"):  # open_clip goes on without weights that it cannot fetch
        download_pretrained_from_hf(name.removeprefix("hf-hub:"))
    architecture: dict[str, Any] = open_clip.get_model_config(name)
    if (architecture["text_cfg"].get("tokenizer_kwargs") or {}).get("trust_remote_code"):
        raise ModelError(f"{name} asks to run code of its own (trust_remote_code), which is never done")
    # open_clip only warns where its weights were trained with another activation than the architecture's
    quick_gelu = bool(weights and open_clip.get_pretrained_cfg(name, weights).get("quick_gelu"))
    model = open_clip.create_model(
        name,
        pretrained=weights,
        require_pretrained=True,
        pretrained_text=False,
        force_quick_gelu=quick_gelu,
        weights_only=True,
    )
    return model, {**architecture, **({"quick_gelu": True} if quick_gelu else {})}


def default_preprocessing(model: Any) -> Preprocessing:
    """How open_clip prepares pictures for a model that nobody has said anything else of."""
    return _described(model.visual.preprocess_cfg)


def _preprocessing(model: Any, name: str, preprocess: str | None) -> Preprocessing:
    described: Mapping[str, Any] = model.visual.preprocess_cfg
    size = _pair(described["size"])
    if preprocess and preprocess.endswith(".json"):
        try:
            given = Preprocessing.from_json(json.loads(Path(preprocess).read_text("utf-8")))
        except (OSError, ValueError) as error:
            raise ModelError(f"{preprocess} cannot be read as a preprocessing: {_reason(error)}") from error
        if given.size != size:
            raise ModelError(f"{preprocess}: size is {list(given.size)}, {name} takes pictures of {list(size)}")
        return given
    if preprocess:
        described = {**asdict(PreprocessCfg()), **_pretrained(name, preprocess), "size": size}
    return _described(described)


def _described(described: Mapping[str, Any]) -> Preprocessing:
    interpolation = described["interpolation"]
    return Preprocessing(
        size=_pair(described["size"]),
        mean=_triple(described["mean"]),
        std=_triple(described["std"]),
        resize_mode=described["resize_mode"],
        interpolation="bicubic" if interpolation == "random" else interpolation,  # as open_clip does at inference
        fill=described["fill_color"],
    )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _triple(values: float | Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (values,) * 3 if isinstance(values, (int, float)) else values
    return float(red), float(green), float(blue)


def _fingerprint(model: Any, tokenizer: Any, preprocessing: Preprocessing, architecture: Mapping[str, Any]) -> str:
    """SHA-256, in hex, over weights, architecture, preprocessing and tokenizer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    digest.update(json.dumps([architecture, preprocessing.to_json()], sort_keys=True).encode())
    digest.update(identity(tokenizer).encode())
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's records, which it logs as the root logger, and its warnings off the terminal."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def foreign(record: logging.LogRecord) -> bool:
        return "open_clip" not in Path(record.pathname).parts

    root.addFilter(foreign)
    root.addHandler(handler)  # without one, logging installs its own for good
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(foreign)


@contextmanager
def _weights_only() -> Iterator[None]:
    """Keep torch from unpickling objects, in the places too where open_clip falls back to torch.load's defaults."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


def _explained(spec: str, error: Exception) -> ModelError:
    """Put whatever was raised below into one line for the person at the terminal."""
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(deeper)
    for cause in chain:
        if isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled, URLError, ConnectionError)):
            return not_downloaded(spec)
        if isinstance(cause, HfHubHTTPError):
            return ModelError(f"{spec} cannot be downloaded: {_reason(cause)}")
        if type(cause).__name__ == "UnpicklingError":
            return ModelError(f"{spec} holds pickled objects, which are never loaded: save its weights as safetensors")
    if "loading state_dict" in str(error):
        details = " ".join(str(error).split())[:200]
        return ModelError(f"{spec}: the weights do not fit the architecture ({details} …)")
    return ModelError(f"{spec} cannot be loaded: {_reason(error)}")
