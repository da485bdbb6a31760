from __future__ import annotations

import json

import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from retrieval.errors import ModelError
from retrieval.training.tokenizer_json import identity, to_json

CLIP = open_clip.SimpleTokenizer()

AWKWARD = [
    "",
    "\t\n ",
    "A",
    "THE CAT’S “whiskers” – and it's NOT 100% fun…",
    "they'll we've I'M you'd don't 'tis rock'n'roll 'S",
    "fish &amp; chips &amp;amp; 3 &lt; 4 &gt; 2 &quot;so&quot; it&#39;s &nbsp; fine",
    "R&D at AT&T, Q&A",
    "ﬁne ﬂowers, oﬀice",
    "zero\x00width\ufeff\x1f and \x1b[31mred\x1b[0m text\x7f",
    "no\u00a0break\u3000ideographic\u2028line\u2029paragraph\x0cpage",
    "cafe\u0301 and café, ÅNGSTRÖM, Straße, İstanbul",
    "日本語のテキスト 한국어 עברית العربية ภาษาไทย हिन्दी",
    "🐶🐱👨‍👩‍👧‍👦 🇩🇪 ❤️ ☕",
    "x²+y₃=½ Ⅳ ① 2023-12-24T18:00",
    "a_b-c/d\\e|f~g`h^i@j#k$l%m*n(o)p[q]r{s}t<u>v=w+x?y!z",
    "<start_of_text>a dog<end_of_text> <END_OF_TEXT>",
    "pneumonoultramicroscopicsilicovolcanoconiosis " * 3,
    "word " * 74, "word " * 75, "word " * 76, "word " * 500,
    "a" * 1000,
    "!?" * 300,
]  # fmt: skip


def clip_ids(texts, tokenizer=CLIP, any_length=False):
    length = tokenizer.context_length
    encodings = Tokenizer.from_str(to_json(tokenizer, length, any_length)).encode_batch(list(texts))
    return [encoding.ids for encoding in encodings]


def test_awkward_texts_give_open_clips_ids():
    for text, ours, theirs in zip(AWKWARD, clip_ids(AWKWARD), CLIP(AWKWARD).tolist(), strict=True):
        assert ours == theirs, text


def test_over_ten_thousand_captions_give_open_clips_ids(shared_data):
    with (shared_data / "captions-text.jsonl").open(encoding="utf-8") as lines:
        captions = [json.loads(line)["text"] for i, line in enumerate(lines) if i % 18 == 0]
    assert len(captions) > 10_000
    different = [c for c, a, b in zip(captions, clip_ids(captions), CLIP(captions).tolist(), strict=True) if a != b]
    assert different == []


ODD = st.sampled_from(
    [*"'’“”\"_-.,!?#@%$()/\\:;+=~^|*[]{}éÜßñçøÅſ日本😀👍🏽½²", "'s ", "n't ", "\u0301", "\u00a0", "\u200d", "\n"]
)
WORDS = st.sampled_from(["dog", "Dogs", "photo", "SNOW", "of", "the", "xylophone", "qzjx", "7", "1234", " ", "  "])


@pytest.fixture(scope="module")
def converted():
    return Tokenizer.from_str(to_json(CLIP, 77, any_length=False))


@settings(max_examples=300, deadline=None)
@given(st.lists(ODD | WORDS, max_size=30).map("".join))
def test_arbitrary_mixtures_give_open_clips_ids(converted, text):
    assert converted.encode(text).ids == CLIP([text])[0].tolist()


def test_short_texts_are_padded_to_the_longest_of_their_batch_only_where_any_length_will_do():
    start, end, pad = CLIP.sot_token_id, CLIP.eot_token_id, 0
    cat, a = CLIP.encode("cat"), CLIP.encode("a")
    assert clip_ids(["cat", "a cat"], any_length=True) == [[start, *cat, end, pad], [start, *a, *cat, end]]
    assert [len(ids) for ids in clip_ids(["cat", "a cat"])] == [77, 77]


def test_a_text_too_long_is_cut_and_keeps_its_end():
    (ids,) = clip_ids(["word " * 500])
    assert ids == [CLIP.sot_token_id, *CLIP.encode("word") * 75, CLIP.eot_token_id]


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_each_way_of_cleaning_is_taken_over(clean):
    tokenizer = open_clip.SimpleTokenizer(context_length=40, clean=clean)
    texts = ["A_b  C's, (D) e-F… “G”", "Don't. Look_UP!", *AWKWARD[:5]]
    assert clip_ids(texts, tokenizer) == tokenizer(texts).tolist()


def hugging_face(folder, clean="whitespace", strip_sep_token=False, pad="[PAD]", lowercase=True):
    """open_clip's wrapper over a small WordPiece tokenizer as BERT has it, loaded from disk."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "a",
        "cat",
        "##s",
        "dog",
        "photo",
        "of",
        "the",
        "snow",
        "A",
        "Cat",
        ".",
    ]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    return open_clip.tokenizer.HFTokenizer(folder, context_length=16, clean=clean, strip_sep_token=strip_sep_token)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strip_sep_token": True},
        {"clean": "canonicalize"},
        {"clean": "lower", "lowercase": False},
        {"pad": "[UNK]"},
    ],
    ids=str,
)
def test_tokenizers_of_transformers_are_converted(tmp_path, options):
    tokenizer = hugging_face(tmp_path, **options)
    texts = ["a photo of the cats.", "A Cat  in the snow", "", "the dog " * 20, "“a” cat’s_dog"]
    ours = Tokenizer.from_str(to_json(tokenizer, 16, any_length=False)).encode_batch(texts)
    assert [encoding.ids for encoding in ours] == tokenizer(texts).tolist()


class Reversed(open_clip.SimpleTokenizer):
    def __call__(self, texts, context_length=None):
        return super().__call__(texts, context_length).flip(1)


class Unheard:
    context_length = 77


def test_a_tokenizer_that_does_not_convert_is_refused():
    with pytest.raises(ModelError, match=r"Reversed cannot.*the ids of 'a photo of a dog' would differ"):
        to_json(Reversed(), 77, any_length=False)
    with pytest.raises(ModelError, match=r"Unheard cannot be written as tokenizer\.json"):
        to_json(Unheard(), 77, any_length=False)


def test_identity_tells_tokenizers_apart_and_knows_the_same_one_again(tmp_path):
    tokenizers = [
        CLIP,
        open_clip.SimpleTokenizer(context_length=64),
        open_clip.SimpleTokenizer(clean="canonicalize"),
        open_clip.SimpleTokenizer(additional_special_tokens=["<x>"]),
        hugging_face(tmp_path / "a"),
        hugging_face(tmp_path / "b", strip_sep_token=True),
        hugging_face(tmp_path / "c", lowercase=False),
    ]
    assert len({identity(tokenizer) for tokenizer in tokenizers}) == len(tokenizers)
    assert identity(open_clip.SimpleTokenizer()) == identity(CLIP)
    assert identity(hugging_face(tmp_path / "d")) == identity(tokenizers[4])
