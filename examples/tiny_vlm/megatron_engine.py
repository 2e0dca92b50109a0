"""Megatron's static inference engine around the tiny model."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.inference_request import InferenceRequest
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)

from .data import ANSWER_TOKENS, PROMPT_TOKENS, Sample
from .megatron import PictureEncoder, TinyVLM
from .static_engine import engine_of, greedy, wrapper_arguments
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

    def __init__(self, model: TinyVLM, pictures: PictureEncoder, largest_batch: int) -> None:
        self.model = model
        self.pictures = pictures
        context = StaticInferenceContext(largest_batch, PROMPT_TOKENS + ANSWER_TOKENS)
        wrapper = GPTInferenceWrapper(model, *wrapper_arguments(model, context))
        self.engine = engine_of(TextGenerationController(wrapper, WordTokenizer()), largest_batch)

    def generate(self, samples: Sequence[Sample], tokens: int = ANSWER_TOKENS) -> list[list[int]]:
        """The answer to every sample: token ids up to and with the end token.

        All prompts have as many tokens (``PROMPT_TOKENS``), so that they prefill in one step; and every
        answer takes ``tokens`` steps, so that ranks stay in step.
        """
        requests = [
            InferenceRequest(
                request_id=self.engine.get_new_request_id(),
                prompt="",
                prompt_tokens=list(sample.prompt),
                sampling_params=greedy(tokens),
            )
            for sample in samples
        ]
        with self.model.pictures(self.pictures(samples)):
            results = self.engine.generate(inference_requests=requests)
        return [up_to_end(result.generated_tokens.tolist()) for result in results]
