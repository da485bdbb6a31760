"""Bundles in fp32, fp16 and int8: nearly the same vectors, whatever the batch; weights that are read back; refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from retrieval import quantisation
from retrieval.bundle import FILES, Bundle
from retrieval.conversion import convert
from retrieval.encoders import export_bundle, find_bundle, load_encoder, stored_precision
from retrieval.errors import DataError, MissingExtra, ModelError
from retrieval.images import read_photo
from retrieval.onnx_encoder import OnnxEncoder
from retrieval.pairs import Record
from tests.odd_photos import real_photos
from tests.retrieval.open_clip_models import TINY, save_model
from tests.retrieval.test_onnx_encoder import SENTENCES

EVERYDAY = [
    "astronaut",
    "camera",
    "chelsea",
    "china",
    "coffee",
    "flower",
    "motorcycle_left",
    "rocket",
]  # not a cell, and no brick wall
LEAST_COSINE = {  # to fp32, of such photos and of sentences
    "fp16": {"image": 0.99999, "text": 0.99999},
    "int8": {"image": 0.98, "text": 0.998},
}


def records(repeat: int = 1) -> list[Record]:
    return [Record(path, (path.stem.replace("_", " "),)) for path in real_photos()] * repeat


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The built-in towers as float32, fp16 and int8 bundles, by name."""
    folder = tmp_path_factory.mktemp("precision")
    wide = export_bundle("builtin", folder / "fp32", "fp32") if not int8_builtin() else plain(folder)
    return {
        "fp32": wide,
        "fp16": convert(wide, folder / "fp16", stored_precision("fp16")),
        "int8": convert(wide, folder / "int8", stored_precision("int8"), records()),
    }


def int8_builtin() -> bool:
    return "int8" in Bundle.load(find_bundle("builtin")).precision.values()


def plain(folder: Path) -> Bundle:
    """The built-in weights, as they are read for training, in float32 graphs."""
    from retrieval.training.export import write_graphs
    from retrieval.training.models import start_from_bundle

    start, place = start_from_bundle("builtin"), folder / "fp32"
    place.mkdir()
    image, text, any_length = start.model.eval().exported()
    write_graphs(
        place,
        image=image,
        text=text,
        tokenizer_json=start.tokenizer_json,
        preprocessing=start.preprocessing,
        context_length=start.context_length,
        any_length=any_length,
    )
    precision = {"image": "fp32", "text": "fp32"}
    numbers = {"dim": start.dim, "context_length": start.context_length, "score_scale": 30.0}
    return Bundle(
        place, "fp32", preprocessing=start.preprocessing, precision=precision, source=start.source, **numbers
    ).save()


@pytest.fixture(scope="module")
def pictures():
    photos = [read_photo(path).image for path in real_photos() if path.stem in EVERYDAY]
    assert len(photos) == len(EVERYDAY)
    for photo in photos:
        photo.thumbnail((400, 400))
    return photos


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_vectors_are_nearly_those_of_fp32(places, pictures, precision):
    exact, other = (OnnxEncoder(places[name]) for name in ("fp32", precision))
    cosines = {
        "image": (exact.encode_images(pictures) * other.encode_images(pictures)).sum(1),
        "text": (exact.encode_texts(SENTENCES) * other.encode_texts(SENTENCES)).sum(1),
    }
    for tower, least in LEAST_COSINE[precision].items():
        assert cosines[tower].min() >= least, tower
        assert cosines[tower].min() < 1 - 1e-9, tower  # it is another graph
    if precision == "int8":  # 0.982 where biases are left as they are
        assert cosines["image"].mean() >= 0.99


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_vector_does_not_depend_on_what_it_is_encoded_with(places, pictures, precision):
    encoder = OnnxEncoder(places[precision])
    alone = np.concatenate([encoder.encode_images([picture]) for picture in pictures[:3]])
    np.testing.assert_allclose(encoder.encode_images(pictures)[:3], alone, atol=1e-5)
    alone = np.concatenate([encoder.encode_texts([sentence]) for sentence in SENTENCES])
    np.testing.assert_allclose(encoder.encode_texts(SENTENCES), alone, atol=2e-3 if precision == "int8" else 1e-5)


def test_the_description_says_what_it_cost(places):
    made = Bundle.load(places["int8"].path)
    assert made == places["int8"]
    assert sorted(file.name for file in made.path.iterdir()) == sorted(FILES)
    assert (made.name, made.precision) == ("int8", {"image": "int8", "text": "int8"})
    assert made.fingerprint == made.compute_fingerprint()
    assert len({bundle.fingerprint for bundle in places.values()}) == 3
    cost = made.training["int8"]
    assert (cost["calibrated_on"], cost["measured_on"]) == (10, 10)
    assert cost["made_from"]["fingerprint"] == places["fp32"].fingerprint
    for tower, cosines in cost["cosine"].items():
        assert LEAST_COSINE["int8"][tower] - 0.06 < cosines["least"] <= cosines["mean"] < 1
    assert set(cost["change"]) == set(cost["intervals"]) == {f"{w}_hit@{k}" for w in ("t2i", "i2t") for k in (1, 10)}
    sizes = {name: sum(f.stat().st_size for f in bundle.path.iterdir()) for name, bundle in places.items()}
    assert sizes["int8"] < 0.6 * sizes["fp16"] < 0.36 * sizes["fp32"]


