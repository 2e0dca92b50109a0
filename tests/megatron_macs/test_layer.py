"""The MoE layer with MACS on real Megatron-Core layers, over 1, 2 and 4 gloo processes."""

import gc
import re
import weakref
from contextlib import suppress
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from support.cases import NOTHING_OVER, busy, events_of
from support.megatron_ranks import (
    Layout,
    batch_of,
    build_layer,
    drawn,
    groups_of,
    layer_config,
    megatron_on,
    newer_megatron,
    on_megatron,
    output_of,
    planned,
)
from support.ranks import gathered, on_ranks

import macs
from macs import POLICIES, MACSConfig, Profile, Runtime
from megatron_macs import cpu_engine, with_macs

GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
SIGMOID = {"moe_router_score_function": "sigmoid"}


@pytest.mark.parametrize(
    ("world", "dispatcher", "experts", "changes"),
    [
        *((world, dispatcher, 4, {}) for world in (1, 2, 4) for dispatcher in ("alltoall", "allgather")),
        (2, "alltoall", 4, {**SIGMOID, "moe_router_topk_scaling_factor": 2.5}),
        (2, "alltoall", 8, GROUPS),
        (2, "alltoall", 8, {**GROUPS, **SIGMOID}),
    ],
)
@on_megatron()
def test_with_nothing_over_capacity_the_output_is_stock_bit_for_bit(world, dispatcher, experts, changes):
    config = layer_config(dispatcher, experts, **changes)
    hidden, mask = batch_of(dist.get_rank(), 3, 9)
    stock, _ = build_layer(None, config)(hidden)
    for policy, settings in NOTHING_OVER:
        layer = build_layer(Runtime(busy(**{"min_tokens": 0, **settings}), policy=policy), config)
        with macs.modality(mask):
            assert torch.equal(layer(hidden)[0], stock), (policy, settings)
    runtime = Runtime(busy(capacity_factor=0.1, min_tokens=0))
    layer = build_layer(runtime, config)
    with macs.modality(mask):
        with runtime.calibration():
            assert torch.equal(layer(hidden)[0], stock)
        assert not torch.equal(layer(hidden)[0], stock)
        runtime.enabled = False
        assert torch.equal(layer(hidden)[0], stock)
        runtime.enabled = True
        with layer.macs.forward_pass(27, hidden.device, False):
            layer.router(hidden)  # a forward pass that ended early leaves nothing behind
        layer.train()
        assert torch.equal(layer(hidden)[0], stock)


@on_megatron(2)
def test_a_layer_may_be_called_in_parts():
    """As where CUDA graphs capture its first and its last part alone."""
    hidden, mask = batch_of(dist.get_rank(), 3, 9)
    layer = build_layer(Runtime(busy(capacity_factor=0.5, min_tokens=0)), layer_config())
    with macs.modality(mask):
        whole, _ = layer(hidden)
        layer.fwd_execution_map = "route"
        sent, probs, _ = layer(hidden, intermediate_tensors=())
        layer.fwd_execution_map = "expert_compute"
        computed, *_ = layer(None, intermediate_tensors=(sent, probs))
        layer.fwd_execution_map = "postprocess"
        output = layer(None, intermediate_tensors=(computed, None))
    assert torch.equal(output, whole) and layer.macs.recorder.read().dropped.tolist()[1] > 0


