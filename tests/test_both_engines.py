"""One plan in every engine: Megatron, DeepSpeed's AutoEP and DeepSpeed's MoE layer."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.sharded_moe import MOELayer
from megatron.core.transformer.moe.moe_layer import MoELayer
from support.cases import BUSY, busy
from support.deepspeed_ranks import deepspeed_on, tiny_engine
from support.megatron_ranks import on_megatron
from tiny_vlm import data, plain
from tiny_vlm import deepspeed as tiny_deepspeed
from tiny_vlm import model as tiny
from tiny_vlm.megatron import PictureEncoder, build_megatron_model
from tiny_vlm.megatron_engine import Engine

import deepspeed_macs
import macs
from macs import Runtime
from megatron_macs import attach_modality

CHOICES = [
    ("vanilla", {}),
    ("token-drop", {}),
    ("rank-balanced", {}),
    ("expanded-drop", {}),
    ("macs", {"capacity_factor": 0.7}),
    ("paper", {"capacity_factor": 0.7}),
    ("macs", {"level": "rank", "reroute": "group"}),
]


def samples_of(count):
    """This rank's part of so many questions."""
    share = count // dist.get_world_size()
    return data.draw_samples(5, "test", data.TASKS, count)[dist.get_rank() * share :][:share]


def layer_inputs(samples):
    """What enters every MoE layer of the Hugging Face model, [B, S, D] each, and the mask [B, S]."""
    source, seen = tiny.load_model(), []
    for layer in source.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    inputs = tiny.sample_inputs(samples)
    source(**inputs)
    return seen, inputs["input_ids"] == source.config.image_token_id


def build_all(runtime, block):
    """The tiny model in Megatron, under AutoEP, and built from DeepSpeed's MoE layer; their runtimes."""
    world, source = dist.get_world_size(), tiny.load_model()
    megatron = build_megatron_model(source, runtime, expert_model_parallel_size=world)
    attach_modality(megatron, image_token_id=source.config.image_token_id)
    autoep = tiny_engine(block)
    moe = deepspeed_macs.init_inference(
        tiny_deepspeed.with_moe_layers(tiny.load_model(), dist.get_rank(), world),
        {"dtype": "fp32", "moe": {"ep_size": world}, "macs": block},
    ).eval()
    return (megatron, autoep, moe), (runtime, autoep.macs, moe.macs)


def profile_of(runtime, run):
    with runtime.calibration():
        run()
    return runtime.measured_profile(dist.group.WORLD)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("policy", "settings"), CHOICES)
@on_megatron()
def test_the_same_inputs_give_the_same_plan(world, policy, settings):
    with deepspeed_on():
        block = {**BUSY, "policy": policy, **settings}
        models, runtimes = build_all(Runtime(busy(**settings), policy=policy), block)
        hidden, mask = layer_inputs(samples_of(24))
        layers = [
            [module for module in model.modules() if isinstance(module, kind)]
            for model, kind in zip(models, (MoELayer, AutoEPMoELayer, MOELayer), strict=True)
        ]

        def run(adapter, index):
            layer, x = layers[adapter][index], hidden[index]
            with macs.modality(mask):
                if adapter == 0:
                    layer(x.transpose(0, 1).contiguous())
                else:
                    layer(x, *([None] if adapter == 2 else []))

        profiles = [
            profile_of(one, lambda a=a: [run(a, index) for index in range(4)])
            for a, one in enumerate(runtimes)
        ]
        for one in profiles[1:]:
            assert torch.equal(one.visual, profiles[0].visual)
            assert one.fingerprints == profiles[0].fingerprints
        events = [[], [], []]
        for adapter, one in enumerate(runtimes):
            one.use(policy, one.config, profiles[0])
            one.on_plan(events[adapter].append)
            for index in range(4):
                run(adapter, index)
    changed = []
    for megatron, *others in zip(*events, strict=True):
        # Megatron's tokens come in the order s B + b.
        routes, weights = (
            one.view(mask.shape[1], mask.shape[0], -1).transpose(0, 1).flatten(0, 1)
            for one in megatron.plan.as_map(16)
        )
        changed.append(int(megatron.plan.statistics.rerouted + megatron.plan.statistics.dropped))
        for event in others:
            own_routes, own_weights = event.plan.as_map(16)
            assert torch.equal(own_routes, routes)
            torch.testing.assert_close(own_weights, weights, rtol=0, atol=1e-5)
            assert int(event.plan.statistics.rerouted + event.plan.statistics.dropped) == changed[-1]
    assert len(changed) == 4
    assert world == 1 or any(changed) == (policy != "vanilla")  # a layer may be even by itself


@on_megatron(2, timeout=200)
def test_the_same_questions_get_the_same_answers():
    with deepspeed_on():
        (megatron, autoep, moe), runtimes = build_all(Runtime(), {})
        samples = samples_of(28)
        engines = [
            Engine(megatron, PictureEncoder(tiny.load_model()), len(samples)),
            plain.Engine(autoep.module),
            plain.Engine(moe.module),
        ]
        profile = profile_of(runtimes[0], lambda: engines[0].generate(samples))
        for policy, settings in CHOICES:
            answers, loads = [], []
            for engine, one in zip(engines, runtimes, strict=True):
                one.use(policy, busy(**settings), profile)
                answers.append(engine.generate(samples))
                loads.append([float(report.prefill.load("after")[0]) for report in one.reports()])
            assert answers[0] == answers[1] == answers[2] and loads[0] == loads[1] == loads[2], policy
            right = [answer == one.answer for answer, one in zip(answers[0], samples, strict=True)]
            assert sum(right) > 0.5 * len(right), policy
