"""Jobs for worker processes: Megatron and DeepSpeed side by side on the tiny model."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.sharded_moe import MOELayer
from megatron.core.transformer.moe.moe_layer import MoELayer
from tiny_vlm import data
from tiny_vlm import deepspeed as tiny_deepspeed
from tiny_vlm import model as tiny
from tiny_vlm import plain as tiny_plain
from tiny_vlm.megatron import PictureEncoder, build_megatron_model
from tiny_vlm.megatron_engine import Engine

import deepspeed_macs
import macs
from macs import Profile, Runtime
from megatron_macs import attach_modality
from support.cases import BUSY, busy

from .deepspeed_jobs import on_deepspeed
from .deepspeed_tiny_jobs import tiny_engine
from .megatron_jobs import on_megatron


def mine(samples: list[data.Sample]) -> list[data.Sample]:
    share = len(samples) // dist.get_world_size()
    return samples[dist.get_rank() * share :][:share]


def layer_inputs(samples: list[data.Sample]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What enters every MoE layer of the Hugging Face model, [B, S, D] each, and the mask [B, S]."""
    source = tiny.load_model()
    seen: list[torch.Tensor] = []
    for layer in source.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    inputs = tiny.sample_inputs(samples)
    source(**inputs)
    return seen, inputs["input_ids"] == source.config.image_token_id


def build_all(runtime: Runtime, block: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The tiny model in Megatron, under AutoEP, and built from DeepSpeed's MoE layer."""
    world = dist.get_world_size()
    source = tiny.load_model()
    megatron = build_megatron_model(source, runtime, expert_model_parallel_size=world)
    attach_modality(megatron, image_token_id=source.config.image_token_id)
    autoep = tiny_engine(block)
    moe = deepspeed_macs.init_inference(
        tiny_deepspeed.with_moe_layers(tiny.load_model(), dist.get_rank(), world),
        {"dtype": "fp32", "moe": {"ep_size": world}, "macs": block},
    )
    moe.eval()
    return megatron, autoep, moe


def profile_of(runtime: Runtime, run: Any) -> Profile:
    with runtime.calibration():
        run()
    return runtime.measured_profile(dist.group.WORLD)


@on_deepspeed
@on_megatron
def plans(policy: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The plan of every layer in three adapters, for the same recorded inputs, as sorted routes."""
    runtime = Runtime(busy(**settings), policy=policy)
    models = build_all(runtime, {**BUSY, "policy": policy, **settings})
    hidden, mask = layer_inputs(mine(data.draw_samples(5, "test", data.TASKS, 24)))
    runtimes = [runtime, models[1].macs, models[2].macs]
    layers = [
        [module for module in model.modules() if isinstance(module, kind)]
        for model, kind in zip(models, (MoELayer, AutoEPMoELayer, MOELayer), strict=True)
    ]

    def run(adapter: int, index: int) -> None:
        layer, x = layers[adapter][index], hidden[index]
        with macs.modality(mask):
            if adapter == 0:
                layer(x.transpose(0, 1).contiguous())
            elif adapter == 1:
                layer(x)
            else:
                layer(x, None)

    profiles = [profile_of(one, lambda a=a: [run(a, i) for i in range(4)]) for a, one in enumerate(runtimes)]
    same_profile = all(
        torch.equal(one.visual, profiles[0].visual) and one.fingerprints == profiles[0].fingerprints
        for one in profiles
    )
    found = []
    for index in range(4):
        routes, weights, moved = [], [], []
        for adapter, one in enumerate(runtimes):
            one.use(policy, one.config, profiles[0])
            log: list[Any] = []
            stop = one.layers[index].on_plan(lambda event, log=log: log.append(event.plan))
            run(adapter, index)
            stop()
            routing, probs = log[0].as_map(16)
            if adapter == 0:  # its tokens come in the order s B + b
                length, batch = mask.shape[1], mask.shape[0]
                routing = routing.view(length, batch, -1).transpose(0, 1).flatten(0, 1)
                probs = probs.view(length, batch, -1).transpose(0, 1).flatten(0, 1)
            routes.append(routing)
            weights.append(probs)
            moved.append(int(log[0].statistics.rerouted + log[0].statistics.dropped))
        found.append(
            {
                "same": all(torch.equal(one, routes[0]) for one in routes),
                "weights": max(float((one - weights[0]).abs().max()) for one in weights),
                "moved": moved,
                "profile": same_profile,
            }
        )
    return found


@on_deepspeed
@on_megatron
def answers(choices: list[tuple[str, dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """Answers of the three engines to the same questions, policy by policy."""
    runtime = Runtime()
    megatron, autoep, moe = build_all(runtime, {})
    samples = mine(data.draw_samples(5, "test", data.TASKS, count))
    engines = [
        Engine(megatron, PictureEncoder(tiny.load_model()), len(samples)),
        tiny_plain.Engine(autoep.module),
        tiny_plain.Engine(moe.module),
    ]
    runtimes = [runtime, autoep.macs, moe.macs]
    profile = profile_of(runtime, lambda: engines[0].generate(samples))
    found = []
    for policy, settings in choices:
        given, loads = [], []
        for engine, one in zip(engines, runtimes, strict=True):
            one.use(policy, busy(**settings), profile)
            given.append(engine.generate(samples))
            loads.append([float(report.prefill.load("after")[0]) for report in one.reports()])
        right = [answer == sample.answer for answer, sample in zip(given[0], samples, strict=True)]
        found.append({"answers": given, "loads": loads, "right": sum(right) / len(right)})
    return found