def test_weights_are_read_back_within_half_a_step(places):
    for file in ("image.onnx", "text.onnx"):
        exact, read = (quantisation.read_weights(places[name].path / file) for name in ("fp32", "int8"))
        assert read.keys() == exact.keys()
        for name, value in exact.items():
            assert read[name].shape == value.shape
            steps = 64 if file == "image.onnx" else 127
            rows = np.abs(value).reshape(len(value), -1).max(1) if value.ndim > 1 else np.abs(value).max()
            tolerance = np.reshape(rows / steps * 0.51 + 1e-6, (-1, *[1] * (value.ndim - 1)))
            if value.ndim > 1:  # biases of convolutions are corrected: they are others
                assert (np.abs(read[name] - value) <= tolerance).all(), name


def test_seven_bits_so_that_no_processor_saturates(places):
    model = onnx.load(str(places["int8"].path / "image.onnx"))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = [value for name, value in stored.items() if name.endswith("_quantized") and value.dtype == np.int8]
    assert len(weights) >= 64
    assert max(int(np.abs(value.astype(int)).max()) for value in weights) <= 64
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)


def test_what_is_trained_further_begins_where_the_bundle_is(places, pictures):
    import torch

    from retrieval.training.export import NormalisedTower
    from retrieval.training.models import start_from_bundle

    start = start_from_bundle(str(places["int8"].path))
    towers = start.model.eval()
    encoder = OnnxEncoder(places["int8"])
    pixels = torch.from_numpy(start.preprocessing.pixels(pictures))
    with torch.inference_mode():
        ours = torch.nn.functional.normalize(NormalisedTower(towers.image, start.preprocessing)(pixels)).numpy()
        ids = torch.tensor([encoder._tokenizer.encode("two dogs in the snow").ids])
        text = torch.nn.functional.normalize(towers.text(ids)).numpy()
    assert (ours * encoder.encode_images(pictures)).sum(1).min() >= 0.99
    assert (text * encoder.encode_texts(["two dogs in the snow"])).sum(1).min() >= 0.999


def test_one_tower_alone(places, tmp_path):
    made = convert(places["fp32"], tmp_path / "mixed", stored_precision("fp16/int8"), records())
    assert made.precision == {"image": "fp16", "text": "int8"}
    assert (made.path / "text.onnx").read_bytes() == (places["int8"].path / "text.onnx").read_bytes()
    assert (made.path / "image.onnx").read_bytes() == (places["fp16"].path / "image.onnx").read_bytes()


def test_a_transformer_s_image_tower(tmp_path):
    """Of open_clip: attention and MLP in int8; its weights are cut in pieces on the way and cannot be read back."""
    model = f"local-dir:{save_model(tmp_path / 'model', TINY['causal'])}"
    made = export_bundle(model, tmp_path / "int8", "int8", calibrate=records())
    exact, other = load_encoder(model, precision="fp32"), load_encoder(str(made.path))
    images = [read_photo(path).image for path in real_photos()[:3]]
    assert (exact.encode_images(images) * other.encode_images(images)).sum(1).min() >= 0.99
    assert (exact.encode_texts(SENTENCES) * other.encode_texts(SENTENCES)).sum(1).min() >= 0.99
    from retrieval.training.models import start_from_bundle

    with pytest.raises(ModelError, match="cannot be trained further"):
        start_from_bundle(str(made.path))


def test_refusals_leave_nothing_behind(places, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="its image tower is in int8 already"):
        convert(places["int8"], tmp_path / "again", stored_precision("int8"), records())
    with pytest.raises(ModelError, match="in int8; export the model that it was made from"):
        convert(places["int8"], tmp_path / "again", stored_precision("fp32"))
    for few in ([], records()[:15]):
        with pytest.raises(DataError, match=f"not {len(few)}: name them with --calibrate PAIRS"):
            convert(places["fp32"], tmp_path / "few", stored_precision("int8"), few)
    with pytest.raises(ModelError, match="'int4' is no precision: fp32, fp16 or int8"):
        export_bundle("builtin", tmp_path / "no", "int4")
    with pytest.raises(ModelError, match="exists already"):
        convert(places["fp32"], tmp_path, stored_precision("fp16"))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match=r"pip install 'diptych\[quantise\]'"):
        convert(places["fp32"], tmp_path / "no", stored_precision("fp16"))
    assert list(tmp_path.iterdir()) == []
