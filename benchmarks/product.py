"""A model as a product: scores with intervals, size, speed, and a page of everyday searches to look at.

    .venv/bin/python -m benchmarks.product DATA                       # the built-in model
    .venv/bin/python -m benchmarks.product DATA RUN --compare builtin  # a run of diptych train beside it

DATA is the data folder of the recipe builtin.toml. The page shows what 40 sentences, as people type them, find among
2,000 photos that the built-in model was not trained on (Flickr8k's test and COCO's val split).
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from pathlib import Path

from benchmarks.table import machine, write_section
from indexes.vectors import exact_search
from retrieval.bundle import MODEL_FILE
from retrieval.embedding import EmbeddingCache, encode_pictures, encode_sentences, read_all
from retrieval.encoders import Encoder, find_bundle, load_encoder
from retrieval.evaluation import Evaluation, Settings, classify, evaluate
from retrieval.images import read_photo
from retrieval.library import Match
from retrieval.pairs import Record, read_pairs
from retrieval.report import write_results_page

PHOTOS = (("flickr8k/captions.jsonl", "test"), ("coco/captions.jsonl", "val"))
LABELLED = (("Caltech-101", "labelled/caltech101.jsonl"), ("VOC, 5 classes", "labelled/voc_subset.jsonl"))
QUERIES = (
    "a dog running on the beach",
    "two dogs playing in snow",
    "a black cat",
    "a cat sleeping on a sofa",
    "birds on a wire",
    "horses in a field",
    "a cow eating grass",
    "an elephant",
    "zebras",
    "a giraffe",
    "a bear",
    "sheep",
    "a train at a station",
    "a red double-decker bus",
    "an old car",
    "motorcycles parked in a row",
    "a bicycle leaning against a wall",
    "an aeroplane in the sky",
    "boats in a harbour",
    "a traffic light at night",
    "a birthday cake with candles",
    "pizza",
    "a bowl of fruit",
    "a cup of coffee on a table",
    "people eating in a restaurant",
    "a child blowing bubbles",
    "a baby",
    "a wedding",
    "a man with a beard",
    "a woman wearing sunglasses",
    "children playing football",
    "a surfer riding a wave",
    "skiing down a mountain",
    "a skateboarder jumping",
    "a tennis player hitting the ball",
    "someone climbing a rock",
    "swimming pool",
    "sunset over the sea",
    "a kitchen",
    "a laptop on a desk",
)
_SHOWN = 6  # pictures for each query
_TIMED = 128  # pictures and captions of the speed rows, after as many to warm up


def percent(result: Evaluation, key: str) -> str:
    """A measure, its interval, and by how much it differs from the other model's."""
    low, high = result.intervals[key]
    cell = f"{100 * result.metrics[key]:.1f} ({100 * low:.1f}-{100 * high:.1f})"
    if result.comparison:
        low, high = result.comparison.intervals[key]
        cell += f"; {100 * result.comparison.differences[key]:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return cell


def scores(encoder: Encoder, data: Path, other: Encoder | None) -> list[tuple[str, str]]:
    """(what, figures) for each test of the data folder."""
    settings, rows = Settings(bootstrap=1000), []
    for file, split in PHOTOS:
        result = evaluate(encoder, read_pairs(data / file, split), settings, other=other)
        name = f"{Path(file).parent.name} {split}"
        rows += [
            (f"{name}, {way} hit@{k}, %", percent(result, f"{way}_hit@{k}")) for way in ("t2i", "i2t") for k in (1, 10)
        ]
    for name, file in LABELLED:
        result = classify(encoder, read_pairs(data / file), settings, other=other)
        rows.append((f"{name}, zero-shot top-1, %", percent(result, "top1")))
    return rows


def cpu_seconds(work: Callable[[], object]) -> float:
    """User and system time of this process."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def speed(encoder: Encoder, records: list[Record]) -> list[tuple[str, str]]:
    """How many decoded photos and captions are encoded in a second of one core."""
    photos = list(read_all(lambda _, content: read_photo(content).image, [r.image for r in records[:_TIMED]]))
    batches = [photos[start : start + 8] for start in range(0, len(photos), 8)]
    texts = [record.texts[0] for record in records[:_TIMED]]

    def per_second(work: Callable[[], object]) -> str:
        work()  # the first run sets up
        return f"{_TIMED / min(cpu_seconds(work) for _ in range(3)):.0f}"

    return [
        ("photos encoded a second of one core", per_second(lambda: [encoder.encode_images(part) for part in batches])),
        ("sentences encoded a second of one core", per_second(lambda: [encoder.encode_texts([t]) for t in texts])),
    ]


def page(encoder: Encoder, records: list[Record], file: Path) -> None:
    """Write what the everyday queries find."""
    cache = EmbeddingCache(encoder.fingerprint, encoder.dim)
    pictures = [Path(str(record.image)) for record in records]
    vectors = encode_pictures(encoder, pictures, cache=cache)
    hits = exact_search(vectors, encode_sentences(encoder, QUERIES), _SHOWN)
    results = []
    for query, rows, found in zip(QUERIES, hits.rows, hits.scores, strict=True):
        matches = [
            Match(pictures[row].name, float(score), pictures[row], None, None, None, int(row))
            for row, score in zip(rows, found, strict=True)
        ]
        results.append((query, matches))
    write_results_page(results, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", nargs="?", default="builtin")
    parser.add_argument("--compare", help="another model: differences, with paired intervals")
    parser.add_argument("--page", type=Path, default=Path("everyday.html"), help="where the searches go")
    options = parser.parse_args()
    encoder = load_encoder(options.model)
    other = load_encoder(options.compare) if options.compare else None
    records = [record for file, split in PHOTOS for record in read_pairs(options.data / file, split)]
    rows = scores(encoder, options.data, other) + speed(encoder, records)
    folder = find_bundle(options.model)
    if folder:
        size = sum(file.stat().st_size for file in folder.iterdir() if file.name != MODEL_FILE)
        rows.append(("size, MB", f"{size / 1e6:.1f}"))
    page(encoder, records, options.page)
    against = f", and the difference to {options.compare}" if other else ""
    write_section(
        f"The model {encoder.name}",
        f"`python -m benchmarks.product DATA` on {machine()}: with 95 % intervals{against}.",
        ("what", "figure"),
        rows,
    )
    print(f"{options.page}: {len(QUERIES)} searches to look at")


if __name__ == "__main__":
    main()
