"""Threads: what the user says counts, else what the process may use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from indexes import runtime


@pytest.mark.parametrize(("wanted", "threads"), [("3", 3), ("5,2", 5), (" 4 ", 4)])
def test_omp_num_threads_decides(monkeypatch, wanted, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert runtime.thread_count() == threads
    assert runtime.faiss().omp_get_max_threads() == threads


@pytest.mark.parametrize("nonsense", ["", "0", "-1", "many", ","])
def test_otherwise_the_cpus_of_this_process(monkeypatch, nonsense):
    monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert runtime.thread_count() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert runtime.thread_count() == 1


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512_bf16\nbugs\t: x\n\nflags\t\t: none\n", {"fpu", "avx512_bf16"}),
        ("processor : 0\nFeatures : fp asimd bf16\n", {"fp", "asimd", "bf16"}),
        ("vendor: unknown\n", set()),
    ],
)  # fmt: skip
def test_the_flags_of_the_processor(tmp_path, monkeypatch, text, flags):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(runtime, "_CPUINFO", tmp_path / "cpuinfo")
    runtime.processor_flags.cache_clear()
    assert runtime.processor_flags() == flags
    monkeypatch.setattr(runtime, "_CPUINFO", tmp_path / "none")  # not Linux
    runtime.processor_flags.cache_clear()
    assert runtime.processor_flags() == set()
    runtime.processor_flags.cache_clear()


def test_one_thread_beside_torch_on_macos(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert runtime.faiss().omp_get_max_threads() == 1
    monkeypatch.delitem(sys.modules, "torch")
    assert runtime.faiss().omp_get_max_threads() == 3


def test_small_batches_reach_blas():
    assert runtime.faiss().cvar.distance_compute_blas_threshold <= 8192


def test_faiss_is_imported_only_when_needed():
    code = "import sys, indexes.store; sys.exit('faiss' in sys.modules or 'pyarrow.parquet' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_blas_sleeps_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT", raising=False)
    runtime.let_blas_sleep()
    assert os.environ["OPENBLAS_THREAD_TIMEOUT"] == "10"
    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", "26")
    runtime.let_blas_sleep()
    assert os.environ["OPENBLAS_THREAD_TIMEOUT"] == "26"
