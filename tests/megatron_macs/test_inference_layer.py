"""Megatron's inference-optimised MoE layer: both dispatchers, the router, the fused kernels."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from megatron_macs.compat import inference_optimized

if inference_optimized() is None:
    pytest.skip("this Megatron has no inference-optimised MoE layer", allow_module_level=True)

from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer.moe.token_dispatcher_inference import (
    InferenceAllGatherDispatcherBase,
    NVLSAllGatherVDispatcher,
)
from support.cases import busy, events_of
from support.inference_layer import batch_of, buffers, build, output_of
from support.megatron_ranks import on_megatron

import macs
from macs import Runtime

RANKS = {"one": [30], "two": [24, 24], "four": [12, 12, 12, 12], "two, uneven": [30, 11]}
both_dispatchers = pytest.mark.parametrize("dispatcher", ["nccl", "nvls"])


def serving(mode):
    """With an inference engine at work, or without one."""
    return InferenceMode.active() if mode == "engine" else nullcontext()


@both_dispatchers
@pytest.mark.parametrize(("world", "ranks"), [(len(RANKS[name]), name) for name in RANKS])
@on_megatron()
def test_with_nothing_over_capacity_the_output_is_stock_bit_for_bit(world, ranks, dispatcher):
    counts = RANKS[ranks]
    hidden, mask = batch_of(dist.get_rank(), counts[dist.get_rank()])
    with buffers(dispatcher, counts):
        for mode in ("engine", "plain"):
            with serving(mode), macs.modality(mask):
                stock, _ = build(None, dispatcher)(hidden)
                for name, settings in (
                    ("macs", {"capacity_factor": 1e6, "min_tokens": 0}),
                    ("few tokens", {"capacity_factor": 0.1, "min_tokens": 1000}),
                    ("off", {"capacity_factor": 0.1, "min_tokens": 0}),
                ):
                    runtime = Runtime(busy(**settings))
                    runtime.enabled = name != "off"
                    assert torch.equal(build(runtime, dispatcher)(hidden)[0], stock), (name, mode)


def check_plans(dispatcher, counts, padding=0):
    """What the layer computes is what its plan says, in turns with an engine and without."""
    count = counts[dist.get_rank()]
    hidden, mask = batch_of(dist.get_rank(), count)
    real = torch.arange(count)[None] < count - padding
    runtime = Runtime(busy(min_tokens=0, capacity_factor=0.5))
    layer = build(runtime, dispatcher)
    events = events_of(runtime)
    for mode in ("engine", "plain", "engine"):
        with serving(mode), macs.modality(mask, valid=real):
            output, _ = layer(hidden)
        plan = events[-1].plan
        expected = output_of(plan, hidden)
        wrong = (output.flatten(0, 1).float() - expected).abs()[: count - padding]
        assert float(wrong.max()) < 0.02 * float(expected.abs().max())  # bfloat16
        assert plan.statistics.rerouted + plan.statistics.dropped > 0
    assert len(events) == 3


@both_dispatchers
@pytest.mark.parametrize(("world", "ranks"), [(len(RANKS[name]), name) for name in RANKS])
@on_megatron()
def test_the_layer_computes_its_plan(world, ranks, dispatcher):
    with buffers(dispatcher, RANKS[ranks]):
        check_plans(dispatcher, RANKS[ranks])


@on_megatron(2)
def test_padding_of_a_cuda_graph_does_not_affect_the_plan():
    with buffers("nvls", [40, 40]):
        NVLSAllGatherVDispatcher.set_real_token_count_tensor(torch.tensor([28], dtype=torch.int32))
        check_plans("nvls", [40, 40], padding=12)


@on_megatron(1)
def test_both_dispatchers_of_the_layer_are_ours():
    layer = build(Runtime(), "nccl")
    parts = layer.router, layer._training_token_dispatcher, layer._inference_token_dispatcher
    assert [type(part).__name__ for part in parts] == [
        "MACSInferenceTopKRouter",
        "MACSAlltoAllTokenDispatcher",
        "MACSNCCLAllGatherDispatcher",
    ]
    assert isinstance(parts[2], InferenceAllGatherDispatcherBase)


@on_megatron(1)
def test_a_policy_that_adds_assignments_is_refused():
    message = "transformer_impl = 'inference_optimized' sends 3 assignments"
    with pytest.raises(ValueError, match=message):
        build(Runtime(policy="expanded-drop"), "nccl")
