from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from PIL import ImageOps
from torch import nn

from indexes.vectors import as_vectors
from retrieval import quantisation, torch_encoder
from retrieval.bundle import FILES, Bundle
from retrieval.encoders import export_bundle, load_encoder
from retrieval.errors import ModelError
from retrieval.images import Preprocessing
from retrieval.training import export
from retrieval.training.export import export_open_clip, read_weights, write_graphs
from tests.retrieval.open_clip_models import CAPTIONS, TEXTS, TINY, photos, save_model
from tests.retrieval.test_tokenizer import hugging_face


def centred_cosine(ours, theirs):
    """The least cosine of two (N, D) arrays row by row, after their common mean is taken away.

    Embeddings of random weights lie close together, any two of them at a cosine of 0.99: only what is left without the
    mean tells one picture from another, and a right preprocessing from a wrong one.
    """
    mean = theirs.mean(0)
    return float((as_vectors(ours - mean) * as_vectors(theirs - mean)).sum(1).min())


def assert_equal_encoders(ours, theirs, images, texts):
    """Equal vectors for pictures and sentences, and other vectors for what is only slightly different."""
    expected, result = theirs.encode_images(images), ours.encode_images(images)
    assert centred_cosine(result, expected) >= 0.9999
    np.testing.assert_allclose(result, expected, atol=2e-6)
    assert centred_cosine(ours.encode_images([ImageOps.mirror(image) for image in images]), expected) < 0.9999

    expected, result = theirs.encode_texts(texts), ours.encode_texts(texts)
    assert centred_cosine(result, expected) >= 0.9999
    np.testing.assert_allclose(result, expected, atol=2e-6)
    swapped = [" ".join([*text.split()[1::-1], *text.split()[2:]]) for text in texts]  # the first two words
    assert centred_cosine(ours.encode_texts(swapped), expected) < 0.9999


@pytest.mark.parametrize("name", ["MobileCLIP2-S0", "RN50", pytest.param("ViT-B-32", marks=pytest.mark.slow)])
def test_a_model_of_open_clip_and_its_bundle_give_the_same_vectors(tmp_path, name):
    folder = save_model(tmp_path / name, open_clip.get_model_config(name))
    theirs = torch_encoder.load(f"local-dir:{folder}", precision="fp32")
    export_open_clip(theirs, tmp_path / "bundle")
    assert_equal_encoders(load_encoder(str(tmp_path / "bundle")), theirs, photos(), CAPTIONS)


@pytest.fixture(scope="module", params=[*TINY, "hugging-face"])
def exported(request, tmp_path_factory):
    """(encoder, its bundle) of each kind of architecture."""
    place = tmp_path_factory.mktemp("export")
    if request.param == "hugging-face":  # as SigLIP: a tokenizer of transformers, the last of a fixed number of ids
        text = {"context_length": 16, "vocab_size": 15, "width": 32, "heads": 2, "layers": 2, "pool_type": "last",
                "no_causal_mask": True, "hf_tokenizer_name": "in the folder",
                "tokenizer_kwargs": {"clean": "canonicalize"}}  # fmt: skip
        config = {**TINY["causal"], "text_cfg": text, "custom_text": True}
        tokenizer = hugging_face(place / "tokenizer")
    else:
        config, tokenizer = TINY[request.param], None
    preprocess = {"resize_mode": "squash", "mean": [0.1, 0.4, 0.6], "std": [0.5, 0.2, 0.3]}
    encoder = torch_encoder.load(
        f"local-dir:{save_model(place / 'model', config, preprocess, tokenizer)}", precision="fp32"
    )
    return encoder, export_open_clip(encoder, place / "bundle")


def test_every_kind_of_tower_is_exported(exported):
    encoder, bundle = exported
    images = photos()
    ours = load_encoder(str(bundle.path))
    np.testing.assert_allclose(ours.encode_images(images), encoder.encode_images(images), atol=2e-6)
    np.testing.assert_allclose(ours.encode_texts(TEXTS), encoder.encode_texts(TEXTS), atol=2e-6)
    for one in images[:2]:  # the batch size is free
        np.testing.assert_allclose(ours.encode_images([one]), encoder.encode_images([one]), atol=2e-6)


def test_model_json_describes_the_model(exported):
    encoder, bundle = exported
    assert Bundle.load(bundle.path) == bundle
    assert bundle.fingerprint == bundle.compute_fingerprint()
    assert (bundle.name, bundle.dim, bundle.preprocessing) == ("bundle", 24, encoder.preprocessing)
    assert bundle.score_scale == pytest.approx(1 / 0.07)
    assert bundle.context_length == encoder.architecture["text_cfg"]["context_length"]
    assert bundle.precision == {"image": "fp32", "text": "fp32"}
    assert bundle.source == {"library": "open_clip", "architecture": encoder.architecture}
    assert sorted(path.name for path in bundle.path.iterdir()) == sorted(FILES)


