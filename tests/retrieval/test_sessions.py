"""Which arithmetic a bundle's pictures are computed in, and that runtimes agree."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval import embedding, sessions
from retrieval.bundle import Bundle
from retrieval.encoders import find_bundle
from retrieval.errors import MissingExtra, ModelError
from retrieval.images import read_photo
from retrieval.onnx_encoder import OnnxEncoder
from tests.odd_photos import real_photos
from tests.retrieval.test_quantisation import EVERYDAY


@pytest.mark.parametrize(
    ("stored", "asked", "openvino", "bf16", "expected"),
    [
        ("fp32", "auto", False, True, "fp32"),
        ("fp16", "auto", True, False, "fp32"),
        ("fp16", "auto", True, True, "bf16"),
        ("fp16", "fp32", True, True, "fp32"),
        ("fp32", "bf16", True, True, "bf16"),
        ("int8", "auto", True, True, "int8"),
        ("int8", "auto", False, False, "int8"),
    ],
)
def test_the_processor_chooses_unless_it_is_told(tmp_path, monkeypatch, stored, asked, openvino, bf16, expected):
    monkeypatch.setattr(sessions, "has_openvino", lambda: openvino)
    monkeypatch.setattr(sessions, "processor_flags", lambda: frozenset({"avx2", *(["avx512_bf16"] if bf16 else [])}))
    assert sessions.image_precision(tmp_path, stored, asked) == expected


@pytest.mark.parametrize(
    ("precision", "flags", "wins"),
    [
        ("bf16", {"avx512_bf16"}, True),
        ("int8", {"avx2"}, False),
        ("int8", {"avx2", "avx512_vnni"}, True),
        ("int8", {"avx2", "avx_vnni"}, True),
        ("fp32", {"avx2", "avx512_vnni"}, False),
    ],
)
def test_openvino_computes_where_it_is_faster(tmp_path, monkeypatch, precision, flags, wins):
    monkeypatch.setattr(sessions, "OpenVinoSession", lambda *_: "OpenVINO")
    monkeypatch.setattr(sessions, "OnnxRuntimeSession", lambda *_: "ONNX Runtime")
    monkeypatch.setattr(sessions, "processor_flags", lambda: frozenset(flags))
    for installed in (True, False):
        monkeypatch.setattr(sessions, "has_openvino", lambda there=installed: there)
        expected = "OpenVINO" if installed and wins else "ONNX Runtime"
        assert sessions.open_image_session(tmp_path, 1, precision) == expected


def test_what_cannot_be_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "processor_flags", frozenset)
    for asked in ("fp32", "bf16"):
        with pytest.raises(ModelError, match=f"computed, in int8: leave out --precision {asked}"):
            sessions.image_precision(tmp_path, "int8", asked)
    monkeypatch.setattr(sessions, "has_openvino", lambda: False)
    with pytest.raises(MissingExtra, match=r"pip install 'diptych\[openvino\]'"):
        sessions.image_precision(tmp_path, "fp32", "bf16")
    monkeypatch.setattr(sessions, "has_openvino", lambda: True)
    with pytest.raises(ModelError, match="does not multiply in bf16: leave out"):
        sessions.image_precision(tmp_path, "fp32", "bf16")


def test_vectors_in_bf16_are_kept_apart(monkeypatch):
    monkeypatch.setattr(sessions, "has_openvino", lambda: True)
    monkeypatch.setattr(sessions, "processor_flags", lambda: frozenset({"avx512_bf16"}))
    bundle = Bundle.load(find_bundle("builtin"))
    encoder = OnnxEncoder(bundle)
    encoder._stored = "fp16"
    assert encoder.fingerprint == bundle.fingerprint  # one model, whatever it is computed in
    assert embedding.cache_name(encoder) == f"{bundle.fingerprint}-bf16"
    monkeypatch.setattr(sessions, "has_openvino", lambda: False)
    assert embedding.cache_name(OnnxEncoder(bundle)) == bundle.fingerprint


def test_openvino_gives_nearly_the_same_vectors(monkeypatch):
    pytest.importorskip("openvino")
    images = [read_photo(path).image for path in real_photos() if path.stem in EVERYDAY]
    bundle = Bundle.load(find_bundle("builtin"))
    monkeypatch.setattr(sessions, "openvino_wins", lambda _: True)
    there = OnnxEncoder(bundle).encode_images(images)
    monkeypatch.setattr(sessions, "openvino_wins", lambda _: False)
    here = OnnxEncoder(bundle).encode_images(images)
    assert (here * there).sum(1).min() >= 0.985
    np.testing.assert_allclose(np.linalg.norm(there, axis=1), 1, atol=1e-6)
