from __future__ import annotations

import pytest

from indexes.errors import ModelMismatch
from retrieval.heads import check_fingerprint


def test_a_head_refuses_vectors_of_another_model():
    check_fingerprint("m", "a" * 64, "a" * 64)
    with pytest.raises(ModelMismatch, match=r"m was trained on vectors of another model \(aaaaaaaaaaaa…, not bbbb"):
        check_fingerprint("m", "a" * 64, "b" * 64)