@pytest.mark.parametrize("score", [{}, SIGMOID], ids=["softmax", "sigmoid"])
@on_megatron(2)
def test_rerouting_stays_within_a_tokens_groups(score):
    runtime = Runtime(busy(min_tokens=0, capacity_factor=1.0, reroute="group"))
    layer = build_layer(runtime, layer_config(experts=8, **GROUPS, **score))
    (events, (hidden, mask)) = events_of(runtime), batch_of(dist.get_rank(), 6, 16)
    with macs.modality(mask):
        layer(hidden)
    ((chosen, plan),) = [(event.experts // 2, event.plan) for event in events]  # 2 experts a group
    within = ((plan.experts // 2)[..., None] == chosen[:, None, :]).any(-1)
    assert plan.rerouted.any() and within[plan.rerouted].all()


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.plans] + ["vanilla"])
@on_megatron(2)
def test_the_layer_computes_its_plan(dispatcher, policy):
    runtime = Runtime(busy(min_tokens=0, capacity_factor=0.8), policy=policy)
    layer = build_layer(runtime, layer_config(dispatcher, 8, 3))
    events, (hidden, mask) = events_of(runtime), batch_of(dist.get_rank(), 3, 9)
    with (
        macs.modality(mask),
        mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as sent,
    ):
        output, _ = layer(hidden)
    plan = events[0].plan
    torch.testing.assert_close(output, output_of(plan, hidden, 8), rtol=0, atol=1e-5)
    changed = int(plan.statistics.dropped + plan.statistics.rerouted)
    assert (changed > 0) == (policy != "vanilla")
    if dispatcher == "alltoall":  # what is dropped is neither sent nor computed; what is rerouted goes once
        rows = sent.call_args_list[0].args[1].shape[0]
        assert rows == int((plan.experts >= 0).sum()) and (policy != "vanilla" or rows == 3 * 9 * 3)


@pytest.mark.parametrize("level", ["expert", "rank"])
@pytest.mark.parametrize("reroute", ["rank", "group"])
@on_megatron(2)
def test_one_process_plans_what_two_plan(level, reroute):
    settings = busy(capacity_factor=0.6, level=level, reroute=reroute, min_tokens=0)
    batches = [batch_of(rank, 3, 9) for rank in (0, 1)]

    def found(runtime, groups, batch, **changes):
        _, event = planned(runtime, layer_config(experts=8, top_k=3, **changes), batch, groups)
        parts = event.plan.experts, event.plan.weights
        return [one.view(9, len(batch[1]), 3).transpose(0, 1) for one in parts]

    mine = found(Runtime(settings), None, batches[dist.get_rank()])
    alone = [dist.new_group([rank]) for rank in (0, 1)][dist.get_rank()]
    both = torch.cat([one for one, _ in batches], 1), torch.cat([one for _, one in batches])
    runtime = Runtime(settings, virtual_ranks=2)
    whole = found(runtime, groups_of(alone, alone), both, expert_model_parallel_size=1)
    for own, every in zip(mine, whole, strict=True):
        assert torch.equal(own, every[3 * dist.get_rank() :][:3])
    report = runtime.reports()[0]
    assert report.dropped.sum() + report.rerouted.sum() > 0


@pytest.mark.parametrize("world", [2, 4])
@on_megatron()
def test_every_rank_may_have_an_expert_of_its_own(world):
    runtime, batch = (
        Runtime(busy(level="rank", reroute="group", min_tokens=0)),
        batch_of(dist.get_rank(), 2, 9),
    )
    output, event = planned(runtime, layer_config(experts=world, top_k=1), batch)
    torch.testing.assert_close(output, output_of(event.plan, batch[0], world), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor = 1.0 cannot be used with MACS"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "moe_router_load_balancing_type = 'sinkhorn'"),
    ],
)
@on_megatron(1)
def test_settings_that_cannot_work_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_layer(Runtime(), layer_config(**changes))


@on_megatron(2)
def test_experts_that_do_not_divide_are_refused():
    with pytest.raises((ValueError, AssertionError), match=r"multiple|divisible"):
        build_layer(Runtime(), layer_config(experts=3))


@on_megatron(2)
def test_a_profile_is_measured_over_all_ranks_and_belongs_to_one_model(tmp_path):
    runtime = Runtime(busy(min_tokens=0))
    layer = build_layer(runtime, layer_config())
    hidden, mask = batch_of(dist.get_rank(), 2, 8)
    with macs.modality(mask), runtime.calibration():
        layer(hidden)
    profile = runtime.measured_profile(dist.group.WORLD)
    first, second = gathered((profile.visual.tolist(), profile.text.tolist()))
    assert first == second
    assert int(profile.visual.sum()) == 2 * sum(gathered(int(mask.sum())))
    assert int(profile.visual.sum() + profile.text.sum()) == 2 * 2 * 8 * 2
    path = tmp_path / f"{dist.get_rank()}.safetensors"
    profile.save(path)
    runtime.use("macs", runtime.config, Profile.load(path))
    with macs.modality(mask):
        layer(hidden)
    layer.router.weight.add_(0.5)
    runtime.use("macs", runtime.config, profile)
    with macs.modality(mask), pytest.raises(ValueError, match="it was measured on another model"):
        layer(hidden)


@on_megatron(1)
def test_weights_and_state_dict_are_stock():
    """Names, shapes and order."""
    stock, ours = (
        [(name, one.shape) for name, one in layer.state_dict().items() if hasattr(one, "shape")]
        for layer in (build_layer(None, layer_config()), build_layer(Runtime(), layer_config()))
    )
    assert stock == ours and len(stock) > 4


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@on_ranks(2)
def test_groups_may_be_passed_in(dispatcher):
    """While Megatron's parallel state is not set up at all."""

    def run(groups):
        runtime = Runtime(busy(min_tokens=0, capacity_factor=0.5, reroute="none"))
        batch = batch_of(dist.get_rank(), 3, 12)
        output, event = planned(runtime, layer_config(dispatcher, 8), batch, groups)
        assert event.plan.statistics.dropped > 0
        return output, event.plan.experts

    assert not parallel_state.is_initialized()
    with cpu_engine(), torch.inference_mode():
        everyone = dist.new_group([0, 1])
        parallel_state._set_global_memory_buffer()  # scratch of the all-gather
        found = run(groups_of(everyone, everyone))
        parallel_state.destroy_global_memory_buffer()
    with megatron_on(Layout(2, ep=2)):
        for one, other in zip(found, run(None), strict=True):
            assert torch.equal(one, other)


@newer_megatron
@on_megatron(1)
def test_multi_token_prediction_layers_are_bypassed():
    runtime = Runtime(busy(min_tokens=0, capacity_factor=0.3))
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm")
    mlp = with_macs(spec, runtime).submodules.mlp
    groups = get_default_pg_collection()
    layer = mlp(config=layer_config(), pg_collection=groups, is_mtp_layer=True).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(drawn(1, parameter.shape) / 4)
    hidden, mask = batch_of(0, 2, 8)
    with macs.modality(mask):
        layer(hidden)
    assert not runtime.layers and type(layer.token_dispatcher).__name__ == "MoEAlltoAllTokenDispatcher"


@on_megatron(1)
def test_a_layer_goes_with_its_model_and_without_a_garbage_collection():
    """A cycle would keep the process groups of a model that failed."""
    layer = build_layer(Runtime(MACSConfig(min_tokens=0)), layer_config())
    layer.macs.on_output(lambda *_: None)  # a step is kept for its output
    with macs.modality(torch.zeros(1, 80, dtype=torch.bool)):
        layer(torch.randn(80, 1, 16))
        layer.experts = None
        with suppress(TypeError):
            layer(torch.randn(80, 1, 16))
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(layer.macs)
        assert gone().adapter.owner() is layer
        del layer
        assert gone() is None
    finally:
        gc.enable()
