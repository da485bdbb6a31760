"""How good the decoders are on Flickr8k's test photos, and what a caption costs.

python -m benchmarks.captions DATA DECODER [TEXTONLY]

DATA is the folder of the shared data. DECODER was made from pairs (`builtin`: the one that ships), TEXTONLY from
captions alone, by the recipe of that name. Beside them stands the consensus of near captions of Flickr8k's train
photos, which is made here. What is not in the embedding cache yet is encoded first, and does not count.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.table import machine, write_section
from retrieval.embedding import EmbeddingCache, encode_pictures
from retrieval.encoders import BUILTIN, load_encoder
from retrieval.heads.captioning.decoders import CaptionDecoder, decode_all, decoder_of, load_decoder
from retrieval.heads.captioning.evaluation import CaptionScores, evaluate
from retrieval.heads.captioning.making import fit_decoder
from retrieval.heads.captioning.recipe import CaptionRecipe, CaptionSource
from retrieval.pairs import read_pairs

BLEU_4, SHARE, MEGABYTES = 0.18, 0.7, 15.0  # the bars: with pairs; of that, from text alone; what ships
COLUMNS = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D", "self hit@1", "self hit@10", "ms a caption"]
NEAR = CaptionRecipe(
    (CaptionSource("flickr8k/captions.jsonl", learn_from="text", split="train"),), name="consensus", kind="consensus"
)


def measured(name: str, result: CaptionScores, milliseconds: float) -> list[str]:
    one = result.metrics
    shares = [f"{100 * one[f'bleu_{n}']:.1f}" for n in (1, 2, 3, 4)] + [f"{100 * one['rouge_l']:.1f}"]
    hits = [f"{100 * one[f'self_hit@{k}']:.1f}" for k in (1, 10)]
    return [name, *shares, f"{one['cider_d']:.3f}", *hits, f"{milliseconds:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("decoder", type=str)
    parser.add_argument("text_only", type=Path, nargs="?")
    options = parser.parse_args()
    encoder = load_encoder(BUILTIN)
    records = read_pairs(options.data / "flickr8k" / "captions.jsonl", "test")
    cache = EmbeddingCache(encoder.fingerprint, encoder.dim)
    vectors = encode_pictures(encoder, [record.image for record in records], cache=cache)
    place = decoder_of(BUILTIN) if options.decoder == BUILTIN else Path(options.decoder)
    rows, bleu = [], {}

    def add(what: str, decoder: CaptionDecoder, beams: int) -> None:
        began = time.process_time()
        decode_all(decoder, vectors, beams)
        milliseconds = 1000 * (time.process_time() - began) / len(vectors)
        result = evaluate(decoder, encoder, records, beams=beams)
        bleu[what, beams] = result.metrics["bleu_4"]
        how = "" if what == "consensus" else ", greedy" if beams == 1 else f", {beams} beams"
        rows.append(measured(what + how, result, milliseconds))

    pairs = load_decoder(place, encoder.fingerprint)
    for beams in (1, 3, 5):
        add("pairs", pairs, beams)
    if options.text_only:
        text_only = load_decoder(options.text_only, encoder.fingerprint)
        for beams in (1, 3):
            add("text alone", text_only, beams)
    with tempfile.TemporaryDirectory() as folder:
        fit_decoder(NEAR, options.data, encoder, BUILTIN, Path(folder) / "near")
        add("consensus", load_decoder(Path(folder) / "near", encoder.fingerprint), 1)
    size = sum(file.stat().st_size for file in place.iterdir()) / 1e6
    own = bleu["pairs", 3]
    lines = [
        f"BLEU-4 from pairs {100 * own:.1f} (bar {100 * BLEU_4:.0f}: {met(own >= BLEU_4)})",
        f"{size:.1f} MB (bar {MEGABYTES:.0f}: {met(size <= MEGABYTES)})",
    ]
    if options.text_only:
        share = bleu["text alone", 3] / own
        lines.insert(1, f"from text alone {100 * share:.0f} % of it (bar {100 * SHARE:.0f} %: {met(share >= SHARE)})")
    given = "DATA DECODER" + (" TEXTONLY" if options.text_only else "")
    text = (
        f"`python -m benchmarks.captions {given}` on {machine()}, one thread: the {len(records):,} test photos of "
        f"Flickr8k, vectors of the built-in model; CPU ms from a stored vector to its caption. With three beams: "
        f"{'; '.join(lines)}."
    )
    write_section("Captions", text, ["decoder", *COLUMNS], rows)


def met(yes: bool) -> str:
    return "met" if yes else "MISSED"


if __name__ == "__main__":
    main()
