"""Compensation in the real engines: what is added to a layer's output is the formula, on every path."""

import pytest
import torch
import torch.distributed as dist
from support.estimates import check_added, profile_of
from support.ranks import on_ranks

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from support.deepspeed_ranks import autoep_engine, autoep_layers, macs_engine, on_deepspeed
from support.megatron_ranks import Layout, batch_of, build_layer, layer_config, megatron_on, on_megatron

import macs
from macs import MACSConfig, Runtime
from megatron_macs.compat import inference_optimized

CONFIG = MACSConfig(target_load=0.6, min_tokens=0)
pytestmark = pytest.mark.engine


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@on_megatron(2)
def test_megatron(dispatcher):
    runtime = Runtime(CONFIG)
    layer = build_layer(runtime, layer_config(dispatcher, 4, 2))
    hidden, mask = batch_of(dist.get_rank(), 3, 20)
    with macs.modality(mask):
        check_added(runtime, CONFIG, profile_of([layer.router.weight], 2), lambda: layer(hidden)[0])


@pytest.mark.skipif(inference_optimized() is None, reason="this Megatron has no such layer")
@pytest.mark.parametrize("dispatcher", ["nccl", "nvls"])
@on_megatron(2)
def test_the_inference_optimised_layer(dispatcher):
    from support import inference_layer

    with inference_layer.buffers(dispatcher, [40, 40]):
        runtime = Runtime(CONFIG)
        layer = inference_layer.build(runtime, dispatcher)
        hidden, mask = inference_layer.batch_of(dist.get_rank(), 40)
        profile = profile_of([layer.router.weight], inference_layer.TOP_K)
        with macs.modality(mask):
            check_added(runtime, CONFIG, profile, lambda: layer(hidden)[0], near=2**-5)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@on_ranks(4)
def test_tensor_and_expert_tensor_parallelism(sequence_parallel):
    """Experts' outputs are partial there: the estimates are added once, after they are summed."""
    with megatron_on(Layout(4, tp=2, ep=2, etp=2)):
        runtime = Runtime(CONFIG)
        layer = build_layer(runtime, layer_config(experts=8, top_k=3, sequence_parallel=sequence_parallel))
        hidden, mask = batch_of(dist.get_rank() // 2, 3, 12)
        if sequence_parallel:
            hidden = hidden.chunk(2)[dist.get_rank() % 2].contiguous()
        with macs.modality(mask):
            check_added(runtime, CONFIG, profile_of([layer.router.weight], 3), lambda: layer(hidden)[0])


@on_deepspeed(2)
def test_autoep():
    engine = autoep_engine("qwen3_moe", {"target_load": 0.6, "capacity_factor": None})
    layer = autoep_layers(engine)[0]
    routers = [one.adapter.router_weight() for one in engine.macs.layers]
    hidden = torch.randn(2, 40, routers[0].shape[1], generator=torch.Generator().manual_seed(dist.get_rank()))

    def run():
        output = layer(hidden)
        return output[0] if isinstance(output, tuple) else output

    with macs.modality(torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.6):
        check_added(engine.macs, CONFIG, profile_of(routers, layer.top_k), run)


@on_deepspeed(2)
def test_moe():
    engine = macs_engine(4, 2, {"policy": "macs"})
    layer = engine.module.moe
    router = layer.deepspeed_moe.gate.wg.weight
    hidden = torch.randn(2, 40, router.shape[1], generator=torch.Generator().manual_seed(dist.get_rank()))
    with macs.modality(torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.6):
        check_added(engine.macs, CONFIG, profile_of([router], 2), lambda: layer(hidden)[0])
