"""open_clip's tokenizers as a `tokenizer.json`, so that a bundle reads text without open_clip, transformers or torch.

open_clip cleans a text in Python first: ftfy, `html.unescape`, white space, lower case or punctuation. The normaliser
here does the same as far as the rules of `tokenizers` go. What it cannot do is to guess encodings: text that was
decoded wrongly (``cafÃ©``), rare HTML entities, and a Greek sigma at the end of a word come out otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import product
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from retrieval.errors import ModelError

# The words of open_clip.tokenizer.SimpleTokenizer.pat, without its special tokens.
_CLIP_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

_ENTITIES = {"lt": "<", "gt": ">", "quot": '"', "apos": "'", "nbsp": " ", "#39": "'", "#x27": "'", "#34": '"'}
_LIGATURES = {"Ĳ": "IJ", "ĳ": "ij", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬆ": "st"}

# Each must give the same ids both ways, or no bundle is written: the everyday, and what is awkward yet common.
_SENTENCES = [
    *(
        f"{start} {thing}{end}"
        for start, thing, end in product(
            ("a photo of a", "Two people next to the", "THE BIG RED", "I can't see my friend's", "12 of 1,999"),
            (
                "dog",
                "birthday cake",
                "T-shirt",
                "café table",
                "skyscraper at night",
                "fire-truck (no. 7)",
                "zebra & foal",
            ),
            (
                "",
                ".",
                " in the snow!",
                " on Mother's Day, 24/12/2023",
                ' ... and it\'s "fine"?',
                " at f/2.8 #photo @home",
            ),
        )
    ),
    "",
    " ",
    "?",
    "  tabs\tand\nline\r\nbreaks   everywhere \u00a0 ",
    "“curly quotes” don’t matter – dashes — do…",
    "fish &amp; chips, 3 &lt; 4, &quot;so&quot; it&#39;s",
    "naïve Übergröße, niño, façade, 東京タワー, Москва, قطة, cafe\u0301",
    "a cat 🐱 and a dog 🐶👍🏽!! :-)",
    "C++ x_y snake_case e-mail@example.org https://example.org/a?b=c",
    "word " * 200,
    "a dog, a cat, " * 30,
]


def to_json(tokenizer: Any, context_length: int, any_length: bool) -> str:
    """Convert an open_clip tokenizer, truncation and padding set.

    Args:
        tokenizer: open_clip's SimpleTokenizer, or its HFTokenizer over a fast tokenizer of transformers.
        context_length: ids that the text tower takes at most.
        any_length: pad to the longest text of a batch, where the tower takes any length, not to the context length.

    Raises:
        ModelError: a kind that cannot be converted, or ids differ on the sentences that are tried.
    """
    if hasattr(tokenizer, "bpe_ranks"):
        converted, pad, side = _clip_bpe(tokenizer), {"pad_id": 0, "pad_token": tokenizer.decoder[0]}, "right"
    elif getattr(getattr(tokenizer, "tokenizer", None), "is_fast", False):
        fast = tokenizer.tokenizer
        converted, side = _hugging_face(tokenizer), fast.truncation_side
        pad = {"pad_id": fast.pad_token_id, "pad_token": fast.pad_token, "direction": fast.padding_side}
    else:
        raise ModelError(f"the tokenizer {type(tokenizer).__name__} cannot be written as tokenizer.json")
    converted.enable_truncation(context_length, direction=side)
    converted.enable_padding(length=None if any_length else context_length, **pad)
    _check(converted, tokenizer, context_length, int(pad["pad_id"]))
    return str(converted.to_str())


def identity(tokenizer: Any) -> str:
    """Put what decides a tokenizer's ids into text to be hashed: its kind, vocabulary and settings."""
    backend = getattr(getattr(tokenizer, "tokenizer", None), "backend_tokenizer", None)
    content = backend.to_str() if backend else sorted(getattr(tokenizer, "encoder", {}).items())
    settings = {
        key: getattr(value, "__name__", value)
        for key, value in vars(tokenizer).items()
        if key in ("context_length", "clean_fn", "reduction_fn", "strip_sep_token", "tokenizer_mode")
    }
    return json.dumps([type(tokenizer).__name__, settings, content], sort_keys=True, default=repr)


def _clip_bpe(tokenizer: Any) -> Tokenizer:
    start, end = (tokenizer.decoder[i] for i in (tokenizer.sot_token_id, tokenizer.eot_token_id))
    converted = Tokenizer(models.BPE(tokenizer.encoder, list(tokenizer.bpe_ranks), end_of_word_suffix="</w>"))
    converted.add_special_tokens([AddedToken(token, normalized=True) for token in (start, end)])
    converted.normalizer = normalizers.Sequence(list(_cleaning(tokenizer)))
    converted.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    converted.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, tokenizer.sot_token_id), (end, tokenizer.eot_token_id)],
    )
    converted.decoder = decoders.ByteLevel()
    return converted


def _hugging_face(tokenizer: Any) -> Tokenizer:
    described = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
    if tokenizer.strip_sep_token:  # open_clip puts a zero in its place
        separator = tokenizer.tokenizer.sep_token
        for special in (described["post_processor"] or {}).get("special_tokens", {}).values():
            if special["id"] == separator:
                special["ids"] = [0]
    converted = Tokenizer.from_str(json.dumps(described))
    own = [converted.normalizer] if converted.normalizer else []
    converted.normalizer = normalizers.Sequence([*_cleaning(tokenizer), *own])
    return converted


def _cleaning(tokenizer: Any) -> Iterable[normalizers.Normalizer]:
    """List the steps of open_clip.tokenizer's clean function, told from what it does to a sample."""
    yield normalizers.Replace(Regex("&(amp|AMP);"), "&")
    yield normalizers.Replace(Regex("&(amp|AMP);"), "&")  # unescaped twice
    for entity, character in _ENTITIES.items():
        yield normalizers.Replace(f"&{entity};", character)
    # ftfy: ligatures, quotes, terminal colours, control characters
    for ligature, letters in _LIGATURES.items():
        yield normalizers.Replace(ligature, letters)
    yield normalizers.Replace(Regex("[\u02bc\u2018-\u201b]"), "'")
    yield normalizers.Replace(Regex("[\u201c-\u201f]"), '"')
    yield normalizers.Replace(Regex(r"\x1b\[[\d;]*[a-zA-Z]"), "")
    yield normalizers.Replace(Regex(r"[\x00-\x08\x0b\x0e-\x1f\x7f\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]"), "")
    yield normalizers.NFC()
    cleaned = tokenizer.clean_fn("A_b, C") if hasattr(tokenizer, "clean_fn") else "a b c"
    if cleaned == "a b c":  # "canonicalize"
        yield normalizers.Replace("_", " ")
        yield normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")
    if cleaned.islower():  # "lower" and "canonicalize"
        yield normalizers.Lowercase()
    yield normalizers.Replace(Regex(r"\s+"), " ")
    yield normalizers.Strip()


def _check(converted: Tokenizer, tokenizer: Any, context_length: int, pad: int) -> None:
    expected = tokenizer(_SENTENCES, context_length=context_length).tolist()
    for sentence, row in zip(_SENTENCES, expected, strict=True):
        ids = converted.encode(sentence).ids
        if [*ids, *[pad] * (len(row) - len(ids))] != row:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} cannot be written as tokenizer.json: "
                f"the ids of {sentence[:60]!r} would differ"
            )
