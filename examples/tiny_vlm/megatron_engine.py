"""Megatron's static inference engine around the tiny model."""

from __future__ import annotations

from collections.abc import Sequence

from macs_tools.common.static_engine import answer, static_engine

from .data import ANSWER_TOKENS, PROMPT_TOKENS, Sample
from .megatron import PictureEncoder, TinyVLM
from .vocabulary import END, VOCABULARY, up_to_end, words_of


class WordTokenizer:
    """What Megatron's engine asks of a tokenizer, for the tiny model's words."""

    bos = None
    eod = VOCABULARY[END]
    vocab_size = len(VOCABULARY)

    def tokenize(self, text: str) -> list[int]:
        return [VOCABULARY[word] for word in text.split()]

    def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return words_of(ids)


class Engine:
    """``generate``: prompts and pictures in, answers out, through ``StaticInferenceEngine``.

    Every expert-parallel rank must call it equally often, with batches of its own.
    """

    def __init__(
        self,
        model: TinyVLM,
        pictures: PictureEncoder,
        largest_batch: int,
        prompt_tokens: int = PROMPT_TOKENS,
    ) -> None:
        self.model = model
        self.pictures = pictures
        self.engine = static_engine(model, WordTokenizer(), largest_batch, prompt_tokens + ANSWER_TOKENS)

    def generate(self, samples: Sequence[Sample], tokens: int = ANSWER_TOKENS) -> list[list[int]]:
        """The answer to every sample: token ids up to and with the end token.

        All prompts have as many tokens (``PROMPT_TOKENS``), so that they prefill in one step; and every
        answer takes ``tokens`` steps, so that ranks stay in step.
        """
        with self.model.pictures(self.pictures(samples)):
            answers = answer(self.engine, [list(sample.prompt) for sample in samples], tokens)
        return [up_to_end(ids) for ids in answers]
