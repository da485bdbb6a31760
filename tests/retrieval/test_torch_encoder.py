from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from retrieval import torch_encoder
from retrieval.encoders import load_encoder
from retrieval.errors import MissingExtra, ModelError
from retrieval.images import Preprocessing
from tests.retrieval.open_clip_models import TEXTS, TINY, photos, save_model
from tests.retrieval.test_tokenizer import hugging_face

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "causal", TINY["causal"])


@pytest.fixture
def tiny(causal, monkeypatch):
    """The tiny architecture under a name, as if open_clip knew it, with the weights `here` and `quick`."""
    model = {name: json.loads((causal / "open_clip_config.json").read_text())["model_cfg"] for name in ["Tiny-8"]}
    known = {
        "here": {"file": str(causal / WEIGHTS), "mean": (0.5,) * 3, "std": (0.25,) * 3, "resize_mode": "squash"},
        "quick": {"file": str(causal / WEIGHTS), "quick_gelu": True},
    }
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS, **model})
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-8", known)
    return "Tiny-8"


def by_hand(folder, images, texts):
    """What open_clip's own README does."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        pictures = model.encode_image(torch.stack([preprocess(image) for image in images]))
        sentences = model.encode_text(tokenizer(texts))
    return F.normalize(pictures, dim=-1).numpy(), F.normalize(sentences, dim=-1).numpy()


@pytest.mark.parametrize(
    ("kind", "preprocess"),
    [
        ("causal", {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5, 0.4, 0], "std": [0.3, 0.2, 1]}),
        ("causal-custom", {"resize_mode": "longest", "fill_color": 7}),
        ("both-ways", {"interpolation": "random", "mean": 0.5, "std": 0.5}),
        ("resnet", {}),
        ("coca", {}),
    ],
)  # fmt: skip
def test_vectors_are_open_clips(tmp_path, kind, preprocess):
    images, texts = photos(), TEXTS * 9  # more than a batch
    folder = save_model(tmp_path / kind, TINY[kind], preprocess)
    encoder = load_encoder(f"local-dir:{folder}")
    theirs = by_hand(folder, images, texts)
    assert encoder.dim == 24
    np.testing.assert_allclose(encoder.encode_images(images), theirs[0], atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(texts), theirs[1], atol=1e-5)


def test_nothing_to_encode_gives_no_rows(causal):
    encoder = load_encoder(f"local-dir:{causal}")
    assert encoder.encode_images([]).shape == encoder.encode_texts([]).shape == (0, 24)
    assert encoder.encode_texts([]).dtype == np.float32


def test_score_scale_is_the_trained_temperature(tmp_path, causal):
    folder = copy_with(tmp_path / "m", causal, lambda weights: weights["logit_scale"].fill_(np.log(100)))
    assert load_encoder(f"local-dir:{folder}").score_scale == pytest.approx(100)


def copy_with(folder, source, change=None, **config):
    """A copy of a saved model with other weights, or other fields in its configuration."""
    folder.mkdir()
    described = json.loads((source / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({**described, **config}))
    weights = load_file(source / WEIGHTS)
    if change:
        change(weights)
    save_file(weights, folder / WEIGHTS)
    return folder


def test_the_fingerprint_follows_whatever_decides_a_vector_and_nothing_else(tmp_path, causal):
    config = TINY["causal"]
    text = {**config["text_cfg"], "hf_tokenizer_name": "in the folder", "context_length": 16}
    foreign = {**config, "text_cfg": text}
    other = {
        "weight": copy_with(tmp_path / "a", causal, lambda weights: weights["ln_final.bias"][3].add_(1e-6)),
        "activation": copy_with(tmp_path / "b", causal, model_cfg={**config, "quick_gelu": True}),
        "preprocessing": copy_with(tmp_path / "c", causal, preprocess_cfg={"resize_mode": "squash"}),
        "tokenizer": copy_with(tmp_path / "d", causal, model_cfg=foreign),
        "vocabulary": copy_with(tmp_path / "e", causal, model_cfg=foreign),
    }
    hugging_face(other["tokenizer"])
    hugging_face(other["vocabulary"], lowercase=False)
    fingerprints = {name: load_encoder(f"local-dir:{folder}").fingerprint for name, folder in other.items()}
    fingerprints["same"] = load_encoder(f"local-dir:{causal}").fingerprint
    assert len(set(fingerprints.values())) == 6, fingerprints
    moved = copy_with(tmp_path / "moved", causal)
    (moved / "README.md").write_text("a file beside it")
    assert load_encoder(f"local-dir:{moved}").fingerprint == fingerprints["same"]


def test_the_number_of_threads_is_the_encoders_own_business(causal):
    encoder = load_encoder(f"local-dir:{causal}", threads=1)
    seen = []
    tokenizer = encoder.tokenizer
    encoder.tokenizer = lambda texts: seen.append(torch.get_num_threads()) or tokenizer(texts)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        encoder.encode_texts(["a cat"])
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_loading_is_silent_and_leaves_logging_alone(causal, monkeypatch, capfd):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    load_encoder(f"local-dir:{causal}")
    assert (root.handlers, root.filters) == ([], [])
    assert capfd.readouterr() == ("", "")


# NAME/PRETRAINED


def test_an_architecture_and_a_tag(tiny, causal):
    encoder = load_encoder(f"{tiny}/here")
    assert encoder.name == "Tiny-8/here"
    assert encoder.preprocessing == Preprocessing((32, 32), (0.5,) * 3, (0.25,) * 3, "squash", "bicubic")
    expected = load_encoder(f"local-dir:{causal}").encode_texts(TEXTS)
    np.testing.assert_array_equal(encoder.encode_texts(TEXTS), expected)


def test_the_activation_is_the_one_the_weights_were_trained_with(tmp_path, tiny, causal):
    quick = copy_with(tmp_path / "quick", causal, model_cfg={**TINY["causal"], "quick_gelu": True})
    expected = load_encoder(f"local-dir:{quick}").encode_texts(TEXTS)
    np.testing.assert_array_equal(load_encoder(f"{tiny}/quick").encode_texts(TEXTS), expected)
    assert np.abs(load_encoder(f"{tiny}/here").encode_texts(TEXTS) - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ViT-B32/openai", "no architecture 'ViT-B32': did you mean ViT-B-32"),
        ("vit-b-32/openai", "did you mean ViT-B-32"),
        ("Qqqq/openai", "it knows .*RN50"),
        ("ViT-B-32/opnai", "no weights 'opnai' for ViT-B-32: did you mean openai?"),
        ("ViT-B/32/opnai", "no weights 'opnai' for ViT-B-32"),
        ("ViT-M-32/openai", "no weights 'openai' for ViT-M-32: open_clip names none, give a checkpoint file"),
    ],
)
def test_unknown_names_are_answered_with_known_ones(spec, message):
    with pytest.raises(ModelError, match=message):
        load_encoder(spec)


def test_offline_and_not_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for spec in ("MobileCLIP2-S0/dfndr2b", "hf-hub:org/name"):
        with pytest.raises(
            ModelError, match=f"{spec} is not in {tmp_path}, and HF_HUB_OFFLINE forbids a download"
        ) as e:
            load_encoder(spec)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("device", ["warp", "cuda:99", ""])
def test_a_device_that_is_not_there(causal, device):
    with pytest.raises(ModelError, match=f"the device '{device}' cannot be used here.*Try --device cpu"):
        load_encoder(f"local-dir:{causal}", device=device)


# A bare checkpoint


def test_a_bare_checkpoint_takes_the_preprocessing_of_a_tag_or_a_file(tmp_path, tiny, causal):
    checkpoint = tmp_path / "epoch_3.pt"
    weights = {f"module.{name}": value for name, value in load_file(causal / WEIGHTS).items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": weights}, checkpoint)  # as open_clip's training saves it
    expected = load_encoder(f"local-dir:{causal}").encode_texts(TEXTS)

    tagged = load_encoder(f"{tiny}/{checkpoint}", preprocess="here")
    assert tagged.preprocessing == Preprocessing((32, 32), (0.5,) * 3, (0.25,) * 3, "squash", "bicubic")
    np.testing.assert_array_equal(tagged.encode_texts(TEXTS), expected)

    given = Preprocessing((32, 32), (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), "longest", "bilinear", 9)
    (tmp_path / "pp.json").write_text(json.dumps(given.to_json()))
    assert load_encoder(f"{tiny}/{checkpoint}", preprocess=str(tmp_path / "pp.json")).preprocessing == given


def test_the_preprocessing_of_a_bare_checkpoint_is_never_guessed(tmp_path, tiny, causal):
    checkpoint = causal / WEIGHTS
    (tmp_path / "large.json").write_text(
        json.dumps(Preprocessing((64, 64), (0.0,) * 3, (1.0,) * 3, "squash", "bicubic").to_json())
    )
    (tmp_path / "no.json").write_text("{")
    cases = {
        None: "does not say how its pictures were prepared: add --preprocess",
        "hree": "no weights 'hree' for Tiny-8: did you mean here?",
        str(tmp_path / "large.json"): r"size is \[64, 64\], Tiny-8 takes pictures of \[32, 32\]",
        str(tmp_path / "no.json"): "no.json cannot be read as a preprocessing",
        str(tmp_path / "none.json"): "none.json cannot be read as a preprocessing: .*No such file",
    }
    for preprocess, message in cases.items():
        with pytest.raises(ModelError, match=message):
            load_encoder(f"{tiny}/{checkpoint}", preprocess=preprocess)
    with pytest.raises(ModelError, match=r"nothing\.pt is not a file"):
        load_encoder(f"{tiny}/{tmp_path}/nothing.pt", preprocess="here")
    for spec in (f"{tiny}/here", f"local-dir:{causal}"):
        with pytest.raises(ModelError, match="--preprocess is for a bare checkpoint file only"):
            load_encoder(spec, preprocess="here")


# Weights that are not what they should be


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "boom"))


def test_pickled_objects_are_never_loaded(tmp_path, tiny, monkeypatch):
    fuse = tmp_path / "exploded"
    torch.save({"state_dict": {"x": Bomb(fuse)}}, tmp_path / "zip.pt")
    with (tmp_path / "plain.pt").open("wb") as file:
        pickle.dump(Bomb(fuse), file)
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ModelError, match="holds pickled objects, which are never loaded"):
            load_encoder(f"{tiny}/{tmp_path / name}", preprocess="here")

    # Older torch unpickles by default, and open_clip goes back to the default if torch.load raises TypeError.
    original = torch.load

    def load(path, map_location=None, **options):
        if "weights_only" in options:
            raise TypeError
        return original(path, map_location, weights_only=False)

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ModelError):
        load_encoder(f"{tiny}/{tmp_path / 'zip.pt'}", preprocess="here")
    assert not fuse.exists()


def test_weights_of_another_architecture(tmp_path, causal):
    other = copy_with(tmp_path / "m", causal, model_cfg=TINY["resnet"])
    with pytest.raises(ModelError, match="the weights do not fit the architecture"):
        load_encoder(f"local-dir:{other}")


def test_a_folder_without_weights_or_with_damaged_ones(tmp_path, causal):
    folder = copy_with(tmp_path / "m", causal)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_encoder(f"local-dir:{folder}")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="Required pretrained weights"):
        load_encoder(f"local-dir:{folder}")
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(ModelError, match=r"neither a bundle nor an open_clip_config\.json"):
        load_encoder(f"local-dir:{folder}")


def test_a_model_cannot_ask_for_its_own_code(tmp_path, causal):
    text = {**TINY["causal"]["text_cfg"], "hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    folder = copy_with(tmp_path / "m", causal, model_cfg={**TINY["causal"], "text_cfg": text})
    with pytest.raises(ModelError, match="run code of its own"):
        load_encoder(f"local-dir:{folder}")


def test_preprocessing_that_cannot_be_represented_is_refused(tmp_path, causal):
    for name, described in {
        "a": {"interpolation": "lanczos"},
        "b": {"resize_mode": "tile"},
        "c": {"mean": [1, 2]},
    }.items():
        with pytest.raises(ModelError):
            load_encoder(f"local-dir:{copy_with(tmp_path / name, causal, preprocess_cfg=described)}")


def test_a_missing_package_is_named(causal, monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(torch_encoder.open_clip, "get_tokenizer", fail)
    with pytest.raises(MissingExtra, match="pip install transformers"):
        load_encoder(f"local-dir:{causal}")
