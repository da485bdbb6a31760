"""What generators on the shared space are worth: Flickr8k, the built-in model, vectors from the embedding cache.

python -m benchmarks.generation DATA [--threads 2] [--gan FOLDER] [--only vectors|pictures]

DATA is the folder of the shared data. Everything but the GAN is fitted here, in minutes; a GAN takes an hour and a half
of one core, or minutes of a GPU, and one that `diptych imagine fit` made before is measured with --gan. CPU seconds, in
this process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.table import machine, write_section
from indexes.vectors import Vectors, as_vectors
from retrieval.embedding import EmbeddingCache, encode_pictures
from retrieval.encoders import BUILTIN, Encoder, load_encoder
from retrieval.heads.generation import storage
from retrieval.heads.generation.autoencoder import Autoencoder
from retrieval.heads.generation.fitting import KINDS, evaluate, fit, settings_of
from retrieval.heads.generation.gan import LOG
from retrieval.heads.generation.material import Material, material_of_pairs
from retrieval.heads.generation.scores import area_under_curve
from retrieval.metrics import evaluate_retrieval
from retrieval.pairs import read_pairs

ODD = ("caltech101", "imagenet_sample1000")
ODD_PICTURES = 500  # of each, evenly spread
CELLS = ("reconstruction", "kl", "rebuilt", "hits", "denoised", "search")
Score = Callable[[Vectors], NDArray[np.floating]]
NOISE = 0.5  # length of the noise that is to be taken away, beside a vector of length 1


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def odd_vectors(data: Path, encoder: Encoder, cache: EmbeddingCache) -> dict[str, Vectors]:
    found = {}
    for name in ODD:
        records = read_pairs(data / "labelled" / f"{name}.jsonl")
        every = records[:: max(1, len(records) // ODD_PICTURES)][:ODD_PICTURES]
        found[name] = encode_pictures(encoder, [record.image for record in every], cache=cache)
    return found


def image_hits(images: Vectors, material: Material) -> float:
    """hit@10 of test's sentences among these vectors of its pictures, in the order of the part."""
    rows, spoken = material.parts["test"], material.spoken("test")
    place = np.searchsorted(rows, material.owner[spoken])
    return evaluate_retrieval(images, material.texts[spoken], place)["t2i_hit@10"]


def auc(score: Score, test: Vectors, odd: dict[str, Vectors]) -> str:
    return " / ".join(f"{area_under_curve(score(odd[name]), score(test)):.3f}" for name in ODD)


def pca(train: Vectors, rows: Vectors, count: int) -> Vectors:
    mean = train.mean(0)
    _, _, directions = np.linalg.svd(train - mean, full_matrices=False)
    return as_vectors(mean + (rows - mean) @ directions[:count].T @ directions[:count])


