"""The encoder over a bundle, on the built-in model: order, batches, lengths, and what a damaged file says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retrieval import sessions
from retrieval.bundle import Bundle
from retrieval.encoders import find_bundle
from retrieval.errors import ModelError
from retrieval.images import read_photo
from retrieval.onnx_encoder import OnnxEncoder
from tests.odd_photos import real_photos

SENTENCES = [
    "two dogs playing in the snow while a third one looks on from behind a long wooden fence near the old house",
    "a cat",
    "",
    "A CAT",
    "an astronaut in an orange suit",
    "猫 🐈 and café",
    "a cat",
    "word " * 300,
    "x",
    "a rocket launching into the sky at night",
]


@pytest.fixture(scope="module")
def bundle():
    return Bundle.load(find_bundle("builtin"))


@pytest.fixture(scope="module")
def encoder(bundle):
    return OnnxEncoder(bundle)


@pytest.fixture(scope="module")
def pictures():
    """12 real photos of many sizes, small enough to be quick."""
    photos = [read_photo(path).image for path in real_photos()[::-1][:12]]
    for photo in photos:
        photo.thumbnail((300, 300))
    return photos


@pytest.fixture
def copy(bundle, tmp_path):
    """A bundle to damage: its files are links to the real ones until they are replaced."""
    for file in bundle.path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def replace_file(file: Path, data: bytes) -> None:
    file.unlink()
    file.write_bytes(data)


def test_one_at_a_time_equals_a_batch(encoder, pictures):
    together = encoder.encode_images(pictures)
    alone = np.concatenate([encoder.encode_images([picture]) for picture in pictures])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len(np.unique(together.round(3), axis=0)) == len(pictures)  # so that a wrong order would be seen

    together = encoder.encode_texts(SENTENCES)
    alone = np.concatenate([encoder.encode_texts([sentence]) for sentence in SENTENCES])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together[1], together[3], atol=1e-5)  # the tokenizer's lower case
    assert len(np.unique(together.round(3), axis=0)) == len(SENTENCES) - 2


def test_order_is_kept_across_batches(encoder, pictures, monkeypatch):
    texts, images = encoder.encode_texts(SENTENCES), encoder.encode_images(pictures)
    for image_batch, text_batch in ((4, 5), (7, 3)):  # the last batch is whole, or not
        monkeypatch.setattr(sessions, "IMAGE_BATCH", image_batch)
        monkeypatch.setattr(sessions, "TEXT_BATCH", text_batch)
        np.testing.assert_allclose(encoder.encode_images(pictures), images, atol=1e-5)
        np.testing.assert_allclose(encoder.encode_texts(SENTENCES[::-1])[::-1], texts, atol=1e-5)


def test_rows_are_unit_float32_and_contiguous(encoder, pictures):
    for vectors in (encoder.encode_images(pictures), encoder.encode_texts(SENTENCES)):
        assert (vectors.dtype, vectors.shape[1]) == (np.float32, encoder.dim)
        assert vectors.flags.c_contiguous
        assert np.linalg.norm(vectors.astype(np.float64), axis=1) == pytest.approx(1, abs=1e-6)


def test_nothing_in_nothing_out(encoder):
    for vectors in (encoder.encode_images([]), encoder.encode_texts([])):
        assert (vectors.shape, vectors.dtype) == ((0, encoder.dim), np.float32)


def test_pictures_of_any_size_and_mode_and_prepared_ones(encoder, pictures):
    grey = pictures[0].convert("L")
    clear = pictures[1].convert("RGBA")
    odd = [grey, clear, Image.new("RGB", (1, 1), "red"), Image.new("RGB", (3000, 2), "blue")]
    vectors = encoder.encode_images(odd)
    expected = encoder.encode_images([grey.convert("RGB"), pictures[1], *odd[2:]])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    prepared = [encoder.preprocessing.fit(picture) for picture in pictures[:4]]
    np.testing.assert_allclose(encoder.encode_images(prepared), encoder.encode_images(pictures[:4]), atol=1e-6)


def test_what_is_beyond_the_context_length_is_cut_off(encoder, bundle):
    long = " ".join(f"dog {i}" for i in range(bundle.context_length))
    first, second = encoder.encode_texts([long + " and a cat", long + " and a rocket"])
    np.testing.assert_allclose(first, second, atol=1e-6)
    first, second = encoder.encode_texts(["dog and a cat", "dog and a rocket"])
    assert float(first @ second) < 0.99


def test_a_text_search_never_opens_the_image_tower(copy, encoder):
    replace_file(copy / "image.onnx", b"not opened")
    np.testing.assert_array_equal(
        OnnxEncoder(Bundle.load(copy)).encode_texts(["a cat"]), encoder.encode_texts(["a cat"])
    )


def test_an_image_search_opens_neither_text_tower_nor_tokenizer(copy, encoder, pictures):
    for name in ("text.onnx", "tokenizer.json"):
        replace_file(copy / name, b"not opened")
    np.testing.assert_array_equal(
        OnnxEncoder(Bundle.load(copy)).encode_images(pictures[:1]), encoder.encode_images(pictures[:1])
    )


def complaint(copy: Path) -> str:
    encoder = OnnxEncoder(Bundle.load(copy))
    with pytest.raises(ModelError) as caught:
        encoder.encode_texts(["a cat"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "bent"])
def test_a_damaged_graph_is_one_plain_line(copy, bundle, damage):
    data = (bundle.path / "text.onnx").read_bytes()
    damaged = {"empty": b"", "cut": data[: len(data) // 2], "text": b"hello " * 100, "bent": b"\xff" * 64 + data[64:]}
    replace_file(copy / "text.onnx", damaged[damage])
    assert f"{copy / 'text.onnx'} cannot be opened by ONNX Runtime" in complaint(copy)


def test_a_damaged_tokenizer_is_one_plain_line(copy):
    for damage in (b"", b"{}", b"\xff\xfe", b'{"version": "1.0"}'):
        replace_file(copy / "tokenizer.json", damage)
        assert f"{copy / 'tokenizer.json'} cannot be read as a tokenizer" in complaint(copy)


def test_a_graph_of_another_kind_is_one_plain_line(copy, bundle):
    """The image graph in the text graph's place opens well, and then does not take the ids."""
    replace_file(copy / "text.onnx", (bundle.path / "image.onnx").read_bytes())
    assert f"the model in {copy} cannot be run" in complaint(copy)


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_threads_change_no_vector_and_no_order(bundle, pictures, count):
    shown = (pictures * 20)[:count]
    one, two = (OnnxEncoder(bundle, threads=threads) for threads in (1, 2))
    assert two.batch_size == 2 * one.batch_size
    slow = np.concatenate([one.encode_images([picture]) for picture in shown])
    np.testing.assert_allclose(one.encode_images(shown), slow, atol=1e-5)
    np.testing.assert_allclose(two.encode_images(shown), slow, atol=1e-5)


def test_threads_share_one_session(bundle, pictures, monkeypatch):
    opened = []
    monkeypatch.setattr("retrieval.onnx_encoder.open_image_session", lambda *how: opened.append(how) or real(*how))
    real = sessions.open_image_session
    OnnxEncoder(bundle, threads=2).encode_images((pictures * 6)[:6])
    assert len(opened) == 1
