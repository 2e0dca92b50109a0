"""The bound of a group in the real engines: what one rank leaves, another may use."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from support.deepspeed_ranks import autoep_engine, autoep_layers, macs_engine, on_deepspeed
from support.megatron_ranks import build_layer, layer_config, on_megatron

import macs
from macs import MACSConfig, Runtime

BOUND = {"level": "rank", "reroute": "none", "capacity_factor": None, "target_load": 1.05}


def leaning(router, rank, count):
    """hidden [count, D] whose tokens choose experts of ``rank`` alone, of a router [E, D] over two ranks."""
    own = router.view(2, -1, router.shape[1])[rank].double()
    hidden = torch.linalg.pinv(own) @ torch.full((len(own),), 9.0, dtype=torch.float64)
    other = router.view(2, -1, router.shape[1])[1 - rank].double()
    hidden = hidden - torch.linalg.pinv(other) @ (other @ hidden)
    noise = torch.randn(count, router.shape[1], generator=torch.Generator().manual_seed(rank))
    return (hidden + noise / 8).to(router.dtype)


def counted(runtime):
    """Loads of the group by rank before and after planning [2], and what is dropped, of the first layer."""
    report = runtime.layers[0].recorder.read(dist.group.WORLD)
    rows = [report.rows_of_ranks(stage).sum(0) for stage in ("before", "after")]
    return *((one / one.new_tensor(float(rows[0].sum()) / 2)).tolist() for one in rows), report.share(
        "dropped"
    )


@pytest.mark.engine
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@on_megatron(2)
def test_opposite_skews_lose_nothing_in_megatron(dispatcher):
    config = layer_config(dispatcher, 4, 2)
    runtime = Runtime(MACSConfig(target_load=1.05, min_tokens=0))
    layer = build_layer(runtime, config)
    hidden = leaning(layer.router.weight, dist.get_rank(), 128)[:, None]
    with macs.modality(torch.arange(128)[None] % 2 == 0):
        output, _ = layer(hidden)
    before, after, dropped = counted(runtime)
    assert before == after == [1.0, 1.0] and dropped == 0
    assert torch.equal(output, build_layer(None, config)(hidden)[0])
    runtime.use("macs", MACSConfig(target_load=0.999, min_tokens=0))  # below the mean each keeps its part
    with macs.modality(torch.arange(128)[None] % 2 == 0):
        layer(hidden)
    assert counted(runtime)[2] > 0.4


@pytest.mark.engine
@pytest.mark.parametrize("small", [0, 8])
@on_megatron(2)
def test_a_step_that_is_too_small_to_plan_takes_part(small):
    """No rank waits for ever, and what is dropped is what this one rank has beyond the bound."""
    runtime = Runtime(MACSConfig(target_load=1.05, min_tokens=64))
    layer = build_layer(runtime, layer_config("alltoall", 4, 2))
    count = 128 if dist.get_rank() == 0 else small
    hidden = leaning(layer.router.weight, dist.get_rank(), count)[:, None]
    with macs.modality(torch.zeros(1, count, dtype=torch.bool)):
        layer(hidden)
    if dist.get_rank() == 0:
        report = runtime.reports()[0]
        assert report.rows_of_ranks("after").tolist() == [[134.0, 0.0]]


@pytest.mark.engine
@on_deepspeed(2)
def test_opposite_skews_lose_nothing_in_autoep():
    engine = autoep_engine("qwen3_moe", BOUND)
    layer = autoep_layers(engine)[0]
    hidden = leaning(layer.router.gate.weight, dist.get_rank(), 128)[None]
    with macs.modality(torch.zeros(1, 128, dtype=torch.bool)):
        output = layer(hidden)
        before, after, dropped = counted(engine.macs)
        engine.macs.enabled = False
        stock = layer(hidden)
    assert before == after == [1.0, 1.0] and dropped == 0
    first = [one[0] if isinstance(one, tuple) else one for one in (output, stock)]
    assert torch.equal(*first)


@pytest.mark.engine
@on_deepspeed(2)
def test_opposite_skews_lose_nothing_in_moe():
    engine = macs_engine(4, 2, BOUND | {"policy": "macs"})
    layer = engine.module.moe
    hidden = leaning(layer.deepspeed_moe.gate.wg.weight, dist.get_rank(), 128)[None]
    with macs.modality(torch.zeros(1, 128, dtype=torch.bool)):
        output = layer(hidden)[0]
        before, after, dropped = counted(engine.macs)
        engine.macs.use("vanilla")
        unplanned = layer(hidden)[0]
    assert before == after == [1.0, 1.0] and dropped == 0 and torch.equal(output, unplanned)
