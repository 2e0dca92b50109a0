"""Megatron's static inference engine around a model, in both supported versions."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines.static_engine import StaticInferenceEngine
from megatron.core.inference.inference_request import InferenceRequest
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.core.models.gpt import GPTModel


def static_engine(
    model: GPTModel, tokenizer: Any, largest_batch: int, largest_length: int
) -> StaticInferenceEngine:
    """Megatron's static engine around a model, for so many sequences of so many tokens, answers and all."""
    context = StaticInferenceContext(largest_batch, largest_length)
    wrapper = GPTInferenceWrapper(model, *wrapper_arguments(model, context))
    return engine_of(TextGenerationController(wrapper, tokenizer), largest_batch)


def engine_of(controller: TextGenerationController, largest_batch: int) -> StaticInferenceEngine:
    """Megatron's static engine of a controller."""
    # Newer versions make theirs part of the constructor's work, older ones of the caller's.
    if getattr(controller, "pp_group", None) is None:
        controller.pp_group = parallel_state.get_pipeline_model_parallel_group()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StaticInferenceEngine(controller, max_batch_size=largest_batch, legacy=True)


def answer(engine: StaticInferenceEngine, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """So many tokens after every prompt, the likeliest each time."""
    parameters = greedy(tokens)
    requests = [
        InferenceRequest(
            request_id=engine.get_new_request_id(),
            prompt="",
            prompt_tokens=prompt,
            sampling_params=parameters,
        )
        for prompt in prompts
    ]
    results = engine.generate(inference_requests=requests)
    return [result.generated_tokens.tolist() for result in results]


def greedy(tokens: int) -> SamplingParams:
    """So many tokens, the likeliest each time."""
    parameters = SamplingParams(top_k=1, num_tokens_to_generate=tokens)
    parameters.add_attributes({"no_early_termination": True})
    return parameters


def wrapper_arguments(model: GPTModel, context: StaticInferenceContext) -> tuple[Any, ...]:
    """What an inference wrapper is made of beside its model; it changed between Megatron 0.16 and 0.19."""
    if "inference_wrapper_config" not in inspect.signature(GPTInferenceWrapper.__init__).parameters:
        return (context,)
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import (
        InferenceWrapperConfig,
    )

    config = InferenceWrapperConfig(
        hidden_size=model.config.hidden_size,
        params_dtype=model.config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=model.vocab_size,
        inference_max_requests=context.max_batch_size,
        inference_max_seq_length=context.max_sequence_length,
    )
    return config, context