def test_weights_are_read_back_under_their_names(exported):
    encoder, bundle = exported
    state = encoder.model.state_dict()
    read = {**read_weights(bundle.path / "image.onnx"), **read_weights(bundle.path / "text.onnx")}
    for name, value in read.items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    lost = {name.rpartition(".")[2] for name in state.keys() - read.keys() if not name.startswith("text_decoder.")}
    assert lost <= {"logit_scale", "logit_bias", "num_batches_tracked"}


@pytest.mark.parametrize("exported", ["causal", "resnet"], indirect=True)
def test_fp16_keeps_rounded_weights_and_nearly_the_vectors(exported, tmp_path):
    encoder, bundle = exported
    half = export_open_clip(encoder, tmp_path / "half", "fp16")
    assert half.precision == {"image": "fp16", "text": "fp16"}
    for tower in ("image.onnx", "text.onnx"):
        full = read_weights(bundle.path / tower)
        read = read_weights(half.path / tower)
        assert read.keys() == full.keys()
        for name, value in full.items():
            expected = value if value.numel() < quantisation.SMALL else value.half().float()
            torch.testing.assert_close(read[name], expected, rtol=0, atol=0)
    images, ours = photos(), load_encoder(str(half.path))
    for a, b in (
        (ours.encode_images(images), encoder.encode_images(images)),
        (ours.encode_texts(TEXTS), encoder.encode_texts(TEXTS)),
    ):
        assert 0 < np.abs(a - b).max() < 2e-3
    assert (half.path / "text.onnx").stat().st_size < 0.6 * (bundle.path / "text.onnx").stat().st_size


@pytest.mark.parametrize(
    ("exported", "lengths"),
    [("causal", [4, 20]), ("causal-custom", [4, 20]), ("resnet", [4, 20]), ("both-ways", [77, 77]), ("coca", [76, 76])],
    indirect=["exported"],
)
def test_a_causal_text_is_computed_at_its_own_length(exported, lengths):
    encoder, bundle = exported
    ours = load_encoder(str(bundle.path))
    seen = []
    session = ours._text_session
    run = session.run
    session.run = lambda batch: seen.append(batch.shape[1]) or run(batch)
    for text in TEXTS[:2]:
        np.testing.assert_allclose(ours.encode_texts([text]), encoder.encode_texts([text]), atol=2e-6)
    assert seen == lengths


class Branching(nn.Module):
    """Takes another way for dark pictures than for light ones, which a trace of one picture cannot see."""

    def __init__(self, tower):
        super().__init__()
        self.tower, self.preprocess_cfg = tower, tower.preprocess_cfg

    def forward(self, x):
        h = self.tower(x)
        return h.flip(1) if x.mean() > -1 else h


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("causal") / "model", TINY["causal"])
    return torch_encoder.load(f"local-dir:{folder}", precision="fp32")


def test_a_bundle_with_other_vectors_is_not_written(encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(encoder.model._modules, "visual", Branching(encoder.model.visual))
    with pytest.raises(ModelError, match="its image tower gives other vectors in ONNX Runtime"):
        export_open_clip(encoder, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_and_leaves_nothing(encoder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="file exists already"):
        export_open_clip(encoder, tmp_path / "file")
    with pytest.raises(ModelError, match="cannot be written: File exists"):
        export_open_clip(encoder, tmp_path / "file" / "bundle")
    monkeypatch.setattr(export, "_MOST_BYTES", 6_000_000)
    with pytest.raises(ModelError, match=r"its text tower has 0\.0 GB of weights, the limit is 0"):
        export_open_clip(encoder, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Twins(nn.Module):
    """Two layers with weights of equal values, and one weight used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.norms = nn.ModuleList([nn.LayerNorm(64), nn.LayerNorm(64)])
        self.linears = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        self.linears[1].load_state_dict(self.linears[0].state_dict())
        self.tied = nn.Linear(64, 64, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids).mean(1)
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = linear(norm(x))
        return self.tied(x)


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 16, 64)

    def forward(self, x):
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_of_equal_values_keep_their_names(tmp_path, precision):
    towers = {"image": Flat().eval(), "text": Twins().eval()}
    write_graphs(
        tmp_path,
        **towers,
        tokenizer_json="{}",
        preprocessing=Preprocessing((4, 4), (0.5,) * 3, (0.5,) * 3, "squash", "bicubic"),
        context_length=8,
        any_length=True,
        precision=precision,
    )
    for name, tower in towers.items():
        read = read_weights(tmp_path / f"{name}.onnx")
        expected = {key: value.clone() for key, value in tower.named_parameters()}  # a tied weight once
        assert read.keys() == expected.keys()
        for key, value in expected.items():
            stored = value.half().float() if precision == "fp16" and value.numel() >= quantisation.SMALL else value
            torch.testing.assert_close(read[key], stored, rtol=0, atol=0)


def test_weights_that_were_rounded_to_bf16_are_not_written(tmp_path):
    folder = save_model(tmp_path / "model", TINY["causal"])
    rounded = torch_encoder.load(f"local-dir:{folder}", precision="bf16")
    with pytest.raises(ModelError, match="was loaded in bf16: load it with precision='fp32'"):
        export_open_clip(rounded, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    export_bundle(f"local-dir:{folder}", tmp_path / "bundle")  # does so itself, on any processor
