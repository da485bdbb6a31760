"""Torch towers to a bundle: two ONNX graphs whose weights keep their parameter names.

The names make a bundle readable again: :func:`read_weights` gives back a ``state_dict``, so that training goes on
from the very numbers that search uses. Constant folding stays off for that reason; ONNX Runtime does it at start-up.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from retrieval import quantisation
from retrieval.bundle import IMAGE_FILE, TEXT_FILE, TOKENIZER_FILE, Bundle
from retrieval.encoders import Precision
from retrieval.errors import MissingExtra, ModelError
from retrieval.images import Preprocessing
from retrieval.onnx_encoder import OnnxEncoder

if TYPE_CHECKING:
    from retrieval.torch_encoder import TorchEncoder

_OPSET = 18
_MOST_BYTES = 2_000_000_000  # of fp32 weights in a tower: the exporter cannot write a file of more than 2 GiB
# Rows of unit length, element by element; measured on randomly initialised towers: under 1e-6 and 2e-4.
_TOLERANCE: Mapping[str, float] = {"fp32": 1e-4, "fp16": 1e-2}


class NormalisedTower(nn.Module):
    """Raw pixels to an embedding: the normalisation is part of the graph, so that callers hand over bytes."""

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, D)."""
        x = pixels.permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
        embedding: Tensor = self.tower((x - self.mean) / self.std)
        return embedding


class TextTower(nn.Module):
    """Holds a text tower under the name ``tower``, so that both graphs name their weights the same way."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) int64 -> (B, D)."""
        embedding: Tensor = self.tower(ids)
        return embedding


def write_graphs(
    folder: Path,
    *,
    image: nn.Module,
    text: nn.Module,
    tokenizer_json: str,
    preprocessing: Preprocessing,
    context_length: int,
    any_length: bool,
    precision: Precision = "fp32",
) -> None:
    """Write image.onnx, text.onnx and tokenizer.json into a folder.

    Args:
        folder: where to; it must exist.
        image: normalised pixels (B, 3, H, W) -> (B, D), in eval mode, on the CPU.
        text: token ids (B, L) -> (B, D), likewise.
        tokenizer_json: what `tokenizers.Tokenizer.to_str()` gives, truncation and padding set.
        preprocessing: gives the picture size, and the mean and std that go into the graph.
        context_length: the longest L.
        any_length: the text tower takes any L up to that, not only L itself.
        precision: of the weights as stored; the arithmetic stays fp32.
    """
    height, width = preprocessing.size
    pixels = torch.zeros((2, height, width, 3), dtype=torch.uint8)
    ids = torch.ones((2, context_length), dtype=torch.int64)
    batch = {0: "batch"}
    _export(NormalisedTower(image, preprocessing), pixels, folder / IMAGE_FILE, "pixels", batch, precision)
    axes = {**batch, 1: "length"} if any_length else batch
    _export(TextTower(text), ids, folder / TEXT_FILE, "ids", axes, precision)
    (folder / TOKENIZER_FILE).write_text(tokenizer_json, "utf-8")


def _export(
    module: nn.Module, example: Tensor, path: Path, name: str, axes: Mapping[int, str], precision: Precision
) -> None:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("writing a model", "'diptych[torch]'") from error
    with warnings.catch_warnings(), torch.inference_mode(), _exportable_attention(module):
        warnings.simplefilter("ignore")  # the exporter's notes on tracing shapes that are constants here
        torch.onnx.export(
            module.eval(),
            (example,),
            str(path),
            input_names=[name],
            output_names=["embedding"],
            dynamic_axes={name: dict(axes), "embedding": {0: "batch"}},
            opset_version=_OPSET,
            do_constant_folding=False,
            keep_initializers_as_inputs=True,  # or weights of equal values would be merged under one name
            dynamo=False,  # measured on Lite2: the newer exporter's graph runs 2.5 times slower in ONNX Runtime
        )
    model = onnx.load(str(path))
    del model.graph.input[1:]  # the weights
    if precision == "fp16":
        quantisation.store_as_fp16(model)
    onnx.save(model, str(path))


