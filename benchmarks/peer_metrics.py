"""Our measures beside those of CLIP_benchmark, open_clip, trec_eval, ranx and scikit-learn, on data without ties.

python -m benchmarks.peer_metrics DATA            # DATA holds flickr8k; writes tests/data/peer_metrics.json
python -m benchmarks.peer_metrics DATA --check    # writes nothing; fails if any number differs by more than 1e-6

It needs the peers: `pip install 'diptych[bench]'`. What was recorded is compared with ours in every test run
(tests/retrieval/test_metrics_peers.py), without the peers.

Nothing here is tied, and in what is generated no wrong item comes so near to a right one that float32 could swap them:
peers leave the order of equal scores to chance, and round as their product does.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from indexes.vectors import as_vectors
from retrieval.metrics import evaluate_classification, measure
from retrieval.ranks import rank_pairs

RECORDED = Path(__file__).parents[1] / "tests" / "data" / "peer_metrics.json"
PEERS = ("clip-benchmark", "open_clip_torch", "pytrec-eval-terrier", "ranx", "scikit-learn", "torch", "numpy")
KS = (1, 5, 10)
GAP = 1e-6  # the least distance of a right score from a wrong one in generated cases; float32 errs by less at 32-d
EQUAL = 1e-6
BATCH = 64  # CLIP_benchmark's default


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Images, texts, and which belong together."""

    images: np.ndarray  # (N, D) float32
    texts: np.ndarray  # (M, D) float32
    image_rows: np.ndarray  # (P,)
    text_rows: np.ndarray  # (P,)

    @property
    def checksum(self) -> str:
        digest = hashlib.sha256()
        for array in (self.images, self.texts, self.image_rows.astype("<i8"), self.text_rows.astype("<i8")):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def right(self) -> np.ndarray:
        """(N, M) booleans."""
        table = np.zeros((len(self.images), len(self.texts)), bool)
        table[self.image_rows, self.text_rows] = True
        return table

    def scores(self) -> np.ndarray:
        """(N, M) cosines, summed in float64."""
        return as_vectors(self.images).astype(np.float64) @ as_vectors(self.texts).astype(np.float64).T

    def gap(self) -> float:
        """The least distance between a right and a wrong score of one query."""
        scores, right = self.scores(), self.right()
        least = np.inf
        for table, owned in ((scores, right), (scores.T, right.T)):
            for row, own in zip(table, owned, strict=True):
                if own.any() and not own.all():
                    least = min(least, np.abs(row[own][:, None] - row[~own]).min())
        return float(least)


class Numbers:
    """Random numbers that are the same everywhere and in every release: raw bits, and float32 steps that are exact."""

    def __init__(self, seed: int) -> None:
        self.bits = np.random.PCG64(seed)

    def uniform(self, *shape: int) -> np.ndarray:
        """float32 from -0.5 up to 0.5."""
        raw = self.bits.random_raw(int(np.prod(shape))) >> np.uint64(40)
        return (raw.astype(np.float32) * np.float32(2**-24) - np.float32(0.5)).reshape(shape)

    def below(self, most: int, count: int) -> np.ndarray:
        return ((self.uniform(count) + np.float32(0.5)) * np.float32(most)).astype(np.int64)


def owned(images: np.ndarray, owner: np.ndarray, numbers: Numbers, signal: float) -> Case:
    """Texts that lie in the direction of their image, among noise."""
    noise = numbers.uniform(len(owner), images.shape[1])
    return Case(images, images[owner] * np.float32(signal) + noise, owner, np.arange(len(owner)))


def unrelated(numbers: Numbers) -> Case:
    return owned(numbers.uniform(60, 32), np.repeat(np.arange(60), 5), numbers, 0)


def aligned(numbers: Numbers) -> Case:
    return owned(numbers.uniform(100, 32), np.repeat(np.arange(100), 5), numbers, 0.5)


def one_to_one(numbers: Numbers) -> Case:
    return owned(numbers.uniform(150, 32), np.arange(150), numbers, 0.4)


