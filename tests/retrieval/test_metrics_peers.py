"""Our measures beside those of CLIP_benchmark, open_clip, trec_eval and ranx: recorded, and live where installed."""

from __future__ import annotations

import importlib
import json

import pytest

from benchmarks import peer_metrics
from benchmarks.peer_metrics import CASES, EQUAL, GAP, difference, flickr8k, generate, our_classes, ours

RECORD = json.loads(peer_metrics.RECORDED.read_text("utf-8"))
ANY_PROCESSOR = 5e-3  # between vectors of a picture that two processors computed in int8: some ranks of thousands move


@pytest.fixture(scope="module")
def photos(shared_data):
    return flickr8k(shared_data)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_what_peers_said(name):
    case = generate(name)
    assert (case.checksum, CASES[name][1]) == (RECORD["checksums"][name], RECORD["seeds"][name])
    assert case.gap() >= GAP
    numbers = RECORD["numbers"][name]
    assert numbers.keys() >= {"clip-benchmark", "pytrec-eval-terrier", "ranx"}
    assert ("open_clip_torch" in numbers) == (name == "one to one")
    for theirs in numbers.values():
        assert difference(ours(case), theirs) <= EQUAL


def test_classification_equal_to_what_peers_said():
    assert RECORD["numbers"]["classification"]["clip-benchmark"].keys() == {"top1", "top5", "mean_per_class", "map"}
    for theirs in RECORD["numbers"]["classification"].values():
        assert difference(our_classes(), theirs) <= EQUAL


def test_every_measure_has_a_peer():
    """But rsum, which is a sum of hits, and mean and median rank of more than one text for each image."""
    named = {name for by_peer in RECORD["numbers"].values() for numbers in by_peer.values() for name in numbers}
    assert ours(generate("one to one")).keys() - {"rsum"} == {
        name.removeprefix("floor(").rstrip(")") for name in named
    } - {*our_classes()}


def test_flickr8k_as_peers_said(photos):
    assert len(photos.texts) == pytest.approx(RECORD["texts of flickr8k"], abs=20)
    for theirs in RECORD["numbers"]["flickr8k"].values():
        assert difference(ours(photos), theirs) <= ANY_PROCESSOR


# ---- live ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _peers():
    for module in ("clip_benchmark", "open_clip_train", "pytrec_eval", "ranx"):
        try:
            importlib.import_module(module)
        except ImportError:
            pytest.skip(f"{module} is not installed: it comes with the extra `bench`")


@pytest.mark.usefixtures("_peers")
@pytest.mark.parametrize("name", CASES)
def test_equal_to_peers(name):
    case = generate(name)
    for theirs in peer_metrics.of_peers(name, case).values():
        assert difference(ours(case), theirs) <= EQUAL


@pytest.mark.usefixtures("_peers")
def test_classification_equal_to_peers():
    for theirs in peer_metrics.peer_classes().values():
        assert difference(our_classes(), theirs) <= EQUAL


@pytest.mark.usefixtures("_peers")
def test_flickr8k_equal_to_peers(photos):
    for theirs in peer_metrics.of_peers_on_flickr8k(photos).values():
        assert difference(ours(photos), theirs) <= EQUAL