def vectors(material: Material, odd: dict[str, Vectors], threads: int) -> None:
    test, train = (material.images[material.parts[part]] for part in ("test", "train"))
    noise = np.random.default_rng(0).standard_normal(test.shape, np.float32)
    noisy = as_vectors(test + NOISE * as_vectors(noise))
    rows: list[tuple[object, ...]] = []
    mean = as_vectors(train.mean(0, keepdims=True))[0]

    def line(name: str, score: Score, **cells: str) -> None:
        rows.append((name, *(cells.get(column, "") for column in CELLS), auc(score, test, odd), cells.get("cpu", "")))

    def rebuilding(rebuild: Callable[[Vectors], Vectors]) -> dict[str, str]:
        whole, clean = rebuild(test), rebuild(noisy)
        return {
            "rebuilt": f"{(whole * test).sum(1).mean():.3f}",
            "hits": percent(image_hits(whole, material)),
            "denoised": f"{(noisy * test).sum(1).mean():.3f} → {(clean * test).sum(1).mean():.3f}",
        }

    line("as they are", lambda v: -(v @ mean), hits=percent(image_hits(test, material)))
    line("mean of the 5 nearest in train", lambda v: -np.sort(v @ train.T, axis=1)[:, -5:].mean(1))
    for count in (settings_of("vae", {}).latent, settings_of("denoiser", {}).latent):  # type: ignore[union-attr]
        line(
            f"PCA, {count}",
            lambda v, n=count: -(pca(train, v, n) * v).sum(1),  # type: ignore[misc]
            **rebuilding(lambda v, n=count: pca(train, v, n)),  # type: ignore[misc]
        )
    with tempfile.TemporaryDirectory() as scratch:
        for kind in KINDS:
            if kind == "gan":
                continue
            began = time.process_time()
            generator = fit(material, kind, settings_of(kind, {}), Path(scratch) / kind, threads=threads, note=print)
            cells = {"cpu": f"{time.process_time() - began:.0f}"}
            result = evaluate(generator, material, lambda: None)  # type: ignore[arg-type, return-value]
            print(kind, json.dumps(result), json.dumps(storage.told(Path(scratch) / kind).get("shares")), flush=True)
            if "search" in result:
                share, ways = result["search"]["share"], ("without", "with", "translated alone")
                before, after, alone = (percent(result["search"][way]["t2i_hit@10"]) for way in ways)
                cells["search"] = f"{before} → {after} (share {share:g}; alone {alone})"
            if isinstance(generator, Autoencoder):
                cells["reconstruction"] = f"{result['rebuilt']['reconstruction']:.1f}"
                cells["kl"] = f"{result['rebuilt']['kl']:.1f}" if generator.beta else ""
                cells |= rebuilding(lambda v, g=generator: g.rebuild({"image": v})["image"])  # type: ignore[misc]
                line(f"`{kind}`", lambda v, g=generator: g.oddness({"image": v}), **cells)  # type: ignore[misc]
            else:
                rows.append((f"`{kind}`", *(cells.get(column, "") for column in CELLS), "", cells["cpu"]))
    text = (
        f"`python -m benchmarks.generation DATA --only vectors` on {machine()}, "
        f"{threads} thread{'s' if threads > 1 else ''}: Flickr8k, built-in model, vectors from the cache; fitted on "
        "train, chosen on val, measured on test. Reconstruction: half the squared error of a vector in units in which "
        f"its {test.shape[1]} numbers are about 1; joint kinds see picture and sentence there, and the picture alone "
        "in the next columns. Rebuilt: mean cosine to the vector, and hit@10 (percent) of sentences among rebuilt "
        f"pictures. Denoised: cosine before and after, noise of length {NOISE}. Search: hit@10 of sentences without "
        "and with the prior, by the share chosen on val, and translated wholly. Odd: area under the ROC curve of "
        f"telling {' / '.join(ODD)} pictures ({ODD_PICTURES} of each at most) from Flickr8k's test pictures (first "
        "line: distance to the mean)."
    )
    columns = ["", "reconstruction", "KL (nats)", "rebuilt", "hit@10 rebuilt", "denoised", "search", "odd", "CPU s"]
    write_section("Generators: vectors", text, columns, rows)


def pictures(material: Material, encoder: Encoder, folder: Path) -> None:
    generator, told = storage.load(folder), storage.told(folder)
    result = evaluate(generator, material, lambda: encoder)
    print(json.dumps(result))
    log = [json.loads(line) for line in (folder / LOG).read_text("utf-8").splitlines()]
    settings = told["settings"]
    names = {
        "frechet": "Fréchet distance, image tower (lower is better)",
        "finds_hit@1": "finds its sentence, hit@1 (%)",
        "finds_hit@5": "hit@5 (%)",
        "finds_hit@10": "hit@10 (%)",
        "cosine": "cosine to its sentence",
        "distance": "distance between pictures of different sentences",
        "distance_again": "of the same sentence",
        "coverage": "coverage of real pictures (%)",
    }
    rows = [
        (
            words,
            *(
                ""
                if name not in result[side]
                else percent(result[side][name])
                if "%" in words
                else f"{result[side][name]:.3f}"
                for side in ("made", "real")
            ),
        )
        for name, words in names.items()
    ]
    text = (
        f"`python -m benchmarks.generation DATA --only pictures --gan FOLDER` on {machine()}: {result['side']} × "
        f"{result['side']} pixels, {told['steps']:,} steps of {settings['batch']} pictures "
        f"({told['steps'] * settings['batch'] / len(material.parts['train']):.0f} passes over "
        f"{len(material.parts['train']):,} photos of Flickr8k), {told['parameters']:,} weights, objective "
        f"{settings['objective']}. One picture for each of {result['pictures']:,} test photos' first sentences, beside "
        "the real photos at the same size; "
        f"by chance hit@10 is {percent(result['chance_hit@10'])} %. Diversity in pixels at the end of training: "
        f"{log[-1]['diversity']:.2f} of the real pictures'. A small research head: colours and outlines."
    )
    write_section("Generators: small pictures", text, ["", "made", "real, as small"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gan", type=Path, help="a folder that `diptych imagine fit` made on the same data")
    parser.add_argument("--only", choices=["vectors", "pictures"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder = load_encoder(BUILTIN, threads=options.threads)
    material = material_of_pairs(options.data / "flickr8k" / "captions.jsonl", encoder, BUILTIN, note=print)
    if options.only != "pictures":
        cache = EmbeddingCache(encoder.fingerprint, encoder.dim)
        vectors(material, odd_vectors(options.data, encoder, cache), options.threads)
    if options.only != "vectors":
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.gan or Path(scratch) / "gan"
            if not options.gan:
                fit(material, "gan", settings_of("gan", {}), folder, threads=options.threads, note=print)
            pictures(material, encoder, folder)


if __name__ == "__main__":
    main()
