"""The one place that decides about threads and knows the processor, and the one door to FAISS."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

# From how many numbers in a batch of queries (rows × width) FAISS hands a flat search to BLAS. FAISS 1.15 waits for
# 128,000, i.e. 250 queries of 512 dimensions, and is up to 3 times slower below that; under about 16 queries its own
# loop is the faster one. Measured on 100,000 × 512, two cores: 32 queries 260 -> 117 ms, 128 queries 950 -> 315 ms.
_BLAS_FROM = 8192
_CPUINFO = Path("/proc/cpuinfo")


def thread_count() -> int:
    """Threads to use: OMP_NUM_THREADS where it is set, else the CPUs that this process may run on (at least 1)."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # "4,2": one number for each nesting level
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):  # Linux: containers and taskset allow fewer than there are
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def let_blas_sleep() -> None:
    """Let OpenBLAS's threads sleep as soon as they have nothing to do. Only before numpy is imported; for a process.

    By themselves they first spin for 2^26 cycles each, also after they were made: a process that only imports numpy
    burns 40 ms on every other core. 2^10 is less than what waking one up takes.
    """
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")


@cache
def processor_flags() -> frozenset[str]:
    """What the processor can do, in Linux' words: `avx2`, `avx512_vnni`, `avx512_bf16`, and so on.

    Empty where the system does not say it in /proc/cpuinfo (macOS, Windows): take the path that runs everywhere then.
    """
    with contextlib.suppress(OSError):
        for line in _CPUINFO.read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):  # x86, ARM
                return frozenset(value.split())
    return frozenset()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep matrix products in one thread each, for callers that bring threads of their own; it counts process-wide.

    With more, the other threads of OpenBLAS spin between products and take the processor from whoever works there.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


def faiss() -> Any:
    """Import faiss, or get it again, and set its threads. Call this at each use; do not keep the module.

    On macOS the wheels of torch and faiss-cpu each bring a libomp of their own. Two of them in one process crash or
    hang as soon as both open a parallel region, so FAISS stays on one thread there once torch is loaded.
    """
    import faiss as module

    two_runtimes = sys.platform == "darwin" and "torch" in sys.modules
    module.omp_set_num_threads(1 if two_runtimes else thread_count())
    # Older releases count queries instead (20), which is below this number and stays as it is.
    if getattr(module.cvar, "distance_compute_blas_threshold", 0) > _BLAS_FROM:
        module.cvar.distance_compute_blas_threshold = _BLAS_FROM
    return module
