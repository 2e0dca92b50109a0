"""Megatron's inference-optimised MoE layer (0.19 and later) on gloo ranks.

Real routers, dispatchers and fused kernels, these in Triton's interpreter; NVLS by a stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.activations import squared_relu
from megatron.core.inference.moe.fused_moe import ActivationType
from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer.moe.experts import InferenceGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import InferenceTopKRouter
from megatron.core.transformer.moe.token_dispatcher_inference import (
    NCCLAllGatherDispatcher,
    NVLSAllGatherVDispatcher,
)
from torch.nn import functional

from macs import Plan, Runtime
from megatron_macs.spec import macs_mlp

from .fake_nvls import fake_nvls
from .megatron_ranks import drawn, layer_config

EXPERTS, TOP_K, HIDDEN, FFN = 8, 3, 32, 48
WORST_CASE = 64


class Experts(torch.nn.Module):
    """``InferenceGroupedMLP`` without transformer-engine's weights: its own fused forward passes, and a
    loop where no inference engine is at work."""

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any = None, **_: Any) -> None:
        super().__init__()
        self.config, self.num_local_experts, self.ep_group = config, num_local_experts, pg_collection.ep
        self._nvls_dispatcher = config.inference_moe_token_dispatcher_type == "nvls"
        self._mcore_activation_type = ActivationType.SQUARED_RELU
        first = dist.get_rank(self.ep_group) * num_local_experts
        own = range(first, first + num_local_experts)
        self._fc1_weight = torch.stack([weights_of(expert)[0] for expert in own])
        self._fc2_weight = torch.stack([weights_of(expert)[1] for expert in own])

    def forward(self, hidden: Any, tokens_per_expert: Any, probs: Any, routing_map: Any = None) -> Any:
        if InferenceMode.is_active():
            return InferenceGroupedMLP._mcore_fused_moe_forward(self, hidden, probs, routing_map)
        rows = hidden.split(tokens_per_expert.tolist())
        outputs = [expert_of(*pair) for pair in zip(rows, self._fc1_weight, self._fc2_weight, strict=True)]
        return (torch.cat(outputs) * probs[:, None]).to(hidden.dtype), None


def weights_of(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        (drawn(100 + expert, (FFN, HIDDEN)) / 8).bfloat16(),
        (drawn(900 + expert, (HIDDEN, FFN)) / 8).bfloat16(),
    )


def expert_of(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return functional.linear(squared_relu(functional.linear(rows, first)), second)


def build(runtime: Runtime | None, dispatcher: str) -> MoELayer:
    config = layer_config(
        "alltoall",
        EXPERTS,
        TOP_K,
        hidden_size=HIDDEN,
        transformer_impl="inference_optimized",
        inference_moe_token_dispatcher_type=dispatcher,
        inference_grouped_gemm_backend="torch",
        activation_func=squared_relu,
        gated_linear_unit=False,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    mlp = partial(MoELayer, submodules=MoESubmodules(experts=Experts, router=InferenceTopKRouter))
    if runtime is not None:
        mlp = macs_mlp(mlp, runtime, None)
    layer = mlp(config=config, pg_collection=get_default_pg_collection(), is_mtp_layer=False)
    layer.set_layer_number(1)
    with torch.no_grad():
        layer.router.weight.copy_(drawn(0, layer.router.weight.shape) / 2)
    return layer.eval()


def batch_of(rank: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [T, 1, D] and mask [1, T], as the dynamic engine packs its requests."""
    mask = drawn(70 + rank, (1, count)) > -0.5
    lean = drawn(0, (EXPERTS, HIDDEN))[:2].mean(0)
    hidden = drawn(7 + rank, (1, count, HIDDEN)) + mask[..., None] * lean
    return hidden.transpose(0, 1).contiguous().bfloat16(), mask


def output_of(plan: Plan, hidden: torch.Tensor) -> torch.Tensor:
    """What a layer must put out for hidden [T, 1, D] under a plan, float32 [T, D]."""
    flat = hidden.flatten(0, 1)
    output = torch.zeros(flat.shape)
    for expert in range(EXPERTS):
        weight = torch.where(plan.experts == expert, plan.weights, 0).sum(1)
        output += expert_of(flat, *weights_of(expert)).float() * weight[:, None]
    return output


@contextmanager
def buffers(dispatcher: str, counts: list[int]) -> Iterator[None]:
    """What an inference engine allocates for ranks with so many tokens.

    The router's compiled part runs uncompiled: compiling takes a CPU longer than all the rest.
    """
    nvls = dispatcher == "nvls" and len(counts) > 1  # alone, it gathers nothing and has no buffers
    with fake_nvls() if nvls else nullcontext(), torch.compiler.set_stance("force_eager"):
        if nvls:
            NVLSAllGatherVDispatcher.allocate_buffers(
                WORST_CASE, TOP_K, HIDDEN, get_default_pg_collection().ep
            )
        else:
            NCCLAllGatherDispatcher.allocate_buffers()
            NCCLAllGatherDispatcher._use_allgather_v = len(set(counts)) > 1
        try:
            yield
        finally:
            NCCLAllGatherDispatcher._use_allgather_v = False
