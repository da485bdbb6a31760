from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _one_thread():
    """So little work that sharing it costs more than it gains."""
    torch = sys.modules.get("torch")  # of tests that need it
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
