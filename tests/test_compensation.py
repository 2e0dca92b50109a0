"""Compensation in the real engines: what is added to a layer's output is the formula, on every path."""

import pytest
import torch
import torch.distributed as dist
from support.estimates import check_added, profile_of
from support.ranks import on_ranks

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from support import megatron_layouts
from support.deepspeed_jobs import autoep_engine, macs_engine, on_deepspeed
from support.megatron_jobs import batch_of, build_layer, layer_config, on_megatron

import macs
from macs import MACSConfig, Runtime
from megatron_macs.compat import inference_optimized

CONFIG = MACSConfig(target_load=0.6, min_tokens=0)
pytestmark = pytest.mark.engine


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@on_ranks(2)
@on_megatron
def test_megatron(dispatcher):
    runtime = Runtime(CONFIG)
    layer = build_layer(runtime, layer_config(dispatcher, 4, 2))
    hidden, mask = batch_of(dist.get_rank(), 3, 20)
    with macs.modality(mask):
        check_added(runtime, CONFIG, profile_of([layer.router.weight], 2), lambda: layer(hidden)[0])


@pytest.mark.skipif(inference_optimized() is None, reason="this Megatron has no such layer")
@pytest.mark.parametrize("dispatcher", ["nccl", "nvls"])
@on_ranks(2)
@on_megatron
def test_the_inference_optimised_layer(dispatcher):
    from support import megatron_inference_layer as inference

    @inference.on_engine
    def run(dispatcher, count):
        runtime = Runtime(CONFIG)
        layer = inference.build(runtime, dispatcher)
        hidden, mask = inference.batch_of(dist.get_rank(), count)
        profile = profile_of([layer.router.weight], inference.TOP_K)
        with macs.modality(mask):
            check_added(runtime, CONFIG, profile, lambda: layer(hidden)[0], near=2**-5)

    run(dispatcher, [40, 40])


@pytest.mark.parametrize("sequence_parallel", [False, True])
@on_ranks(4)
def test_tensor_and_expert_tensor_parallelism(sequence_parallel):
    """Experts' outputs are partial there: the estimates are added once, after they are summed."""
    layout = {"tp": 2, "ep": 2, "etp": 2, "sp": sequence_parallel}
    layer_under(layout)


@megatron_layouts.on_layout
def layer_under(layout):
    runtime = Runtime(CONFIG)
    layer = megatron_layouts.build(runtime, megatron_layouts.config_of(layout, "alltoall"))
    hidden, mask = megatron_layouts.tokens_of(layout)
    profile = profile_of([layer.router.weight], megatron_layouts.TOP_K)
    with macs.modality(mask):
        check_added(runtime, CONFIG, profile, lambda: layer(hidden)[0])


@on_ranks(2)
@on_deepspeed
def test_autoep():
    engine = autoep_engine("qwen3_moe", {"target_load": 0.6, "capacity_factor": None})
    layer = next(one for one in engine.modules() if isinstance(one, AutoEPMoELayer))
    routers = [one.adapter.router_weight() for one in engine.macs.layers]
    hidden = torch.randn(2, 40, routers[0].shape[1], generator=torch.Generator().manual_seed(dist.get_rank()))

    def run():
        output = layer(hidden)
        return output[0] if isinstance(output, tuple) else output

    with macs.modality(torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.6):
        check_added(engine.macs, CONFIG, profile_of(routers, layer.top_k), run)


@on_ranks(2)
@on_deepspeed
def test_moe():
    engine = macs_engine(4, 2, {"policy": "macs"})
    layer = engine.module.moe
    router = layer.deepspeed_moe.gate.wg.weight
    hidden = torch.randn(2, 40, router.shape[1], generator=torch.Generator().manual_seed(dist.get_rank()))
    with macs.modality(torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.6):
        check_added(engine.macs, CONFIG, profile_of([router], 2), lambda: layer(hidden)[0])
