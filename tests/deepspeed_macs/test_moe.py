"""DeepSpeed's own MoE layer with MACS, over 1, 2 and 4 gloo processes."""

import logging
import types
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from support.cases import BUSY, NOTHING_OVER, events_of
from support.deepspeed_ranks import (
    DROPLESS,
    HIDDEN,
    IMAGE_TOKEN,
    Expert,
    Model,
    batch_of,
    counted_traffic,
    fill_expert,
    macs_engine,
    on_deepspeed,
    stock_engine,
)
from support.ranks import gathered

import deepspeed_macs


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
@on_deepspeed()
def test_with_nothing_over_capacity_the_output_is_stock_bit_for_bit(world, k):
    ids = batch_of(dist.get_rank(), 3, 9)
    stock = stock_engine(8, k)(ids)
    for policy, settings in NOTHING_OVER:
        block = {"policy": policy, **settings}
        # The gate's own settings are DeepSpeed's defaults: dropping, random selection, noise.
        assert torch.equal(macs_engine(8, k, block)(ids), stock), block
    engine = macs_engine(8, k, {"capacity_factor": 0.1}, **DROPLESS)
    assert not torch.equal(engine(ids), stock)
    with engine.macs.calibration():
        assert torch.equal(engine(ids), stock)
    engine.macs.enabled = False
    assert torch.equal(engine(ids), stock)
    engine.macs.enabled = True
    engine.train()
    assert torch.equal(engine(ids), stock)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("policy", ["vanilla", "token-drop", "expanded-drop", "rank-balanced", "macs"])
