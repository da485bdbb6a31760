"""What every measure of retrieval costs, beside a bare matrix product and what others do for hit@k alone.

python -m benchmarks.ranking [--peers-python PYTHON] [--repetitions 6] [--quick]

Each contender runs in a process of its own. Repetitions are interleaved (product, ours, ours with intervals, product …)
and ratios are medians over them, since other work on a machine comes and goes. Peers come with `diptych[bench]`, or
from the environment of another interpreter; those that are not installed are left out, and the section says so.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.table import machine, write_section

ROOT = Path(__file__).parents[1]
KS = (1, 5, 10)
DIM, CAPTIONS = 512, 5
SIZES = {"usual": 5_000, "random": 5_000, "large": 31_000}  # pictures; Karpathy's COCO test, all of Flickr30k
NOISE = {"usual": 6.0, "random": None, "large": 6.0}  # length of the noise on a text of length 1
BATCH = 64  # CLIP_benchmark's default
NOT_INSTALLED = 3  # exit status
Hits = list[float] | None

# bars
CPU_OF_PEER, MEMORY_OF_PEER, OF_PRODUCT, BOOTSTRAP = 30, 20, 1.5, 0.2


# ---- contenders: (images, texts, owner) -> hit@k, or None ------------------------------------------------------------


def product(images: np.ndarray, texts: np.ndarray, _: np.ndarray) -> Hits:
    np.matmul(texts, images.T)
    return None


def ours(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> Hits:
    from retrieval.metrics import evaluate_retrieval

    scores = evaluate_retrieval(images, texts, owner, KS)
    return [scores[f"{way}_hit@{k}"] for way in ("t2i", "i2t") for k in KS]


def ours_with_intervals(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> Hits:
    from retrieval.metrics import evaluate_retrieval

    scores = evaluate_retrieval(images, texts, owner, KS, bootstrap=1000)
    assert scores.intervals
    return [scores[f"{way}_hit@{k}"] for way in ("t2i", "i2t") for k in KS]


def clip_benchmark(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> Hits:
    """As its evaluate() does."""
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = torch.from_numpy(texts) @ torch.from_numpy(images).t()
    right = torch.zeros_like(scores, dtype=bool)
    right[torch.arange(len(scores)), torch.from_numpy(owner)] = True
    return [
        (batchify(recall_at_k, table, owned, BATCH, "cpu", k=k) > 0).float().mean().item()
        for table, owned in ((scores, right), (scores.T, right.T))
        for k in KS
    ]


def argsort(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> Hits:
    scores = texts @ images.T
    order = np.argsort(-scores, axis=1)
    hits = [(order[:, :k] == owner[:, None]).any(axis=1).mean() for k in KS]
    order = np.argsort(-scores.T, axis=1)
    return hits + [(owner[order[:, :k]] == np.arange(len(images))[:, None]).any(axis=1).mean() for k in KS]


def faiss_top10(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> Hits:
    import faiss

    def nearest(base: np.ndarray, queries: np.ndarray) -> np.ndarray:
        index = faiss.IndexFlatIP(base.shape[1])
        index.add(base)
        return index.search(queries, max(KS))[1]

    rows, columns = nearest(images, texts), nearest(texts, images)
    hits = [(rows[:, :k] == owner[:, None]).any(axis=1).mean() for k in KS]
    return hits + [(owner[columns[:, :k]] == np.arange(len(images))[:, None]).any(axis=1).mean() for k in KS]


CONTENDERS: dict[str, tuple[str, Callable]] = {
    "product": ("one bare product, float32", product),
    "ours": ("every measure, both ways", ours),
    "intervals": ("the same with 1,000 bootstrap draws", ours_with_intervals),
    "faiss": ("FAISS flat, top 10 both ways", faiss_top10),
    "argsort": ("full argsort, hit@k both ways", argsort),
    "clip_benchmark": ("CLIP_benchmark, hit@k both ways", clip_benchmark),
}


# ---- one process -----------------------------------------------------------------------------------------------------


def make(folder: Path, name: str) -> None:
    random = np.random.default_rng(0)
    images = unit(random.standard_normal((SIZES[name], DIM), dtype=np.float32))
    owner = np.repeat(np.arange(len(images)), CAPTIONS)
    texts = random.standard_normal((len(owner), DIM), dtype=np.float32)
    if NOISE[name]:
        texts *= np.float32(NOISE[name] / np.sqrt(DIM))
        texts += images[owner]
    for file, array in (("images", images), ("texts", unit(texts)), ("owner", owner)):
        np.save(folder / f"{name}-{file}.npy", array)


def unit(rows: np.ndarray) -> np.ndarray:
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def run(folder: Path, name: str, contender: str) -> None:
    """Print what it costs beyond its inputs, as JSON."""
    images, texts, owner = (np.load(folder / f"{name}-{file}.npy") for file in ("images", "texts", "owner"))
    function = CONTENDERS[contender][1]
    try:
        function(images[:20], texts[:100], owner[:100])  # imports and starts threads
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    before, wall, cpu = peak(), time.perf_counter(), time.process_time()
    hits = function(images, texts, owner)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(json.dumps({"cpu": cpu, "wall": wall, "mb": peak() - before, "hits": hits and [float(hit) for hit in hits]}))


def peak() -> float:
    """Megabytes that this process ever had at a time."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6


# ---- all of them -----------------------------------------------------------------------------------------------------


