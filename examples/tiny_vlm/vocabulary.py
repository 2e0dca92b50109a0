"""The words of the tiny model: one token a word, digit or letter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILLER, BEGIN, END, UNKNOWN = "<filler>", "<begin>", "<end>", "<unknown>"
VISION_START, IMAGE, VIDEO, VISION_END = "<vision>", "<image>", "<video>", "</vision>"

_SPECIAL = [FILLER, BEGIN, END, UNKNOWN, VISION_START, IMAGE, VIDEO, VISION_END]
_WORDS = (
    "0 1 2 3 4 5 6 7 8 9 + = ? a b c d e f g h i j k l m n o p "
    "what is at top bottom left right how many digits are there the largest digit sum tell me "
    "yes no none "
    "first second read all in order "
    "does image contain present shape color of circle triangle rectangle not "
    "black blue brown gray green red teal yellow"
).split()

VOCABULARY = {word: index for index, word in enumerate(_SPECIAL + _WORDS)}
VOCABULARY_SIZE = 96  # room to spare, and divisible by small tensor-parallel sizes


def encode(text: str) -> list[int]:
    """Token ids of words parted by spaces; an unknown word is a KeyError that names it."""
    return [VOCABULARY[word] for word in text.split()]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The same vocabulary as a Hugging Face tokenizer, for text that users type.

    Digits are split, so that "12+07=" and "1 2 + 0 7 =" are the same prompt.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(pattern="+", behavior="isolated"),
            pre_tokenizers.Split(pattern="=", behavior="isolated"),
            pre_tokenizers.Split(pattern="?", behavior="isolated"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=FILLER,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[VISION_START, IMAGE, VIDEO, VISION_END],
    )


def up_to_end(ids: list[int]) -> list[int]:
    """An answer without what follows its end token."""
    end = VOCABULARY[END]
    return ids[: ids.index(end) + 1] if end in ids else ids


def words_of(ids: Sequence[int]) -> str:
    """An answer as words."""
    words = tuple(VOCABULARY)
    return " ".join(words[i] for i in ids if i < len(words) and words[i] != END)
