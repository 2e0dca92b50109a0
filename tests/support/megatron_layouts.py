"""Jobs for worker processes: a Megatron MoE layer under tensor, expert and expert-tensor parallelism."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tiny_vlm import data
from tiny_vlm import model as tiny
from tiny_vlm.megatron import PictureEncoder, build_megatron_model
from tiny_vlm.megatron_engine import Engine
from torch.nn import functional

import macs
from macs import Runtime
from megatron_macs import attach_modality, cpu_engine
from support.cases import busy

from .fake_deepep import fake_deepep
from .megatron_jobs import (
    FFN,
    HIDDEN,
    bare_layer,
    batch_of,
    drawn,
    layer_config,
    leave_inference_mode,
)
from .plan_log import PlanLog

EXPERTS, TOP_K = 8, 3


def on_layout(job):
    """Run a job under a layout: {"tp", "ep", "etp", "sp"}, the rest of the ranks data-parallel."""

    @functools.wraps(job)
    def run(layout: dict[str, Any], *arguments: Any) -> Any:
        with cpu_engine():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout["tp"],
                pipeline_model_parallel_size=layout.get("pp", 1),
                expert_model_parallel_size=layout["ep"],
                expert_tensor_parallel_size=layout["etp"],
                distributed_timeout_minutes=1,
            )
            try:
                with torch.inference_mode():
                    return job(layout, *arguments)
            finally:
                parallel_state.destroy_model_parallel()
                leave_inference_mode()

    return run


def config_of(layout: dict[str, Any], dispatcher: str) -> Any:
    return layer_config(
        dispatcher,
        EXPERTS,
        TOP_K,
        tensor_model_parallel_size=layout["tp"],
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout["etp"],
        sequence_parallel=layout["sp"],
    )


def build(runtime: Runtime | None, config: Any) -> torch.nn.Module:
    """The layer of ``build_layer``, its experts' weights divided as expert-tensor parallelism has them."""
    layer = bare_layer(runtime, config)
    shard, shards = (
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    with torch.no_grad():
        for expert, module in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
            gate, up = (drawn(100 + expert, (2 * FFN, HIDDEN)) / 4).chunk(2)
            down = drawn(900 + expert, (HIDDEN, FFN)) / 4
            module.linear_fc1.weight.copy_(torch.cat([gate.chunk(shards)[shard], up.chunk(shards)[shard]]))
            module.linear_fc2.weight.copy_(down.chunk(shards, 1)[shard])
    return layer


def tokens_of(layout: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's hidden states [S / TP, B, D] or [S, B, D], and the mask [B, S] of whole sequences."""
    hidden, mask = batch_of(dist.get_rank() // layout["tp"], 3, 12)
    if layout["sp"]:
        hidden = hidden.chunk(layout["tp"])[dist.get_rank() % layout["tp"]].contiguous()
    return hidden, mask


@on_layout
def unbounded_is_stock(layout: dict[str, Any], dispatcher: str) -> dict[str, bool]:
    """Stock output against MACS with room for all."""
    config = config_of(layout, dispatcher)
    hidden, mask = tokens_of(layout)
    stock, _ = build(None, config)(hidden)
    same = {}
    for name, policy, settings in (
        ("macs", "macs", {"capacity_factor": 1e6}),
        ("pooled", "macs", {"capacity_factor": 1e6, "level": "rank", "reroute": "group"}),
        ("vanilla", "vanilla", {}),
        ("few tokens", "macs", {"capacity_factor": 0.1, "min_tokens": 1000}),
    ):
        runtime = Runtime(busy(**{"min_tokens": 0, **settings}), policy=policy)
        layer = build(runtime, config)
        with macs.modality(mask):
            same[name] = torch.equal(layer(hidden)[0], stock)
    return same


@on_layout
def planned_output(
    layout: dict[str, Any], dispatcher: str, policy: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """A layer's plan, and how far its output is from what the plan says."""
    runtime = Runtime(busy(**{"min_tokens": 0, **settings}), policy=policy)
    layer = build(runtime, config_of(layout, dispatcher))
    log = PlanLog(runtime)
    hidden, mask = tokens_of(layout)
    seen: list[Any] = []
    runtime.layers[0].on_plan(lambda event: seen.append(event.tokens))
    with macs.modality(mask):
        output, _ = layer(hidden)
    plan, flat = log.plans[0], hidden.flatten(0, 1)
    expected = torch.zeros_like(flat)
    for expert in range(EXPERTS):
        weight = torch.where(plan.experts == expert, plan.weights, 0).sum(1)
        gate, up = functional.linear(flat, drawn(100 + expert, (2 * FFN, HIDDEN)) / 4).chunk(2, -1)
        expected += (
            functional.linear(functional.silu(gate) * up, drawn(900 + expert, (HIDDEN, FFN)) / 4)
            * (weight[:, None])
        )
    own = mask.t()
    if layout["sp"]:
        own = own.chunk(layout["tp"])[dist.get_rank() % layout["tp"]]
    return {
        "error": float((output.flatten(0, 1) - expected).abs().max()),
        "plan": (plan.experts.tolist(), plan.weights.tolist()),
        "mask": torch.equal(seen[0].modality.bool(), own.flatten()),
        "moved": int(plan.statistics.rerouted + plan.statistics.dropped),
        "loads": plan.statistics.load_after.tolist(),
    }


@on_layout
def over_deepep(
    layout: dict[str, Any], backend: str, policy: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """The flex dispatcher over a stand-in for DeepEP or HybridEP: bit for bit, and what it is handed."""
    config = layer_config(
        "flex", EXPERTS, TOP_K, moe_flex_dispatcher_backend=backend, expert_model_parallel_size=layout["ep"]
    )
    hidden, mask = tokens_of(layout)
    with fake_deepep() as fake, macs.modality(mask):
        stock, _ = build(None, config)(hidden)
        roomy = Runtime(busy(capacity_factor=1e6, min_tokens=0))
        same = torch.equal(build(roomy, config)(hidden)[0], stock)
        runtime = Runtime(busy(**{"min_tokens": 0, **settings}), policy=policy)
        layer = build(runtime, config)
        log = PlanLog(runtime)
        output, _ = layer(hidden)
        chosen, weights = fake.handed[-1]
        rows = fake.rows
        runtime.enabled = False
        off = torch.equal(layer(hidden)[0], stock)
    plan, flat = log.plans[0], hidden.flatten(0, 1)
    expected = torch.zeros_like(flat)
    for expert in range(EXPERTS):
        weight = torch.where(plan.experts == expert, plan.weights, 0).sum(1)
        gate, up = functional.linear(flat, drawn(100 + expert, (2 * FFN, HIDDEN)) / 4).chunk(2, -1)
        value = functional.linear(functional.silu(gate) * up, drawn(900 + expert, (HIDDEN, FFN)) / 4)
        expected += value * weight[:, None]
    kept = int((plan.experts >= 0).sum())
    return {
        "same": same and off,
        "error": float((output.flatten(0, 1) - expected).abs().max()),
        "handed": int((chosen >= 0).sum()) if backend == "deepep" else int(chosen.sum()),
        "weights": float(weights.sum() - plan.weights.sum()),
        "kept": kept,
        "dropped": float(plan.statistics.dropped),
        "rows": [rows[0], rows[2]],
    }


@on_layout
def refused_flex(layout: dict[str, Any], policy: str, changes: dict[str, Any]) -> None:
    """Build a flex layer with something that it cannot express."""
    config = layer_config("flex", EXPERTS, TOP_K, expert_model_parallel_size=layout["ep"])
    for name, value in changes.items():
        setattr(config, name, value)
    with fake_deepep():
        build(Runtime(policy=policy), config)


@on_layout
def refused(layout: dict[str, Any], policy: str, settings: dict[str, Any]) -> None:
    """Build a layer with a policy that tensor-parallel replicas could not plan alike."""
    build(Runtime(busy(**settings), policy=policy), config_of(layout, "alltoall"))


@on_layout
def without_sequence_parallelism(
    layout: dict[str, Any], policy: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """The plan of a layer built for sequence parallelism that is then given whole sequences."""
    runtime = Runtime(busy(**{"min_tokens": 0, **settings}), policy=policy)
    config = config_of(layout, "alltoall")
    layer = build(runtime, config)
    config.sequence_parallel = False
    log = PlanLog(runtime)
    hidden, mask = tokens_of({**layout, "sp": False})
    with macs.modality(mask):
        layer(hidden)
    plan = log.plans[0]
    return {"plan": (plan.experts.tolist(), plan.weights.tolist())}


@on_layout
def bad_mask(layout: dict[str, Any]) -> None:
    """A mask of a part of the sequence, where sequence parallelism wants the whole."""
    layer = build(Runtime(busy(min_tokens=0)), config_of(layout, "alltoall"))
    hidden, mask = tokens_of(layout)
    with macs.modality(mask[:, : hidden.shape[0]]):
        layer(hidden)


@on_layout
def tiny_answers(
    layout: dict[str, Any], policy: str, settings: dict[str, Any], count: int, changes: dict[str, Any]
) -> dict[str, Any]:
    """The tiny model's answers under a layout, and what every layer of this rank knew of the tokens."""
    source = tiny.load_model()
    runtime = Runtime(busy(**settings), policy=policy)
    model = build_megatron_model(
        source,
        runtime,
        tensor_model_parallel_size=layout["tp"],
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout["etp"],
        pipeline_model_parallel_size=layout.get("pp", 1),
        **changes,
    )
    attach_modality(model, image_token_id=source.config.image_token_id)
    replica, replicas = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    samples = data.draw_samples(5, "test", data.TASKS, count)[replica::replicas]
    log = PlanLog(runtime)
    kinds: list[list[Any]] = [[] for _ in runtime.layers]
    for layer, seen in zip(runtime.layers, kinds, strict=True):
        layer.on_plan(lambda event, seen=seen: seen.append(event.tokens.modality))
    answers = Engine(model, PictureEncoder(source), len(samples)).generate(samples)
    ids = torch.tensor([sample.prompt for sample in samples])
    image = (ids == source.config.image_token_id).t().flatten()
    return {
        "answers": answers,
        "layers": len(runtime.layers),
        "mask": all(torch.equal(torch.cat(seen).bool(), image) for seen in kinds),
        "planned": [len(seen) for seen in kinds],
        "plans": [plan.experts.tolist() for plan in log.plans if len(plan.experts) > len(samples)],
        "replica": replica,
        "replicas": replicas,
    }
