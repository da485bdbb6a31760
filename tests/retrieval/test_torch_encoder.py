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

from retrieval import sessions, torch_encoder
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
    encoder = torch_encoder.load(f"local-dir:{folder}", precision="fp32")
    theirs = by_hand(folder, images, texts)
    assert encoder.dim == 24
    np.testing.assert_allclose(encoder.encode_images(images), theirs[0], atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(texts), theirs[1], atol=1e-5)


@pytest.mark.parametrize(("kind", "lengths"), [("causal", [[4], [5]]), ("both-ways", [[77], [77]])])
def test_a_text_is_as_long_as_it_is_where_the_tower_allows_it(tmp_path, monkeypatch, kind, lengths):
    encoder = torch_encoder.load(f"local-dir:{save_model(tmp_path / kind, TINY[kind])}", precision="fp32")
    seen = []
    (replica,) = encoder._replicas
    start = replica.start
    monkeypatch.setattr(replica, "start", lambda tower, ids: seen.append([ids.shape[1]]) or start(tower, ids))
    encoder.encode_texts(["cat"])  # with its begin and end, and a column of padding
    encoder.encode_texts(["a cat"])
    assert seen == lengths


@pytest.mark.parametrize("kind", TINY)
def test_bf16_is_near_fp32_and_gives_float32_rows_of_unit_length(tmp_path, kind):
    folder = save_model(tmp_path / kind, TINY[kind])
    exact, fast = (torch_encoder.load(f"local-dir:{folder}", precision=precision) for precision in ("fp32", "bf16"))
    assert (exact.precision, fast.precision) == ("fp32", "bf16")
    assert {parameter.dtype for parameter in fast.model.parameters()} == {torch.bfloat16}
    assert (fast.fingerprint, fast.score_scale) == (exact.fingerprint, exact.score_scale)  # of the weights as given
    for theirs, ours in (
        (exact.encode_images(photos()), fast.encode_images(photos())),
        (exact.encode_texts(TEXTS), fast.encode_texts(TEXTS)),
    ):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
        assert (theirs * ours).sum(1).min() > 0.999
        assert np.abs(theirs - ours).max() > 1e-5  # it is another arithmetic


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_picture_is_encoded_with_changes_its_last_bits_only(causal, precision):
    encoder = torch_encoder.load(f"local-dir:{causal}", precision=precision)
    pictures = photos() * 6  # more than a batch
    alone = np.concatenate([encoder.encode_images([picture]) for picture in photos()])
    together = encoder.encode_images(pictures)
    np.testing.assert_allclose(together, np.tile(alone, (6, 1)), atol=1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ({"avx2", "avx512f", "avx512_bf16"}, "bf16"),
        ({"amx_bf16"}, "bf16"),
        ({"avx2", "avx512f", "avx512_vnni"}, "fp32"),
        (set(), "fp32"),
    ],
)
def test_the_processor_chooses_the_precision_unless_it_is_given(causal, monkeypatch, flags, precision):
    monkeypatch.setattr(sessions, "processor_flags", lambda: frozenset(flags))
    assert torch_encoder.load(f"local-dir:{causal}").precision == precision
    assert torch_encoder.load(f"local-dir:{causal}", precision="fp32").precision == "fp32"
    assert torch_encoder.load(f"local-dir:{causal}", precision="bf16").precision == "bf16"


@pytest.mark.parametrize("count", [0, 1, 2, 3, 6, 100])  # up to more than is in flight at once
@pytest.mark.parametrize(("device", "threads"), [("cpu, cpu", 1), ("cpu", 2), ("cpu,cpu", 3)])
def test_devices_and_threads_share_the_batches_and_order_stays(causal, monkeypatch, device, threads, count):
    """Two devices that are both the processor: the same shares, the same queues."""
    one = torch_encoder.load(f"local-dir:{causal}", precision="fp32", threads=1)
    two = torch_encoder.load(f"local-dir:{causal}", precision="fp32", device=device, threads=threads)
    assert two.batch_size == threads * len(two._replicas) * one.batch_size
    assert two.fingerprint == one.fingerprint
    shares = []
    for number, replica in enumerate(two._replicas):
        start = replica.start

        def counted(tower, batch, number=number, start=start):
            shares.append((number, len(batch)))
            return start(tower, batch)

        monkeypatch.setattr(replica, "start", counted)
    pictures, texts = (photos() * 17)[:count], [f"{number} cats" for number in range(count)]
    np.testing.assert_allclose(two.encode_images(pictures), one.encode_images(pictures), atol=1e-5)
    assert sum(size for _, size in shares) == count
    assert {number for number, _ in shares} == set(range(min(-(-count // 2), len(two._replicas))))
    np.testing.assert_allclose(two.encode_texts(texts), one.encode_texts(texts), atol=1e-5)


def test_an_error_in_a_lane_is_raised_and_leaves_the_encoder_usable(causal):
    encoder = torch_encoder.load(f"local-dir:{causal}", precision="fp32", threads=2)
    expected, before = encoder.encode_images(photos()), torch.get_num_threads()
    (replica,) = encoder._replicas
    tower = replica.image_tower

    def fail(pixels):
        raise MemoryError

    replica.image_tower = fail
    with pytest.raises(MemoryError):
        encoder.encode_images(photos())
    replica.image_tower = tower
    np.testing.assert_array_equal(encoder.encode_images(photos()), expected)
    assert torch.get_num_threads() == before


def test_results_are_fetched_only_when_enough_is_in_flight(causal, monkeypatch):
    encoder = torch_encoder.load(f"local-dir:{causal}", precision="fp32", threads=1)
    events = []
    (replica,) = encoder._replicas
    start = replica.start

    def started(tower, batch):
        number = sum(kind == "start" for kind, _ in events)
        events.append(("start", number))
        rows = start(tower, batch)()
        return lambda: events.append(("fetch", number)) or rows

    monkeypatch.setattr(replica, "start", started)
    replica.batch = 2
    encoder.encode_images(photos())
    assert events == [("start", 0), ("start", 1), ("fetch", 0), ("start", 2), ("fetch", 1), ("fetch", 2)]


def test_vectors_are_open_clips_with_a_foreign_tokenizer(tmp_path, causal):
    text = {**TINY["causal"]["text_cfg"], "hf_tokenizer_name": "in the folder", "context_length": 77}
    folder = copy_with(tmp_path / "m", causal, model_cfg={**TINY["causal"], "text_cfg": text})
    hugging_face(folder)
    encoder = torch_encoder.load(f"local-dir:{folder}", precision="fp32")
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), by_hand(folder, photos()[:1], TEXTS)[1], atol=1e-5)


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


@pytest.mark.parametrize("device", ["warp", "cuda:99", "", "cpu,cuda:99", "cpu,"])
def test_a_device_that_is_not_there(causal, device):
    missing = device.split(",")[-1]
    with pytest.raises(ModelError, match=f"the device '{missing}' cannot be used here.*Try --device cpu"):
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
