"""A network to a decoder's folder: one ONNX graph for the beginning of a caption and for every piece after it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from indexes.vectors import Vectors
from retrieval.errors import MissingExtra, ModelError
from retrieval.heads.captioning.decoders import GRAPH, PIECES, Card, TransformerDecoder, new_decoder
from retrieval.heads.captioning.network import CaptionNet
from retrieval.heads.captioning.search import Past
from retrieval.heads.captioning.words import Words
from retrieval.quantisation import store_as_fp16
from retrieval.sessions import OnnxRuntimeSession

_OPSET = 18
_TOLERANCE = 1e-4  # of scores, between torch and ONNX Runtime on the same weights


class TorchStepper:
    """A network as :class:`retrieval.heads.captioning.search.Stepper` has it."""

    def __init__(self, network: CaptionNet) -> None:
        self.network = network

    def begin(self, vectors: Vectors) -> tuple[NDArray[np.float32], Past]:
        """See :class:`retrieval.heads.captioning.search.Stepper`."""
        none = torch.empty((len(vectors), 0), dtype=torch.int64)
        return self._run(torch.from_numpy(vectors)[:, None], none, self.network.nothing(len(vectors)))

    def go_on(self, pieces: NDArray[np.int64], past: Past) -> tuple[NDArray[np.float32], Past]:
        """See :class:`retrieval.heads.captioning.search.Stepper`."""
        none = torch.empty((len(pieces), 0, self.network.settings.dim))
        return self._run(none, torch.from_numpy(pieces)[:, None], torch.from_numpy(past))

    @torch.inference_mode()
    def _run(self, vectors: Tensor, pieces: Tensor, past: Tensor) -> tuple[NDArray[np.float32], Past]:
        device = self.network.places.weight.device
        scores, present = self.network(vectors.to(device), pieces.to(device), past.to(device))
        return scores[:, -1].cpu().numpy(), present.cpu().numpy()


class _Next(nn.Module):
    """The scores of the last place alone."""

    def __init__(self, network: CaptionNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, vectors: Tensor, pieces: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        scores, present = self.network(vectors, pieces, past)
        return scores[:, -1], present


def settings_of(network: CaptionNet, beams: int, length_penalty: float) -> dict[str, Any]:
    """What the card of a transformer says of how it is used."""
    own = network.settings
    past = {"layers": 2 * own.layers, "heads": own.heads, "width": own.width // own.heads}
    return {"length": own.length, "beams": beams, "length_penalty": length_penalty, "past": past}


def round_to_half(network: CaptionNet) -> None:
    """Round the weights to what is stored, so that torch and the graph compute with the same."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(weight.half().float())


def write_decoder(folder: Path, network: CaptionNet, words: Words, card: Card) -> None:
    """Write a new folder, whole or not at all; the network's weights are rounded to half precision before.

    Raises:
        ModelError: the folder exists or cannot be written, or the graph gives other scores than the network.
    """
    network.eval().cpu()
    round_to_half(network)
    with new_decoder(folder, card) as staging:
        (staging / PIECES).write_text(words.to_json(), "utf-8")
        _export(network, staging / GRAPH)
        _check(network, TransformerDecoder(card, words, OnnxRuntimeSession(staging / GRAPH, 1)))


def _export(network: CaptionNet, path: Path) -> None:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("writing a decoder", "'diptych[heads]'") from error
    own = network.settings
    past = torch.zeros((2 * own.layers, 2, own.heads, 3, own.width // own.heads))
    axes = {
        "vectors": {0: "batch", 1: "begun"},
        "pieces": {0: "batch", 1: "new"},
        "past": {1: "batch", 3: "before"},
        "scores": {0: "batch"},
        "present": {1: "batch", 3: "all"},
    }
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the exporter's notes on tracing
        torch.onnx.export(
            _Next(network).eval(),
            (torch.zeros((2, 1, own.dim)), torch.zeros((2, 1), dtype=torch.int64), past),
            str(path),
            input_names=["vectors", "pieces", "past"],
            output_names=["scores", "present"],
            dynamic_axes=axes,
            opset_version=_OPSET,
            do_constant_folding=False,
            dynamo=False,  # as the towers are, see retrieval.training.export
        )
    model = onnx.load(str(path))
    store_as_fp16(model)
    onnx.save(model, str(path))


def _check(network: CaptionNet, decoder: TransformerDecoder) -> None:
    """Refuse a graph that does not give the network's scores, at the beginning or after it."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(3, network.settings.dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    theirs, torch_past = TorchStepper(network).begin(vectors)
    ours, past = decoder.begin(vectors)
    for _ in range(min(4, network.settings.length) + 1):
        difference = float(np.abs(ours - theirs).max())
        if not difference <= _TOLERANCE:
            raise ModelError(
                "the decoder cannot be written: it gives other scores in ONNX Runtime "
                f"(by up to {difference:.2g}, the limit is {_TOLERANCE:g})"
            )
        pieces = random.integers(0, network.settings.pieces, 3)
        theirs, torch_past = TorchStepper(network).go_on(pieces, torch_past)
        ours, past = decoder.go_on(pieces, past)