def start(python: str, *arguments: object) -> dict | None:
    """Run a contender; None if its package is not installed. This process stays small: a child inherits its peak."""
    command = [python, "-W", "ignore", "-m", "benchmarks.ranking", "--child", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == NOT_INSTALLED:
        return None
    if done.returncode:
        sys.exit(f"{arguments} failed:\n{done.stderr}")
    result = json.loads(done.stdout) if done.stdout else {}
    print(*arguments[1:], {key: value for key, value in result.items() if key != "hits"}, flush=True)
    return result


def measure(folder: Path, name: str, plan: list[str], peers_python: str) -> dict[str, list[dict]]:
    """Run contenders in this order -> the runs of each."""
    runs: dict[str, list[dict]] = {}
    for contender in plan:
        result = start(peers_python if contender == "clip_benchmark" else sys.executable, folder, name, contender)
        if result is not None:
            runs.setdefault(contender, []).append(result)
    return runs


def median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def ratio(runs: dict[str, list[dict]], one: str, other: str, key: str) -> float:
    """Median over repetitions, each with the one that ran beside it."""
    return statistics.median(a[key] / b[key] for a, b in zip(runs[one], runs[other], strict=True))


def judged(value: float, bar: float, at_least: bool = False) -> str:
    return "met" if (value >= bar if at_least else value <= bar) else "MISSED"


def bars(runs: dict[str, list[dict]]) -> list[str]:
    lines = []
    for key, what in (("cpu", "CPU"), ("wall", "wall clock")):
        value = ratio(runs, "ours", "product", key)
        lines.append(
            f"{value:.2f} times the {what} of one bare product (bar {OF_PRODUCT}: {judged(value, OF_PRODUCT)})"
        )
    more = ratio(runs, "intervals", "ours", "cpu") - 1
    lines.append(f"1,000 draws add {100 * more:.0f} % CPU (bar {100 * BOOTSTRAP:.0f} %: {judged(more, BOOTSTRAP)})")
    if "clip_benchmark" in runs:
        less = median(runs["clip_benchmark"], "cpu") / median(runs["ours"], "cpu")
        lines.append(
            f"{less:.0f} times less CPU than CLIP_benchmark (bar {CPU_OF_PEER}: {judged(less, CPU_OF_PEER, True)})"
        )
        less = median(runs["clip_benchmark"], "mb") / median(runs["ours"], "mb")
        verdict = judged(less, MEMORY_OF_PEER, True)
        lines.append(f"{less:.0f} times less memory than CLIP_benchmark (bar {MEMORY_OF_PEER}: {verdict})")
    return lines


def main(peers_python: str, repetitions: int, quick: bool) -> None:
    together = ["product", "ours", "intervals"] * (repetitions // 2)
    others = ["faiss", "argsort", "clip_benchmark"]
    plans = {
        "usual": [*others, *together, *others, *together, *others],
        "random": [*together, *together, *others],
        "large": ["ours", "intervals"],
    }
    rows, notes, missing = [], [], set()
    for name in ["usual"] if quick else plans:
        with tempfile.TemporaryDirectory() as scratch:
            start(sys.executable, scratch, name, "make")
            runs = measure(Path(scratch), name, plans[name], peers_python)
        missing |= set(plans[name]) - set(runs)
        hits = {contender: some[0]["hits"] for contender, some in runs.items() if some[0]["hits"]}
        for contender, values in hits.items():
            assert np.allclose(values, hits["ours"], atol=1e-3), (contender, values, hits["ours"])
        size = f"{SIZES[name]:,} × {CAPTIONS * SIZES[name]:,}" + (", pure noise" if NOISE[name] is None else "")
        found = " / ".join(f"{100 * hits['ours'][i]:.0f}" for i in (0, len(KS)))
        rows += [
            (
                size,
                found,
                CONTENDERS[contender][0],
                *(f"{median(some, key):.{d}f}" for key, d in (("cpu", 2), ("wall", 2), ("mb", 0))),
            )
            for contender, some in runs.items()
        ]
        if name != "large":
            notes.append(f"{size}: {'; '.join(bars(runs))}.")
    if missing:
        notes.append(f"Left out, since not installed: {', '.join(sorted(missing))}.")
    kernels = os.environ.get("OPENBLAS_CORETYPE")
    forced = f", OPENBLAS_CORETYPE={kernels}" if kernels else ""
    write_section(
        "Ranks and measures",
        f"`python -m benchmarks.ranking` on {machine()}{forced}: images × captions, {DIM}-d, five captions each; t2i "
        f"and i2t hit@1 in percent; medians of {repetitions // 2 * 2} interleaved runs, a process each (3 of FAISS, "
        "argsort and CLIP_benchmark, but 1 on noise; 1 of the large size); memory is what is needed beyond the "
        "vectors.\n\n" + "\n\n".join(notes),
        ("images × captions", "hit@1", "what is computed", "CPU s", "wall s", "MB"),
        rows,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        folder, name, contender = Path(sys.argv[2]), *sys.argv[3:5]
        if contender == "make":
            make(folder, name)
        else:
            run(folder, name, contender)
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has CLIP_benchmark")
        parser.add_argument("--repetitions", type=int, default=6)
        parser.add_argument("--quick", action="store_true", help="only the usual size")
        options = parser.parse_args()
        main(options.peers_python, options.repetitions, options.quick)
