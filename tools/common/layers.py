"""Megatron-Core's real MoE layer as the benchmark runs it: routed as a workload says, policies side by side.

Shapes: T tokens of this process, D features, E experts, k experts a token.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

import macs
from macs import Plan, Profile, Runtime
from macs.adapters import candidate_scores, routing_from_map
from macs.records.compensation import SCOPES, Compensation
from macs.records.profile import router_fingerprint
from megatron_macs import cpu_engine, with_macs

from .clock import milliseconds
from .workloads import Batch, Contender, Shape


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def engine() -> AbstractContextManager[Any]:
    """What Megatron needs around it here: nothing, or stubs for CUDA."""
    return nullcontext() if torch.cuda.is_available() else cpu_engine()


def join(rank: int, world: int, folder: str) -> None:
    """Process group and Megatron's parallel groups: experts are spread over all processes."""
    if torch.cuda.is_available():
        if torch.cuda.device_count() < world:
            raise RuntimeError(
                f"--ranks: found {world}, but this machine has {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=dist.FileStore(str(Path(folder) / "store"), world),
        rank=rank,
        world_size=world,
    )
    parallel_state.initialize_model_parallel(expert_model_parallel_size=world)
    if torch.cuda.is_available():
        model_parallel_cuda_manual_seed(0)


def settings_of(shape: Shape, world: int, dispatcher: str = "alltoall", **more: Any) -> TransformerConfig:
    """Megatron's config of a layer of this shape, in float32 on a CPU and bfloat16 on a GPU."""
    kind = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": shape.hidden,
            "num_attention_heads": 8,
            "moe_ffn_hidden_size": shape.ffn,
            "num_moe_experts": shape.experts,
            "moe_router_topk": shape.top_k,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_router_pre_softmax": shape.top_k == 1,  # Megatron refuses one without
            "moe_token_dispatcher_type": dispatcher,
            "expert_model_parallel_size": world,
            "normalization": "RMSNorm",
            "activation_func": functional.silu,
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "bias_activation_fusion": False,
            "params_dtype": kind,
            "bf16": kind == torch.bfloat16,
            "use_cpu_initialization": True,
            **more,
        }
    )


def build_layer(
    shape: Shape, runtime: Runtime | None, dispatcher: str = "alltoall", experts: nn.Module | None = None
) -> nn.Module:
    """A layer with random weights, the same for every runtime; with another's ``experts``, if given."""
    world = parallel_state.get_expert_model_parallel_world_size()
    config = settings_of(shape, world, dispatcher)
    spec = get_gpt_layer_local_spec(
        num_experts=shape.experts, moe_grouped_gemm=False, normalization="RMSNorm"
    )
    mlp = (spec if runtime is None else with_macs(spec, runtime)).submodules.mlp
    groups = get_default_pg_collection()
    torch.manual_seed(0)
    if isinstance(mlp, ModuleSpec):
        layer = build_module(mlp, config=config, pg_collection=groups)
    else:
        layer = mlp(config=config, pg_collection=groups, is_mtp_layer=False)
    layer.set_layer_number(1)
    if experts is not None:
        layer.experts = experts
    return layer.eval().to(device())


@dataclass
class Asked:
    """What the layers are to be routed by, now."""

    logits: Tensor | None = None


def force(layer: nn.Module, asked: Asked) -> None:
    """Make a layer's router choose what ``asked`` says; it still computes its own logits, and pays for it."""
    own = layer.router.gating

    def gating(hidden: Tensor) -> Tensor:
        logits = own(hidden)
        if asked.logits is None:
            return logits
        if asked.logits.numel() == logits.numel():
            return asked.logits.view_as(logits)
        raise ValueError(
            f"routing: found a call on {logits.numel() // logits.shape[-1]} tokens, asked for "
            f"{asked.logits.numel() // logits.shape[-1]}"
        )

    layer.router.gating = gating


class Side:
    """One policy's layer, beside those of the others: same weights, same routing."""

    def __init__(
        self, shape: Shape, contender: Contender, stock: nn.Module, asked: Asked, rank: int | None = None
    ) -> None:
        self.shape = shape
        self.runtime = Runtime(contender.config.updated(compensation="none"), policy=contender.policy)
        self.runtime.recording = False
        self.layer = build_layer(shape, self.runtime, experts=stock.experts)
        force(self.layer, asked)
        self.macs = self.runtime.layers[0]
        if SCOPES.get(contender.config.compensation):
            assert rank is not None
            estimates = no_estimates(self.macs.adapter.router_weight(), shape.top_k, rank)
            self.runtime.use(contender.policy, contender.config, estimates)
        self.plan: Plan | None = None
        self.inputs: tuple[Any, ...] = ()
        self.macs.on_plan(self._keep)

    def _keep(self, event: macs.PlanEvent) -> None:
        self.inputs = event.hidden, event.experts, event.weights, event.scores, event.tokens
        self.plan = event.plan

    def __call__(self, hidden: Tensor, modality: macs.Modality) -> Tensor:
        with macs.modality(modality):
            return self.layer(hidden)[0]

    def planning(self) -> Callable[[], Any]:
        """The planner, and what is done around it, on what it got last."""
        inputs = self.inputs
        around = around_plan(inputs[1], inputs[3])
        return lambda: around(self.macs.planner.plan(*inputs))