def ragged(numbers: Numbers) -> Case:
    """0, 1, 2 … captions, and 60 for one image, in no order."""
    owner = np.concatenate([numbers.below(50, 200), np.full(60, 3)])
    return owned(numbers.uniform(50, 32), owner[np.argsort(numbers.uniform(260), kind="stable")], numbers, 0.5)


def distractors(numbers: Numbers) -> Case:
    """Two of three images own nothing, and half of the texts belong to nobody."""
    case = owned(numbers.uniform(120, 32), numbers.below(40, 160), numbers, 0.5)
    return Case(case.images, case.texts, case.image_rows[::2], case.text_rows[::2])


def similar(numbers: Numbers) -> Case:
    """All cosines are above 0.99."""
    base, images, texts = numbers.uniform(32), numbers.uniform(30, 32), numbers.uniform(60, 32)
    small, owner = np.float32(1 / 16), np.arange(60) % 30
    return Case(base + images * small, base + (images[owner] + texts) * (small / 2), owner, np.arange(60))


def several_images(numbers: Numbers) -> Case:
    """Each caption shows up to four images: the graph of images and captions is no forest."""
    pairs = np.unique(np.stack([numbers.below(90, 150), numbers.below(60, 150)], 1), axis=0)
    images, texts = numbers.uniform(90, 32), numbers.uniform(60, 32)
    for image, text in pairs:
        texts[text] += images[image] * np.float32(0.5)
    return Case(images, texts, pairs[:, 0], pairs[:, 1])


CASES: Mapping[str, tuple[Callable[[Numbers], Case], int]] = {  # with the first seed whose gap is wide enough
    "unrelated": (unrelated, 0),
    "aligned": (aligned, 0),
    "one to one": (one_to_one, 0),
    "ragged": (ragged, 0),
    "distractors": (distractors, 0),
    "similar": (similar, 0),
    "several images": (several_images, 0),
}


def generate(name: str) -> Case:
    make, seed = CASES[name]
    return make(Numbers(seed))