@contextmanager
def _exportable_attention(module: nn.Module) -> Iterator[None]:
    """Keep nn.MultiheadAttention off its paths for one and the same query, key and value.

    One of them is an operator that ONNX does not have, the other writes the example's sequence length into the graph.
    """
    hooks = [
        attention.register_forward_pre_hook(lambda _, qkv: (*qkv[:2], qkv[2].detach(), *qkv[3:]))
        for attention in module.modules()
        if isinstance(attention, nn.MultiheadAttention)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights of one exported tower under its own parameter names, in float32. ModelError when damaged."""
    return {name: torch.from_numpy(value.copy()) for name, value in quantisation.read_weights(path).items()}


def bound_tower(model: nn.Module, function: str | Callable[[Tensor], Tensor]) -> nn.Module:
    """View a model as a tower that computes one of its methods, or a function of its parts; names stay."""
    tower = copy.copy(model)
    tower.forward = getattr(model, function) if isinstance(function, str) else function
    return tower


def export_open_clip(encoder: TorchEncoder, folder: Path, precision: Precision = "fp32") -> Bundle:
    """Write an open_clip model as a bundle into a new folder, whole or not at all; the bundle is named like the folder.

    Raises:
        ModelError: the folder exists, a tower is too large or cannot be traced, the tokenizer cannot be converted, or
            the bundle's vectors are not the model's.
    """
    from retrieval.training.tokenizer_json import to_json

    if folder.exists():
        raise ModelError(f"{folder} exists already: choose another name or remove it first")
    if encoder.precision != "fp32":
        raise ModelError(
            f"{encoder.name} was loaded in {encoder.precision}: load it with precision='fp32' to export it"
        )
    model = encoder.model
    if next(model.parameters()).device.type != "cpu":
        model = copy.deepcopy(model).cpu()
    _check_size(model, encoder.name)
    any_length = any_length_text(model)
    context_length = int(encoder.tokenizer.context_length)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            staging = Path(scratch) / folder.name
            staging.mkdir()
            write_graphs(
                staging,
                image=bound_tower(model, "encode_image"),
                text=bound_tower(model, any_length or "encode_text"),
                tokenizer_json=to_json(encoder.tokenizer, context_length, any_length is not None),
                preprocessing=encoder.preprocessing,
                context_length=context_length,
                any_length=any_length is not None,
                precision=precision,
            )
            bundle = Bundle(
                path=staging,
                name=folder.name,
                dim=encoder.dim,
                preprocessing=encoder.preprocessing,
                context_length=context_length,
                score_scale=encoder.score_scale,
                precision={"image": precision, "text": precision},
                source={"library": "open_clip", "architecture": encoder.architecture},
            ).save()
            _check_vectors(bundle, encoder, _TOLERANCE[precision])
            staging.rename(folder)
    except (RuntimeError, TypeError, ValueError) as error:  # the exporter, on what it cannot trace
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"{encoder.name} cannot be written as a bundle: {reason}") from error
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error.strerror or error}") from error
    return replace(bundle, path=folder)


def _check_size(model: nn.Module, name: str) -> None:
    image = _bytes(model.visual)
    text = _bytes(model.text) if hasattr(model, "text") else _bytes(model) - image
    for tower, size in (("image", image), ("text", text)):
        if size > _MOST_BYTES:
            raise ModelError(
                f"{name} cannot be written as a bundle: its {tower} tower has {size / 1e9:.1f} GB of weights, "
                f"the limit is {_MOST_BYTES / 1e9:.0f}. Use the model as it is, or a smaller one"
            )


def _bytes(module: Any) -> int:
    return sum(4 * parameter.numel() for parameter in module.parameters())


def any_length_text(model: Any) -> Callable[[Tensor], Tensor] | None:
    """``encode_text`` for ids of any length up to the context's, None if the padding has a part in its result.

    In a causal tower no token sees those after it, and the one that is pooled is the end of the text: what comes after
    it changes nothing, so that a short sentence need not be computed at full length.
    """
    text = getattr(model, "text", model)  # open_clip's CLIP is its own text tower
    pooled = getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None)
    causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    return partial(_encode_causal, text, pooled) if causal and pooled in ("argmax", "eos") else None


def _encode_causal(text: Any, pooled: str, ids: Tensor) -> Tensor:
    from open_clip.transformer import text_global_pool

    length = ids.shape[1]
    x: Tensor = text.token_embedding(ids) + text.positional_embedding[:length]  # (B, L, width)
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:length, :length]))
    end = getattr(text, "eos_id", None) or getattr(text, "text_eos_id", None)
    x = text_global_pool(x, ids, pooled, eos_token_id=end)  # (B, width)
    projection = text.text_projection
    if projection is None:
        return x
    embedding: Tensor = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    return embedding  # (B, D)


def _check_vectors(bundle: Bundle, encoder: TorchEncoder, tolerance: float) -> None:
    """Refuse a bundle whose vectors are not the model's."""
    onnx = OnnxEncoder(bundle, precision="fp32")
    noise = np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    texts = ["a photo of a cat", "Two dogs play in the snow, and a third one looks on from behind a fence."]
    for tower, ours, theirs in (
        ("image", onnx.encode_images(images), encoder.encode_images(images)),
        ("text", onnx.encode_texts(texts), encoder.encode_texts(texts)),
    ):
        difference = float(np.abs(ours - theirs).max())
        if difference > tolerance:
            raise ModelError(
                f"{encoder.name} cannot be written as a bundle: its {tower} tower gives other vectors in ONNX Runtime "
                f"(by up to {difference:.2g}, the limit is {tolerance:g})"
            )
