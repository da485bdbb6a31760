"""Bundles of tiny towers with random weights, that train as any other does."""

from __future__ import annotations

import torch

from retrieval.images import Preprocessing
from retrieval.training import models
from retrieval.training.classic import CNN, LSTM, word_tokenizer
from retrieval.training.models import StartModel
from retrieval.training.towers import DualEncoder, EfficientNetLite, MiniLM

WORDS = ["something", "red", "green", "blue", "yellow", "a", "thing", "of"]
DIM = 12


def small_lite():
    torch.manual_seed(1)
    tower = EfficientNetLite(0.5, 0.5)
    for module in tower.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # pictures stay different from each other to the top
    return tower


def small_bert():
    torch.manual_seed(2)
    return MiniLM(40, layers=2)


def put_small_towers(monkeypatch):
    """Small ones in place of the packaged towers, by the same names."""
    monkeypatch.setattr(models, "IMAGE_TOWERS", {**models.IMAGE_TOWERS, "efficientnet-lite2": (small_lite, small_lite)})
    monkeypatch.setattr(models, "TEXT_TOWERS", {**models.TEXT_TOWERS, "minilm-l6": (small_bert, small_bert)})


def start(kind: str) -> StartModel:
    """``classic``: a CNN and an LSTM; ``builtin``: the built-in kind, see :func:`put_small_towers`."""
    torch.manual_seed(0)
    if kind == "classic":
        image, text = CNN(), LSTM(3 + len(WORDS), 16)
        words = {"vocabulary": 3 + len(WORDS), "width": 16, "fixed": False}
        source = {"image_tower": "cnn", "text_tower": "lstm", "words": words}
    else:
        image, text = small_lite(), small_bert()
        source = {"image_tower": "efficientnet-lite2", "text_tower": "minilm-l6"}
    model = DualEncoder(image, text, DIM)
    for name, buffer in model.named_buffers():  # as after training: no two batch norms alike
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.05)
    model.eval()
    with torch.no_grad():
        features = torch.nn.functional.normalize(image(torch.rand(16, 3, 32, 32) * 2 - 1), dim=-1)
        model.image.head.mean.copy_(features.mean(0))
        model.image.head.std.copy_(features.std(0) + 1e-3)
    preprocessing = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, "squash", "bilinear")
    return StartModel(model, preprocessing, word_tokenizer(WORDS, 12).to_str(), 12, DIM, source)


def write_bundle(kind: str, folder):
    folder.mkdir()
    return start(kind).write(folder, kind, "fp32", licence="nobody's")
