"""What each fusion classifier costs and is worth on labelled pictures with texts, from cached embeddings.

python -m benchmarks.heads DATA [--threads 2]

DATA is the folder of the shared data: its `tweets` are 4,000 pictures with a text and a sentiment. Processor seconds,
in this process; what is not in the embedding cache yet is encoded first, and does not count.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from benchmarks.table import machine, write_section
from retrieval.embedding import EmbeddingCache, cache_name
from retrieval.encoders import BUILTIN, load_encoder
from retrieval.heads.classify import ClassifySettings, fit
from retrieval.heads.modalities import encode_examples
from retrieval.heads.results import ModelScores
from retrieval.pairs import read_examples

EACH, ALL = 120, 600  # seconds: the bars


def percent(scores: ModelScores, measure: str) -> str:
    low, high = scores.test.intervals[measure]
    return f"{100 * scores.test[measure]:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    file = options.data / "tweets" / "captions.jsonl"
    encoder = load_encoder(BUILTIN)
    examples = read_examples(file)
    encode_examples(examples, ("image", "text"), (), encoder, cache=EmbeddingCache(cache_name(encoder), encoder.dim))
    torch.set_num_threads(options.threads)
    wall = time.perf_counter()
    with threadpool_limits(options.threads):
        result, _ = fit(file, lambda: encoder, BUILTIN, ClassifySettings(explain=True))
    wall = time.perf_counter() - wall
    everyone = [*result.baselines, *(one for one in result.models.values() if not one.modality)]
    rows = [
        (
            f"{one.modality}: {one.name}"
            if one.modality
            else f"**{one.name}**"
            if one.name == result.chosen
            else one.name,
            f"{100 * one.val:.1f}",
            percent(one, "macro_f1"),
            percent(one, "accuracy"),
            f"{one.seconds:.1f}",
        )
        for one in everyone
    ]
    slowest = max(everyone, key=lambda one: one.seconds)
    met = "met" if slowest.seconds < EACH else "MISSED"
    whole = "met" if max(wall, result.seconds) < ALL else "MISSED"
    graph = ", ".join(
        f"{way} hit@10 {100 * result.sharing['before'][f'{way}_hit@10']:.1f} before and "
        f"{100 * result.sharing['after'][f'{way}_hit@10']:.1f} after"
        for way in ("t2i", "i2t")
    )
    threads = "1 thread" if options.threads == 1 else f"{options.threads} threads"
    text = (
        f"`python -m benchmarks.heads DATA` on {machine()}, {threads}: {len(examples):,} tweets, "
        "built-in model, vectors from the cache; test in percent with 95 % intervals, CPU seconds. In bold: chosen on "
        "val.\n\n"
        f"The slowest, {slowest.name}, takes {slowest.seconds:.0f} CPU s (bar {EACH}: {met}); all of `fit` with the "
        f"report's figures {result.seconds:.0f} CPU s, {wall:.0f} s (bar {ALL}: {whole}). {result.verdict[0].upper()}"
        f"{result.verdict[1:]}. The graph's outputs as a shared space: {graph}."
    )
    write_section(
        "Fusion classifiers", text, ["model", "val macro-F1", "test macro-F1", "test accuracy", "CPU s"], rows
    )


if __name__ == "__main__":
    main()
