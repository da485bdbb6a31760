"""Records what COCO's caption evaluation says of invented captions, for the tests to compare with.

pip install pycocoevalcap==1.2       (in an environment of its own)
python benchmarks/peer_captions.py   writes tests/data/caption_metrics.json

Its Bleu, Rouge and Cider, without its tokenizer, which needs Java: the captions have no capitals and no punctuation.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parents[1] / "tests" / "data" / "caption_metrics.json"
WHO = ["a man", "two dogs", "a small boy", "the old woman", "three children", "someone's cat", "a girl in a red coat"]
DOES = ["runs along", "jumps over", "is sitting on", "looks at", "plays near", "sleeps beside", "climbs up"]
WHERE = ["the wet grass", "a wooden fence", "the beach at dusk", "a pile of snow", "an empty road", "a blue car"]
MORE = ["", "", "with a ball", "in the rain", "while others watch", "and smiles"]
EDGES = {
    "a dog": ["a dog runs through the grass", "a dog"],
    "the the the the the the the": ["the cat is on the mat", "there is a cat on the mat"],
    "a man on a horse jumps over a fence and then another fence again": ["a man on a horse", "a horse jumps a fence"],
    "dog": ["a man and a dog", "dog"],
}


def sentence(draw: random.Random) -> str:
    return " ".join(filter(None, map(draw.choice, (WHO, DOES, WHERE, MORE))))


def changed(text: str, draw: random.Random) -> str:
    """Up to three words left out, put in or replaced."""
    words = text.split()
    for _ in range(draw.randint(0, 3)):
        place = draw.randrange(len(words))
        what = draw.randint(0, 2)
        if what == 0 and len(words) > 2:
            words.pop(place)
        elif what == 1:
            words.insert(place, draw.choice(["very", "the", "dog", "quickly", "a"]))
        else:
            words[place] = draw.choice(["stone", "walks", "big", "man"])
    return " ".join(words)


def drawn(count: int, references: tuple[int, int], seed: int) -> tuple[list[str], list[list[str]]]:
    draw = random.Random(seed)
    said, theirs = [], []
    for _ in range(count):
        base = sentence(draw)
        theirs.append([changed(base, draw) for _ in range(draw.randint(*references))])
        said.append(changed(base, draw) if draw.random() < 0.8 else sentence(draw))
    return said, theirs


def scores(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    theirs, ours = dict(enumerate(references)), {i: [text] for i, text in enumerate(said)}
    bleu, _ = Bleu(4).compute_score(theirs, ours, verbose=0)
    _, rouge = Rouge().compute_score(theirs, ours)
    _, cider = Cider().compute_score(theirs, ours)
    each = {"rouge_l_each": list(map(float, rouge)), "cider_d_each": list(map(float, cider))}
    return {"said": said, "references": references, "bleu": bleu, **each}


def main() -> None:
    cases = {
        "five references each": drawn(12, (5, 5), 1),
        "one reference each": drawn(8, (1, 1), 2),
        "one to four references": drawn(15, (1, 4), 3),
        "too short, too long, repeated": (list(EDGES), list(EDGES.values())),
    }
    found = {name: scores(*case) for name, case in cases.items()}
    made = {"written by": "python benchmarks/peer_captions.py", "pycocoevalcap": version("pycocoevalcap")}
    RECORDED.write_text(json.dumps({**made, "cases": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
