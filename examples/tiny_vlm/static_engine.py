"""Megatron's static inference engine, in both supported versions."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines.static_engine import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.core.models.gpt import GPTModel


def engine_of(controller: TextGenerationController, largest_batch: int) -> StaticInferenceEngine:
    """Megatron's static engine of a controller."""
    # Newer versions make theirs part of the constructor's work, older ones of the caller's.
    if getattr(controller, "pp_group", None) is None:
        controller.pp_group = parallel_state.get_pipeline_model_parallel_group()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StaticInferenceEngine(controller, max_batch_size=largest_batch, legacy=True)


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
