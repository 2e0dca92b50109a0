"""Megatron's MoE layers and small models on gloo ranks, stock or with MACS."""

from __future__ import annotations

import functools
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference import utils as inference_utils
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

import macs
from macs import Plan, PlanEvent, Runtime
from megatron_macs import cpu_engine, with_macs

from .cases import events_of
from .ranks import on_ranks

HIDDEN, FFN = 16, 24
VOCABULARY, LONGEST = 32, 64

newer_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron.core.inference.config") is None, reason="not in Megatron 0.16"
)

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


class Layout(NamedTuple):
    """Ranks, and how they are divided: tensor, expert, expert-tensor, sequence and pipeline parallelism."""

    world: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    sp: bool = False
    pp: int = 1


@contextmanager
def megatron_on(layout: Layout) -> Iterator[None]:
    """Megatron's parallel state of a layout, on the CPU, in inference mode."""
    with cpu_engine():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            distributed_timeout_minutes=1,
        )
        try:
            with torch.inference_mode():
                yield
        finally:
            parallel_state.destroy_model_parallel()
            mode = getattr(inference_utils, "InferenceMode", None)
            if mode is not None:  # newer engines leave it on in the process, which the next test shares
                mode.unset_active()


def on_megatron(world: int | None = None, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``on_ranks`` with Megatron: ``world`` expert-parallel ranks, by default those of the test's parameter
    ``world``, or those of its ``layout``."""

    def decorate(body: Callable[..., Any]) -> Any:
        @functools.wraps(body)
        def within(**arguments: Any) -> None:
            ranks = dist.get_world_size()
            with megatron_on(arguments.get("layout", Layout(ranks, ep=ranks))):
                body(**arguments)

        def ranks_of(**arguments: Any) -> int:
            return arguments["layout"].world if "layout" in arguments else arguments["world"]

        return on_ranks(world or ranks_of, **options)(within)

    return decorate


def layer_config(
    dispatcher: str = "alltoall", experts: int = 4, top_k: int = 2, **changes: Any
) -> TransformerConfig:
    """Of a MoE layer, under the parallel state if there is one, else with every rank expert-parallel."""
    sizes = {"expert_model_parallel_size": dist.get_world_size()}
    if parallel_state.is_initialized():
        sizes = {
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
            "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        }
    settings = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "ffn_hidden_size": FFN,
        "moe_ffn_hidden_size": FFN,
        "num_moe_experts": experts,
        "moe_router_topk": top_k,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_router_pre_softmax": top_k == 1,
        "moe_token_dispatcher_type": dispatcher,
        "normalization": "RMSNorm",
        "activation_func": functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "hidden_dropout": 0.0,
    }
    return TransformerConfig(**{**settings, **sizes, **changes})


def build_layer(
    runtime: Runtime | None, config: TransformerConfig, groups: ProcessGroupCollection | None = None
) -> nn.Module:
    """A MoE layer whose weights depend on the expert alone, not on the rank it is on.

    groups: the layer's; none: the global ones.
    """
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, normalization="RMSNorm"
    )
    mlp = (spec if runtime is None else with_macs(spec, runtime)).submodules.mlp
    groups = get_default_pg_collection() if groups is None else groups
    if isinstance(mlp, ModuleSpec):
        layer = build_module(mlp, config=config, pg_collection=groups)
    else:
        layer = mlp(config=config, pg_collection=groups, is_mtp_layer=False)
    layer.set_layer_number(1)
    shard, shards = dist.get_rank(groups.expt_tp), dist.get_world_size(groups.expt_tp)
    with torch.no_grad():
        layer.router.weight.copy_(drawn(0, layer.router.weight.shape) / 2)
        for expert, module in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
            gate, up, down = expert_weights(expert)
            module.linear_fc1.weight.copy_(torch.cat([gate.chunk(shards)[shard], up.chunk(shards)[shard]]))
            module.linear_fc2.weight.copy_(down.chunk(shards, 1)[shard])
    return layer.eval()


def planned(
    runtime: Runtime, config: TransformerConfig, batch: tuple[Tensor, Tensor], groups: Any = None
) -> tuple[Tensor, PlanEvent]:
    """The output of a new layer for hidden states and mask, and its step."""
    layer, events, (hidden, mask) = build_layer(runtime, config, groups), events_of(runtime), batch
    with macs.modality(mask):
        output, _ = layer(hidden)
    return output, events[0]


def expert_weights(expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate [F, D], up [F, D] and down [D, F] of an expert."""
    gate, up = (drawn(100 + expert, (2 * FFN, HIDDEN)) / 4).chunk(2)
    return gate, up, drawn(900 + expert, (HIDDEN, FFN)) / 4


def output_of(plan: Plan, hidden: Tensor, experts: int) -> Tensor:
    """What a layer must put out for hidden [S, B, D] under a plan."""
    flat = hidden.flatten(0, 1)
    output = torch.zeros_like(flat)
    for expert in range(experts):
        gate, up, down = expert_weights(expert)
        weight = torch.where(plan.experts == expert, plan.weights, 0).sum(1)
        value = functional.linear(functional.silu(flat @ gate.T) * (flat @ up.T), down)
        # An expert that a token does not use leaves no NaN of it behind.
        output += torch.where((plan.experts == expert).any(1)[:, None], value * weight[:, None], 0)
    return output.view_as(hidden)


def drawn(seed: int, shape: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch_of(rank: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Hidden states [S, B, D] and mask [B, S] of a rank; experts 0 and 1 are hot for visual tokens."""
    hidden = drawn(7 + rank, (rows, length, HIDDEN))
    mask = drawn(70 + rank, (rows, length)) > -0.5
    lean = drawn(0, (64, HIDDEN))[:2].mean(0)
    hidden = hidden + mask[..., None] * lean
    return hidden.transpose(0, 1).contiguous(), mask


def groups_of(expert_parallel: dist.ProcessGroup, everyone: dist.ProcessGroup) -> ProcessGroupCollection:
    """Groups that no global state knows, of ranks that are divided by expert parallelism alone."""
    alone = [dist.new_group([one]) for one in range(dist.get_world_size())][dist.get_rank()]
    names = dict.fromkeys(("tp", "cp", "tp_cp", "expt_tp", "expt_dp"), alone)
    names |= dict.fromkeys(("dp", "dp_cp", "tp_dp_cp", "tp_ep_pp"), everyone)
    return ProcessGroupCollection(**names, ep=expert_parallel, tp_ep=expert_parallel)


def language_config(**changes: Any) -> TransformerConfig:
    """Of a small language model."""
    settings = {
        "num_layers": 2,
        "attention_backend": AttnBackend.local,
        "perform_initialization": True,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
    }
    return layer_config(**{**settings, **changes})


def local_spec(runtime: Runtime | None) -> Any:
    """The layers of a small language model."""
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm")
    return spec if runtime is None else with_macs(spec, runtime)


def language_model(runtime: Runtime | None, longest: int = LONGEST, **changes: Any) -> GPTModel:
    return GPTModel(
        language_config(**changes),
        local_spec(runtime),
        VOCABULARY,
        longest,
        position_embedding_type="rope",
        parallel_output=False,
    ).eval()
