"""Megatron's dynamic inference engine (0.18 and later) on a CPU.

The engine, its context, its paged cache and its scheduling are real. What only a GPU has is stood in
for: flash attention over the paged cache, in plain torch, and the CUDA calls of the bookkeeping.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import dynamic_context
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import attention
from megatron.core.transformer.moe.token_dispatcher_inference import NVLSAllGatherVDispatcher
from torch import Tensor
from torch.overrides import TorchFunctionMode

from macs import Runtime
from megatron_macs import attach_modality
from megatron_macs.hooks import watch

from .megatron_ranks import VOCABULARY, drawn, language_model

IMAGE = 28
LENGTHS = (70, 45, 90)


class _OnTheCpu(TorchFunctionMode):
    """What is asked of CUDA devices and pinned memory is made in ordinary memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {
            name: torch.device("cpu") if name == "device" and "cuda" in str(value) else value
            for name, value in (kwargs or {}).items()
            if name != "pin_memory"
        }
        if func is Tensor.pin_memory:
            return args[0]
        return func(*args, **kwargs)


def paged_attention(
    self: Any,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    max_query: int,
    max_keys: int,
    query_starts: Tensor,
    key_starts: Tensor,
    key_counts: Tensor,
    blocks: Tensor,
    decode_only: bool,
    softmax_offset: Any = None,
) -> Tensor:
    """Causal attention of packed requests: query [.., H, D], cached keys and values [block, size, H', D]."""
    shape, query = query.shape, query.reshape(-1, *query.shape[-2:])
    output = torch.zeros_like(query)
    requests, size = len(key_counts), keys.shape[1]
    each = len(query) // requests
    starts = [each * i for i in range(requests + 1)] if decode_only else query_starts.tolist()
    for request, count in enumerate(key_counts.tolist()):
        mine = slice(starts[request], starts[request + 1])
        rows = query[mine]
        if not len(rows) or not count:
            continue
        used = blocks[request, : -(-count // size)].tolist()
        heads = query.shape[1] // keys.shape[2]
        own_keys, own_values = (
            torch.cat([cache[block] for block in used])[:count].repeat_interleave(heads, 1).float()
            for cache in (keys, values)
        )
        scores = torch.einsum("qhd,khd->hqk", rows.float(), own_keys) * query.shape[-1] ** -0.5
        place = torch.arange(count - len(rows), count)
        scores = scores.masked_fill(torch.arange(count) > place[:, None], float("-inf"))
        output[mine] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), own_values).to(output.dtype)
    return output.reshape(shape)


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Within this context the dynamic engine runs on the CPU."""

    class Properties:
        total_memory, multi_processor_count, major, minor = 16 << 30, 2, 8, 0

    class Statistics(dict):
        def __missing__(self, key: Any) -> int:
            return 0

    stand_ins: list[tuple[Any, str, Any]] = [
        (torch.cuda, "memory_stats", lambda device=None: Statistics()),
        (torch.cuda, "mem_get_info", lambda device=None: (8 << 30, 16 << 30)),
        (torch.cuda, "get_device_properties", lambda device=None: Properties()),
        (torch.cuda, "get_device_capability", lambda device=None: (8, 0)),
        (torch.cuda, "memory_allocated", lambda device=None: 0),
        (torch.cuda, "memory_reserved", lambda device=None: 0),
        (torch.cuda, "max_memory_allocated", lambda device=None: 0),
        (torch.cuda, "reset_peak_memory_stats", lambda device=None: None),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "manual_seed", lambda seed: None),
        (torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda state, device=None: None),
        (torch.cuda.nvtx, "range_push", lambda message: 0),
        (torch.cuda.nvtx, "range_pop", lambda: 0),
        (attention, "is_fa_min_version", lambda version, check_equality=True: True),
        (attention.Attention, "flash_decode_and_prefill", paged_attention),
        (dynamic_context, "triton_append_key_value_cache", None),  # there is a torch one beside it
        (NVLSAllGatherVDispatcher, "allocate_buffers", classmethod(lambda cls, *args, **named: None)),
    ]
    with ExitStack() as stack:
        for owner, name, value in stand_ins:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_OnTheCpu())
        yield


class Tokenizer:
    bos, eod, vocab_size = None, VOCABULARY - 1, VOCABULARY

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(str(one) for one in ids)


def prompts() -> list[list[int]]:
    """Text with runs of image tokens, of several lengths."""
    found = []
    for seed, length in enumerate(LENGTHS):
        ids = torch.randint(1, IMAGE, (length,), generator=torch.Generator().manual_seed(seed))
        ids[5 : 5 + length // 2] = IMAGE
        found.append(ids.tolist())
    return found


def build_model(runtime: Runtime | None, image: bool = True) -> GPTModel:
    model = language_model(runtime, 256, moe_router_dtype="fp32")
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            if parameter.dim() > 1:
                parameter.copy_(drawn(seed, parameter.shape) / 2)
    if runtime is not None and image:
        attach_modality(model, image_token_id=IMAGE)
    elif runtime is not None:
        watch(model, {}, None)  # as the launcher does where no flag names a token
    return model


def build_engine(model: GPTModel, chunked: int | None = None) -> DynamicInferenceEngine:
    """chunked: prefill so many tokens a step."""
    context = DynamicInferenceContext(
        model_config=model.config,
        inference_config=InferenceConfig(
            block_size_tokens=16,
            buffer_size_gb=0.05,
            max_requests=8,
            max_tokens=chunked or 512,
            max_sequence_length=256,
            enable_chunked_prefill=chunked is not None,
        ),
    )
    controller = TextGenerationController(GPTInferenceWrapper(model, context), Tokenizer())
    return DynamicInferenceEngine(controller, context)


def answers_of(
    engine: DynamicInferenceEngine, prompts: dict[int, list[int]], tokens: int = 4
) -> dict[int, Any]:
    """Tokens that the engine generates for prompts, by their numbers."""
    for number, prompt in prompts.items():
        engine.add_request(number, list(prompt), SamplingParams(top_k=1, num_tokens_to_generate=tokens))
    finished = []
    while engine.has_unfinished_requests():
        finished += [record.requests[-1] for record in engine.step_modern()["finished_request_records"]]
    return {request.request_id: list(request.generated_tokens) for request in finished}
