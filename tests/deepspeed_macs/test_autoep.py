"""AutoEP layers with MACS, in every model AutoEP knows and some it does not, over gloo processes."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="transformers is not installed")

from support.cases import NOTHING_OVER, busy, events_of
from support.deepspeed_ranks import (
    autoep_engine,
    autoep_layers,
    counted_traffic,
    deepspeed_on,
    logits_of,
    on_deepspeed,
)
from support.hf_models import CONFIGS, build, token_ids
from support.ranks import gathered, on_ranks
from torch.nn import functional

from deepspeed_macs.models import why_no_layers


@pytest.mark.parametrize(
    ("world", "name", "options"),
    [
        *((world, name, {}) for name in CONFIGS for world in (1, 2)),
        (4, "qwen3_vl_moe", {}),
        (2, "qwen3_moe", {"score_apply": "pre"}),
        (2, "qwen3_moe", {"combine_impl": "legacy_bmm"}),
        (2, "qwen3_moe", {"use_grouped_mm": False}),
    ],
    ids=str,
)
@on_deepspeed()
def test_with_nothing_over_capacity_the_output_is_stock_bit_for_bit(world, name, options):
    ids = token_ids(dist.get_rank())
    stock = logits_of(autoep_engine(name, None, **options), ids)
    expected = build(name)(input_ids=ids, use_cache=False).logits
    if not options:  # AutoEP itself computes what Hugging Face does
        torch.testing.assert_close(stock, expected, rtol=0, atol=1e-5)
    for policy, settings in NOTHING_OVER:
        block = {"policy": policy, **settings}
        assert torch.equal(logits_of(autoep_engine(name, block, **options), ids), stock), block
    engine = autoep_engine(name, {"capacity_factor": 0.3, "reroute": "none"}, **options)
    assert not torch.equal(logits_of(engine, ids), stock)
    with engine.macs.calibration():
        assert torch.equal(logits_of(engine, ids), stock)
    engine.macs.enabled = False
    assert torch.equal(logits_of(engine, ids), stock)
    engine.macs.enabled = True
    for layer in autoep_layers(engine):  # the layers alone, so that nothing else of the model changes
        layer.train()
    assert torch.equal(logits_of(engine, ids), stock)


def output_of(layer, plan, hidden):
    """What a layer must put out for hidden [B, S, D] under a plan: [T, D]."""
    weights = []
    for weight in (layer.experts.w1, layer.experts.w2, layer.experts.w3):
        parts = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, weight.data)
        weights.append(torch.cat(parts))
    flat, before = hidden.flatten(0, 1), layer.score_apply == "pre"
    output = torch.zeros_like(flat)
    for expert, (gate, down, up) in enumerate(zip(*weights, strict=True)):
        weight = torch.where(plan.experts == expert, plan.weights, 0).sum(1, keepdim=True)
        x = flat * weight if before else flat
        value = (functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
        chosen = (plan.experts == expert).any(1, keepdim=True)
        output += torch.where(chosen, value if before else value * weight, 0)
    if layer.shared_experts is not None:
        shared = layer.shared_experts(flat)
        if layer.shared_experts_gate is not None:
            shared = torch.sigmoid(layer.shared_experts_gate(flat)) * shared
        output += shared
    return output


POLICIES = "vanilla", "token-drop", "expanded-drop", "rank-balanced", "macs"
GROUP = {"reroute": "group"}


@pytest.mark.parametrize(
    ("name", "policy", "settings", "options"),
    [
        *(("qwen3_vl_moe", policy, {}, {}) for policy in POLICIES),
        # Shared experts, other scores and scales.
        ("qwen3_moe", "macs", GROUP, {"score_apply": "pre"}),
        ("qwen3_moe, weights not normalised", "macs", GROUP, {}),
        ("qwen3_5_moe", "macs", GROUP, {}),
        ("deepseek_v3", "macs", GROUP, {}),
        ("deepseek_v2, limited groups", "macs", GROUP, {}),
        ("kimi", "macs", GROUP, {}),
        ("internvl", "macs", GROUP, {"combine_impl": "legacy_bmm"}),
    ],
)
@on_deepspeed(2)
def test_the_layer_computes_its_plan_and_sends_nothing_else(name, policy, settings, options):
    engine = autoep_engine(name, {"policy": policy, "capacity_factor": 0.6, **settings}, **options)
    layer, events = autoep_layers(engine)[0], events_of(engine.macs)
    computed, seen = [], []
    layer.experts.register_forward_pre_hook(lambda _, args: computed.append(int(args[1].sum())))
    layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with counted_traffic() as sent:
        assert logits_of(engine, token_ids(dist.get_rank())).isfinite().all()
    plan, (hidden, output) = events[0].plan, seen[0]
    output = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(output.flatten(0, 1), output_of(layer, plan, hidden), rtol=0, atol=1e-4)
    dropped, rerouted = int(plan.statistics.dropped), int(plan.statistics.rerouted)
    assert (dropped + rerouted == 0) == (policy == "vanilla")
    assert rerouted > 0 or not settings
    # What is dropped is neither sent nor computed; what is rerouted travels once.
    kept = plan.experts[plan.experts >= 0]
    assert (len(kept) < 3 * 12 * 2) == (dropped > 0) or policy == "expanded-drop"
    mine = kept // layer.num_local_experts == torch.arange(2)[:, None]
    arrived = sum(one[dist.get_rank()] for one in gathered(mine.sum(1).tolist()))
    assert sent[:2] == [len(kept), arrived]  # there and back
    assert arrived <= computed[0] <= arrived + 8 * layer.num_local_experts  # groups are padded to 8 rows


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2, limited groups", "kimi"])
@on_deepspeed(1)
def test_rerouting_stays_within_a_tokens_groups(name):
    engine = autoep_engine(name, {"capacity_factor": 0.4, "reroute": "group"})
    router, events, seen = autoep_layers(engine)[0].router, events_of(engine.macs), []
    router.register_forward_hook(lambda _, args, output: seen.append(output[1]))
    logits_of(engine, token_ids(0, rows=6))
    plan, size = events[0].plan, router.num_experts // router.num_expert_groups
    within = ((plan.experts // size)[..., None] == (seen[0] // size)[:, None, :]).any(-1)
    assert plan.rerouted.any() and within[plan.rerouted].all()


@pytest.mark.parametrize("lengths", [[9, 1], [1, 30], [30, 2, 7, 1]], ids=str)
@on_deepspeed(lambda lengths: len(lengths), timeout=60)
def test_ranks_may_have_uneven_tokens(lengths):
    length = lengths[dist.get_rank()]
    logits = logits_of(
        autoep_engine("qwen3_moe", {"capacity_factor": 0.5}), token_ids(dist.get_rank(), 1, length)
    )
    assert logits.shape == (1, length, 64) and logits.isfinite().all()


def test_one_process_plans_what_two_plan(pool):
    first, second = pool.run(planned_on_a_rank, 2, {"virtual_ranks": 1})
    (whole,) = pool.run(planned_on_a_rank, 1, {"virtual_ranks": 2})
    assert first + second == whole


def planned_on_a_rank(virtual_ranks):
    with deepspeed_on():
        sources = range(virtual_ranks) if virtual_ranks > 1 else [dist.get_rank()]
        engine = autoep_engine("qwen3_moe", {"capacity_factor": 0.6, "virtual_ranks": virtual_ranks})
        events = events_of(engine.macs)
        logits_of(engine, torch.cat([token_ids(rank) for rank in sources]))
    assert events[0].plan.rerouted.any()
    return events[0].plan.experts.tolist()


@pytest.mark.parametrize("score_apply", ["post", "pre"])
@pytest.mark.parametrize("world", [2, 4])
@on_ranks(lambda world, **_: world)
def test_folded_with_tensor_parallelism(world, score_apply):
    """Ranks 0 and 1, and 2 and 3, have the same tokens."""
    ids = token_ids(dist.get_rank() // 2)
    bounded = {"capacity_factor": 0.4, "reroute": "none"}
    with deepspeed_on():  # the same tokens, where no ranks are tensor-parallel
        expected = logits_of(autoep_engine("mixtral", bounded, score_apply=score_apply), ids)
    options = {"tensor_parallel": 2, "score_apply": score_apply, "validate_folding_routing": True}
    with deepspeed_on():
        with counted_traffic() as stock_rows:
            stock = logits_of(autoep_engine("mixtral", None, **options), ids)
        for block in (
            {"capacity_factor": 1e6},
            {"policy": "vanilla"},
            {"capacity_factor": 0.1, "min_tokens": 1000},
        ):
            assert torch.equal(logits_of(autoep_engine("mixtral", block, **options), ids), stock), block
        engine = autoep_engine("mixtral", bounded, **options)
        events = events_of(engine.macs)
        with counted_traffic() as rows:
            logits = logits_of(engine, ids)
        # Its additions depend on the rank, not on the tokens alone.
        with pytest.raises(ValueError, match="policy expanded-drop: the expert-parallel group holds"):
            engine.macs.use("expanded-drop", busy(capacity_factor=0.5, min_tokens=0))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    kept = int((events[0].plan.experts >= 0).sum())
    first = dist.get_rank() // 2 * 2
    own, before, same, counts = (
        one[first : first + 2] for one in zip(*gathered((rows[0], stock_rows[0], logits, kept)), strict=True)
    )
    assert torch.equal(*same)  # tensor-parallel ranks agree
    # Together they send what the plan keeps, once, and less than stock does.
    assert sum(own) == counts[0] == counts[1] < sum(before) == 3 * 12 * 2


def test_a_model_of_several_models_is_refused_with_the_one_to_pass():
    """As Qwen3-Omni, whole: its talker has experts, too, and does not see pictures."""
    whole = torch.nn.Module()
    whole.thinker = torch.nn.Identity()
    assert "deepspeed_macs.initialize(model=model.thinker, ...)" in why_no_layers(whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_deepspeed(2)
def test_half_precision_stays_bit_for_bit(dtype):
    stock, roomy = (
        logits_of(
            autoep_engine("qwen3_vl_moe", block, dtype=dtype, use_grouped_mm=False),
            token_ids(dist.get_rank()),
        )
        for block in (None, {"capacity_factor": 1e6})
    )
    assert torch.equal(stock, roomy) and stock.dtype == dtype


@on_deepspeed(1)
def test_deepep_is_handed_the_plan():
    """-1 and no weight for what is dropped."""
    engine, handed = autoep_engine("qwen3_moe", {"capacity_factor": 0.3, "reroute": "none"}), []
    for layer in autoep_layers(engine):
        layer.comm_backend, layer.ep_size = "deepep", 2
        layer._deepep_route = lambda x, routed: handed.append((x, routed)) or torch.zeros_like(x)
    events = events_of(engine.macs)
    logits_of(engine, token_ids(0))
    assert len(handed) == len(events) == 2
    x, routed = handed[0]
    assert torch.equal(routed.selected_experts, events[0].plan.experts) and len(x) == 36
    dropped = routed.selected_experts < 0
    assert dropped.any() and (routed.top_scores[dropped] == 0).all()
    assert int(routed.num_tokens_per_expert.sum()) == 36 * 2 - int(dropped.sum())