def no_estimates(router_weight: Tensor, top_k: int, rank: int) -> Profile:
    """A profile of one layer whose estimates are all zero, and take as long as others."""
    experts, features = router_weight.shape
    compensation = Compensation(
        mean=torch.zeros(1, 2, features),
        basis=torch.zeros(1, 2, features, rank, dtype=torch.bfloat16),
        coefficients=torch.zeros(1, 2, experts, 1 + rank, features, dtype=torch.bfloat16),
        tokens=torch.zeros(1, 2, dtype=torch.int64),
        explained=torch.zeros(1, 2, dtype=torch.float64),
    )
    counts = torch.zeros(1, experts, dtype=torch.int64)
    fingerprints = (router_fingerprint(router_weight),)
    return Profile(counts, counts.clone(), fingerprints, top_k, compensation=compensation)


def around_plan(experts: Tensor, scores: Tensor) -> Callable[[Plan], Any]:
    """What the Megatron adapter does beside a plan: the scores of all experts, the router's choice out of its
    map, the plan into a map. experts int64 [T, k], scores [T, E]."""
    logits = scores.clamp(min=1e-30).log()
    count = scores.shape[1]
    probs = torch.zeros_like(scores).scatter(1, experts, 1.0)
    routing_map = probs > 0

    def around(plan: Plan) -> Any:
        candidate_scores(logits, experts, "softmax")
        routing_from_map(routing_map, probs, experts.shape[1])
        return plan.as_map(count)

    return around


class Oracle:
    """The same layer by another way: Megatron's all-gather dispatcher, routed by a given plan."""

    def __init__(self, shape: Shape, stock: nn.Module) -> None:
        self.shape = shape
        self.layer = build_layer(shape, None, "allgather", experts=stock.experts)
        self.routed: tuple[Tensor, Tensor] | None = None
        self.layer.router.forward = lambda *args, **kwargs: self.routed

    def __call__(self, hidden: Tensor, plan: Plan) -> Tensor:
        routing_map, probs = plan.as_map(self.shape.experts)
        self.routed = probs, routing_map
        return self.layer(hidden)[0]


def same_output(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways to the same sum agree, on every rank."""
    close = 2e-2 if found.dtype == torch.bfloat16 else 1e-4
    error = (found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)
    worst = torch.nan_to_num(error, nan=float("inf")).double().cpu()
    return float(over_ranks(worst, dist.ReduceOp.MAX)) < close


def over_ranks(value: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """A value reduced over all processes, on the CPU."""
    value = value.detach().clone().to(device())
    dist.all_reduce(value, op=operation)
    return value.cpu()


def together(work: Callable[[], Any]) -> float:
    """Of one call that all processes make at once: the slowest one's."""
    if dist.get_world_size() == 1:
        return milliseconds(work)
    dist.barrier()
    return float(over_ranks(torch.tensor(milliseconds(work), dtype=torch.float64), dist.ReduceOp.MAX))


def median_of(work: Callable[[], Any], repeats: int) -> float:
    """Median of ``together``, after one call that does not count."""
    together(work)
    return statistics.median(together(work) for _ in range(repeats))


def run_experts(layer: nn.Module, rows: Sequence[float], hidden: int) -> Callable[[], Any]:
    """The layer's experts, given so many rows each, as its dispatcher would."""
    kind = next(layer.experts.parameters()).dtype
    # On the CPU, where Megatron's dispatchers leave it for the experts.
    count = torch.tensor(list(rows)).long()
    inputs = torch.randn(int(count.sum()), hidden, device=device(), dtype=kind)
    probs = torch.rand(len(inputs), device=device())
    return lambda: layer.experts(inputs, count, probs)


def layout_of(batch: Batch, hidden: Tensor) -> tuple[Tensor, macs.Modality, Tensor]:
    """hidden [T, 1, D] as Megatron has it, modality and logits, on the device in the layer's precision."""
    kind = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    modality = macs.Modality.of(batch.ids[None].to(device()))
    return hidden[:, None].to(device(), kind), modality, batch.logits.to(device())