@on_deepspeed(2)
def test_the_layer_computes_its_plan_and_sends_no_empty_slot(policy, k):
    ids = batch_of(dist.get_rank(), 3, 9)
    engine = macs_engine(8, k, {"policy": policy, "capacity_factor": 0.8})
    events, computed = events_of(engine.macs), []
    engine.module.moe.deepspeed_moe.experts.register_forward_pre_hook(
        lambda _, args: computed.append(args[0].numel() // HIDDEN)
    )
    with counted_traffic() as sent:
        output = engine(ids)
    plan, flat = events[0].plan, engine.module.embed(ids).flatten(0, 1)
    expected = torch.zeros_like(flat)
    for expert in range(8):
        weight = torch.where(plan.experts == expert, plan.weights, 0).sum(1)
        expected += fill_expert(Expert(), expert)(flat) * weight[:, None]
    torch.testing.assert_close(output.flatten(0, 1), expected, rtol=0, atol=1e-5)
    # C, on every rank: the largest load that is kept.
    rows = max(gathered(int(torch.bincount(plan.experts[plan.experts >= 0], minlength=8).max())))
    assert sent == [8 * rows] * 2 and computed == [2 * 4 * rows]  # there and back
    assert (int(plan.statistics.dropped + plan.statistics.rerouted) == 0) == (policy == "vanilla")
    if policy == "macs":
        with counted_traffic() as unplanned:
            macs_engine(8, k, {"policy": "vanilla"})(ids)
        assert sent[0] < unplanned[0] and len(unplanned) == 2


@pytest.mark.parametrize(
    ("lengths", "block"),
    [
        *(
            (lengths, {"capacity_factor": 0.5})
            for lengths in ([9, 0], [0, 9], [1, 30], [30, 0, 7, 2], [0, 0, 0, 5])
        ),
        ([9, 0], {"min_tokens": 8}),  # steps too small to plan
        ([30, 0, 7, 2], {"min_tokens": 8}),
        ([0, 0], {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [1, 2, 3])
@on_deepspeed(lambda lengths, **_: len(lengths), timeout=60)
def test_ranks_agree_on_c_with_uneven_tokens_or_none(lengths, block, k):
    """deepspeedai/DeepSpeed#6809: ranks that drop by a capacity of their own hang in the all-to-all."""
    engine, length = macs_engine(4, k, block), lengths[dist.get_rank()]
    for count in (length, max(0, length - 1)):
        output = engine(batch_of(dist.get_rank(), 1, count))
        assert output.shape == (1, count, HIDDEN) and output.isfinite().all()


@pytest.mark.parametrize("noise", [False, True])
@on_deepspeed(1)
def test_noise_only_where_it_is_asked_for(noise):
    """Two runs of a k = 2 gate with DeepSpeed's default noise, with different random states."""
    engine = macs_engine(4, 2, {"second_expert_sampling": True} if noise else {})
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs.append(engine(batch_of(0, 3, 9)))
    assert torch.equal(*outputs) != noise


def flat_gathers():
    """gloo, unlike NCCL, wants both sides of an all-gather in one shape; DeepSpeed's are not."""
    real = deepspeed.comm.all_gather_into_tensor

    def gather(output, source, group=None):
        return real(output, source.flatten(), group=group)

    return mock.patch.object(deepspeed.comm, "all_gather_into_tensor", gather)


def tensor_parallel_model(k, block):
    """Every rank a tensor-parallel rank with the same tokens, and experts spread over all of them."""
    world = dist.get_world_size()
    group = dist.new_group(list(range(world)))
    groups.mpu = types.SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: world,
        get_tensor_model_parallel_rank=dist.get_rank,
        get_tensor_model_parallel_group=lambda: group,
        get_model_parallel_world_size=lambda: world,
        get_model_parallel_rank=dist.get_rank,
        get_model_parallel_group=lambda: group,
        get_data_parallel_world_size=lambda: 1,
        get_data_parallel_rank=lambda: 0,
        get_data_parallel_group=lambda: None,
    )
    model = Model(4, k, world)
    groups._create_expert_and_data_parallel(world)
    model.moe.deepspeed_moe._set_ep_group(groups._get_expert_parallel_group(f"ep_size_{world}"))
    return model.eval(), deepspeed_macs.add_macs(model, block)


# Rerouting that does not ask where experts are, so that one process can say what must come out.
SHARED = {**BUSY, "image_token_id": IMAGE_TOKEN, "min_tokens": 0, "capacity_factor": 0.7, "reroute": "group"}


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("world", [2, 4])
@on_deepspeed()
def test_tensor_parallel_ranks_share_the_rows(world, k):
    ids = batch_of(0, 3, 9)
    alone = Model(4, k, 1)
    deepspeed_macs.add_macs(alone, SHARED)
    expected = alone.eval()(ids)
    model, runtime = tensor_parallel_model(k, SHARED)
    computed = []
    model.moe.deepspeed_moe.experts.register_forward_pre_hook(
        lambda _, args: computed.append(args[0].shape[2])
    )
    with flat_gathers():
        output = model(ids)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    report = runtime.reports()[0]
    assert report.dropped.sum() > 0
    # C is a multiple of the tensor-parallel size; each rank computes its part of it.
    assert len(computed) == 1
    assert 0 <= computed[0] * world - int(report.rows_of_experts("after").max()) < world


@on_deepspeed(2)
def test_tensor_parallel_ranks_with_the_same_tokens_must_plan_alike():
    with pytest.raises(ValueError, match="policy expanded-drop: the expert-parallel group holds"):
        tensor_parallel_model(2, {**SHARED, "policy": "expanded-drop"})


@pytest.mark.parametrize("drop_tokens", [True, False])
@pytest.mark.parametrize("off", ["off", "training"])
@pytest.mark.parametrize("k", [1, 2, 3])
@on_deepspeed(2, timeout=60)
def test_a_gate_makes_the_same_collectives_on_or_off(off, drop_tokens, k):
    """Where MACS is on there and off here no rank hangs."""
    engine = macs_engine(4, k, {"capacity_factor": 0.7}, drop_tokens=drop_tokens, eval_capacity_factor=0.5)
    engine.macs.layers[0].consistency._store = None  # the comparison, which would raise, is not tried here
    ids = batch_of(dist.get_rank(), 3, 9)
    with counted_traffic() as rows:
        for step in range(3):
            if dist.get_rank() == 1:
                engine.macs.enabled = not (off == "off" and step == 1)
                engine.train(off == "training" and step == 1)
            output = engine(ids)
    assert output.isfinite().all() and len(rows) == 6


@on_deepspeed(1)
def test_pooled_capacity_in_the_moe_layer_logs_a_warning():
    """Once; where the block names no policy, it is the one that this layer profits from."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("macs.runtime")
    logger.addHandler(handler)
    logging.disable(logging.NOTSET)
    try:
        engine = macs_engine(4, 2, {"level": "rank", "capacity_factor": 0.5, "policy": "macs"})
        engine.macs.use("rank-balanced")
        engine(batch_of(0, 3, 9))
    finally:
        logging.disable(logging.WARNING)
        logger.removeHandler(handler)
    assert len([line for line in said if "do not shorten its steps; use policy = padded" in line]) == 1
    block = {"image_token_id": IMAGE_TOKEN}
    bare = deepspeed_macs.init_inference(Model(4, 2, 1), {"dtype": "fp32", "macs": block})
    assert bare.macs.policy == "padded"
