"""Words and pieces of words: how a caption is written, and the tokenizer that decoders share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from retrieval.errors import DataError, ModelError

END, UNKNOWN = 0, 1  # ids of the two pieces that are no text; nothing begins a caption but the picture itself
_SPECIAL = ("<end>", "<unknown>")
_OTHER = r"[^\p{L}\p{N}']+"  # of tokenizers' regular expressions; `plain` has it in Python's
_NO_WORD = re.compile(r"(?:[^\w']|_)+")


def plain(text: str) -> str:
    """Lower case, and nothing but letters, digits and apostrophes with single spaces between: as captions are compared.

    Decoders learn and write captions so too: what is not compared need not be learnt.
    """
    return _NO_WORD.sub(" ", text.lower()).strip()


class Words:
    """A subword tokenizer: byte-pair encoding (Sennrich et al. 2016), of the package ``tokenizers``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size: int = tokenizer.get_vocab_size()

    @classmethod
    def learn(cls, captions: Iterable[str], size: int) -> Words:
        """Learn pieces from captions.

        Raises:
            DataError: there is no word in them.
        """
        tokenizer = Tokenizer(models.BPE(unk_token=_SPECIAL[UNKNOWN]))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), normalizers.Replace(Regex(_OTHER), " "), normalizers.Strip()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(_SPECIAL), show_progress=False)
        tokenizer.train_from_iterator(captions, trainer)
        if tokenizer.get_vocab_size() <= len(_SPECIAL):
            raise DataError("there is no word in the captions: nothing can be learnt from them")
        return cls(tokenizer)

    @classmethod
    def load(cls, file: Path) -> Words:
        """Read a ``tokenizer.json``. ModelError when it is missing or damaged, or not one of a decoder's."""
        try:
            found = cls(Tokenizer.from_str(file.read_text("utf-8")))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"{file} cannot be read as a tokenizer: {str(error).splitlines()[0]}") from error
        if [found.tokenizer.id_to_token(i) for i in (END, UNKNOWN)] != list(_SPECIAL):
            raise ModelError(f"{file} is no tokenizer of captions: it does not begin with {', '.join(_SPECIAL)}")
        return found

    def to_json(self) -> str:
        """What :meth:`load` reads."""
        text: str = self.tokenizer.to_str()
        return text

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """The pieces of each caption; none of an empty one, and no end."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(captions))]

    def decode(self, pieces: Iterable[Sequence[int]]) -> list[str]:
        """Captions of their pieces; what is no text is left out."""
        return [self.tokenizer.decode(list(ids)) for ids in pieces]