def generate_classes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (300, 12) without ties, one right class each (300,), and several (300, 12)."""
    numbers = Numbers(1)
    right = numbers.below(12, 300)
    right[:12] = np.arange(12)
    several = (numbers.uniform(300, 12) > 0.3) | np.eye(12, dtype=bool)[right]
    scores = numbers.uniform(300, 12)
    scores[np.arange(300), right] += np.float32(0.25)
    return scores, right, several


def flickr8k(data: Path) -> Case:
    """The 1,000 test pictures and their captions, by the built-in model; captions that are tied are left out."""
    from retrieval.embedding import EmbeddingCache, encode_pictures, encode_sentences
    from retrieval.encoders import load_encoder
    from retrieval.pairs import read_pairs

    records = read_pairs(data / "flickr8k" / "captions.jsonl", "test")
    encoder = load_encoder("builtin")
    cache = EmbeddingCache(encoder.fingerprint, encoder.dim)
    images = encode_pictures(encoder, [record.image for record in records], cache=cache)
    texts = encode_sentences(encoder, [text for record in records for text in record.texts], cache=cache)
    owner = np.repeat(np.arange(len(records)), [len(record.texts) for record in records])
    return without_ties(Case(images, texts, owner, np.arange(len(owner))))


def without_ties(case: Case) -> Case:
    """Leave out texts until no right score equals a wrong one (in float32), in either direction."""
    owner = case.image_rows
    scores = case.scores().astype(np.float32)
    right = case.right()
    tied = np.array([(scores[:, text] == scores[image, text]).sum() > 1 for text, image in enumerate(owner)])
    for image in range(len(scores)):
        own = scores[image, right[image] & ~tied]
        tied |= np.isin(scores[image], own) & ~right[image]
    kept = np.flatnonzero(~tied)
    return Case(case.images, case.texts[kept], owner[kept], np.arange(len(kept)))


# ---- ours ------------------------------------------------------------------------------------------------------------


def ours(case: Case) -> dict[str, float]:
    return dict(measure(rank_pairs(case.images, case.texts, case.image_rows, case.text_rows), KS))


def our_classes() -> dict[str, float]:
    scores, right, several = generate_classes()
    single = evaluate_classification(scores, np.eye(12, dtype=bool)[right], (1, 5))
    return {**single, "map": evaluate_classification(scores, several)["map"]}


# ---- peers: each returns its numbers under our names -----------------------------------------------------------------


def clip_benchmark(case: Case, scores: np.ndarray | None = None) -> dict[str, float]:
    """As zeroshot_retrieval.evaluate() calls its own functions, but for queries without any right item: those it would
    count as missed. Scores are its own product of unit rows, unless they are given."""
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    images, texts = (torch.from_numpy(as_vectors(rows)) for rows in (case.images, case.texts))
    table = texts @ images.t() if scores is None else torch.from_numpy(scores.T.copy())
    right = torch.from_numpy(case.right().T.copy())
    result = {}
    for way, values, owned_ in (("t2i", table, right), ("i2t", table.T, right.T)):
        asked = owned_.any(dim=1)
        for k in KS:
            recall = batchify(recall_at_k, values[asked], owned_[asked], BATCH, "cpu", k=k)
            result[f"{way}_recall@{k}"] = recall.double().mean().item()
            result[f"{way}_hit@{k}"] = (recall > 0).double().mean().item()
    return result


def open_clip(case: Case) -> dict[str, float]:
    """Of one text for each image. It rounds a median rank down: `floor(t2i_median_rank)`."""
    import torch
    from open_clip_train.train import get_clip_metrics

    images, texts = (torch.from_numpy(as_vectors(rows)) for rows in (case.images, case.texts))
    found = get_clip_metrics(images, texts, torch.tensor(100.0))
    result = {}
    for way, theirs in (("t2i", "text_to_image"), ("i2t", "image_to_text")):
        result |= {f"{way}_hit@{k}": float(found[f"{theirs}_R@{k}"]) for k in KS}
        result[f"{way}_mean_rank"] = float(found[f"{theirs}_mean_rank"])
        result[f"floor({way}_median_rank)"] = float(found[f"{theirs}_median_rank"])
    return result


def _as_dictionaries(scores: np.ndarray, right: np.ndarray) -> tuple[dict, dict]:
    """Judgements and run, of the queries (rows) that have any right item."""
    names = [f"d{i}" for i in range(scores.shape[1])]
    asked = np.flatnonzero(right.any(axis=1)).tolist()
    judged = {f"q{row}": {names[i]: 1 for i in np.flatnonzero(right[row]).tolist()} for row in asked}
    return judged, {f"q{row}": dict(zip(names, scores[row].tolist(), strict=True)) for row in asked}


_TREC = {"map": "map", "recip_rank": "mrr", "Rprec": "r_precision"} | {
    f"{theirs}_{k}": f"{name}@{k}"
    for theirs, name in (("recall", "recall"), ("ndcg_cut", "ndcg"), ("success", "hit"))
    for k in KS
}
_RANX = {"map": "map", "mrr": "mrr", "r-precision": "r_precision"} | {
    f"{theirs}@{k}": f"{name}@{k}"
    for theirs, name in (("recall", "recall"), ("ndcg", "ndcg"), ("hit_rate", "hit"))
    for k in KS
}


def trec_eval(case: Case) -> dict[str, float]:
    """trec_eval itself, through pytrec-eval-terrier."""
    import pytrec_eval

    result = {}
    for way, scores, right in (("t2i", case.scores().T, case.right().T), ("i2t", case.scores(), case.right())):
        judged, run = _as_dictionaries(scores, right)
        asked = {"map", "recip_rank", "Rprec", *(f"{name}.1,5,10" for name in ("recall", "ndcg_cut", "success"))}
        values = pytrec_eval.RelevanceEvaluator(judged, asked).evaluate(run).values()
        for theirs, name in _TREC.items():
            result[f"{way}_{name}"] = float(np.mean([value[theirs] for value in values]))
    return result


def ranx(case: Case) -> dict[str, float]:
    from ranx import Qrels, Run, evaluate

    result = {}
    for way, scores, right in (("t2i", case.scores().T, case.right().T), ("i2t", case.scores(), case.right())):
        judged, run = _as_dictionaries(scores, right)
        values = evaluate(Qrels(judged), Run(run), list(_RANX))
        result |= {f"{way}_{name}": float(values[theirs]) for theirs, name in _RANX.items()}
    return result


def peer_classes() -> dict[str, dict[str, float]]:
    import torch
    from clip_benchmark.metrics.zeroshot_classification import accuracy, average_precision_per_class
    from sklearn.metrics import average_precision_score, balanced_accuracy_score

    scores, right, several = generate_classes()
    table, target = torch.from_numpy(scores), torch.from_numpy(right)
    top1, top5 = accuracy(table, target, topk=(1, 5))
    balanced = float(balanced_accuracy_score(target, table.argmax(axis=1)))  # as its evaluate() does
    precision = average_precision_per_class(table, torch.from_numpy(several)).double().mean().item()
    return {
        "clip-benchmark": {"top1": top1, "top5": top5, "mean_per_class": balanced, "map": precision},
        "scikit-learn": {"map": float(average_precision_score(several, scores, average="macro"))},
    }


def of_peers(name: str, case: Case) -> dict[str, dict[str, float]]:
    """Every peer that can measure this case -> its numbers."""
    result = {"clip-benchmark": clip_benchmark(case), "pytrec-eval-terrier": trec_eval(case), "ranx": ranx(case)}
    return result | ({"open_clip_torch": open_clip(case)} if name == "one to one" else {})


def of_peers_on_flickr8k(case: Case) -> dict[str, dict[str, float]]:
    """The same, of scores that are ours: among 5 million, float32 swaps some."""
    scores = case.scores().astype(np.float32)
    return {"clip-benchmark": clip_benchmark(case, scores), "pytrec-eval-terrier": trec_eval(case), "ranx": ranx(case)}


# ---- comparing -------------------------------------------------------------------------------------------------------


def difference(mine: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """The largest one."""
    with_floors = {**mine, **{f"floor({name})": float(np.floor(value)) for name, value in mine.items()}}
    return max(abs(with_floors[name] - value) for name, value in theirs.items())


def main(data: Path, check: bool) -> None:
    cases = {name: generate(name) for name in CASES}
    for name, case in cases.items():
        assert case.gap() >= GAP, f"{name}: a right and a wrong score are {case.gap():.1e} apart"
    photos = flickr8k(data)
    found = {name: of_peers(name, case) for name, case in cases.items()}
    found["flickr8k"] = of_peers_on_flickr8k(photos)
    found["classification"] = peer_classes()
    mine = {name: ours(case) for name, case in (*cases.items(), ("flickr8k", photos))}
    mine["classification"] = our_classes()
    worst = 0.0
    for name, by_peer in found.items():
        for peer, numbers in by_peer.items():
            largest = difference(mine[name], numbers)
            worst = max(worst, largest)
            print(f"{name:16} {peer:20} {len(numbers):3} numbers, at most {largest:.1e} apart")
    literal = clip_benchmark(photos)
    print(f"flickr8k with CLIP_benchmark's own float32 product: at most {difference(mine['flickr8k'], literal):.1e}")
    if worst > EQUAL:
        sys.exit(f"a peer disagrees: {worst:.1e} apart, more than {EQUAL:.0e}")
    if not check:
        record = {
            "written by": "python -m benchmarks.peer_metrics DATA",
            "versions": {peer: version(peer) for peer in PEERS},
            "seeds": {name: seed for name, (_, seed) in CASES.items()},
            "checksums": {name: case.checksum for name, case in cases.items()},
            "texts of flickr8k": len(photos.texts),
            "numbers": found,
        }
        RECORDED.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        print(f"wrote {RECORDED}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--check" in sys.argv[2:])
