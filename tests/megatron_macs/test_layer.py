"""The MoE layer with MACS on real Megatron-Core layers, over 1, 2 and 4 gloo processes."""

import gc
import weakref

import pytest
import torch

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from support.megatron_jobs import build_layer, layer_config, on_megatron
from support.ranks import on_ranks
from support.workers import RankFailed

import macs
from macs import POLICIES, MACSConfig, Runtime

JOBS = "support.megatron_jobs"


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_with_nothing_over_capacity_the_output_is_stock_bit_for_bit(pool, dispatcher, world):
    for same in pool.run(f"{JOBS}:unbounded_is_stock", world, dispatcher, 4, 2, {}):
        assert same == dict.fromkeys(same, True)


def test_the_endpoint_of_each_rank_counts_what_it_planned(pool):
    """A thousand steps on two ranks, every fourth of them too small to plan, scraped meanwhile."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    results = pool.run(f"{JOBS}:scraped", 2, 1000)
    for result in results:
        found = {
            (one.name, *one.labels.values()): one.value
            for family in parser.text_string_to_metric_families(result["answer"])
            for one in family.samples
        }
        for name, count in result["expected"].items():
            kind, action = name.split()
            assert found["macs_assignments_total", action, "0", kind] == count > 0, name
        assert found["macs_steps_total", "planned"] == 750 and found["macs_steps_total", "bypassed"] == 250
        assert result["scrapes"] == 11
    assert results[0]["expected"] != results[1]["expected"]


def test_sigmoid_scores_are_stock_bit_for_bit(pool):
    changes = {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5}
    for same in pool.run(f"{JOBS}:unbounded_is_stock", 2, "alltoall", 4, 2, changes):
        assert same == dict.fromkeys(same, True)


GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_group_limited_routing_is_stock_bit_for_bit_and_rerouting_stays_within_groups(pool, score_function):
    changes = {**GROUPS, "moe_router_score_function": score_function}
    for same in pool.run(f"{JOBS}:unbounded_is_stock", 2, "alltoall", 8, 2, changes):
        assert same == dict.fromkeys(same, True)
    for found in pool.run(f"{JOBS}:rerouted_within_groups", 2, changes):
        assert found["rerouted"] > 0 and found["within"]


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.plans])
def test_the_layer_computes_its_plan(pool, dispatcher, policy):
    results = pool.run(
        f"{JOBS}:planned_output", 2, dispatcher, policy, {"capacity_factor": 0.8}, 3, 9, 8, 3, 1
    )
    for result in results:
        assert result["error"] < 1e-5
        assert result["statistics"]["dropped"] + result["statistics"]["rerouted"] > 0
        if dispatcher == "alltoall":
            # What is dropped is neither sent nor computed; what is rerouted travels once.
            assert result["rows_sent"] == [result["rows_planned"]]


def test_vanilla_sends_every_row(pool):
    for result in pool.run(f"{JOBS}:planned_output", 2, "alltoall", "vanilla", {}, 3, 9, 8, 3, 1):
        assert result["rows_sent"] == [3 * 9 * 3] and result["error"] < 1e-5


@pytest.mark.parametrize("level", ["expert", "rank"])
@pytest.mark.parametrize("reroute", ["rank", "group"])
def test_one_process_plans_what_two_plan(pool, level, reroute):
    settings = {"capacity_factor": 0.6, "level": level, "reroute": reroute}
    two = pool.run(f"{JOBS}:planned_output", 2, "alltoall", "macs", settings, 3, 9, 8, 3, 1)
    one = pool.run(f"{JOBS}:planned_output", 1, "alltoall", "macs", settings, 3, 9, 8, 3, 2)[0]
    assert two[0]["experts"] + two[1]["experts"] == one["experts"]
    assert two[0]["weights"] + two[1]["weights"] == one["weights"]
    moved = sum(result["statistics"]["dropped"] + result["statistics"]["rerouted"] for result in two)
    assert moved == one["statistics"]["dropped"] + one["statistics"]["rerouted"] > 0


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_may_have_an_expert_of_its_own(pool, world):
    settings = {"level": "rank", "reroute": "group"}
    for result in pool.run(f"{JOBS}:planned_output", world, "alltoall", "macs", settings, 2, 9, world, 1, 1):
        assert result["error"] < 1e-5


@pytest.mark.parametrize("lengths", [[9, 0], [0, 9], [1, 30]])
def test_ranks_may_have_uneven_tokens_or_none(pool, lengths):
    results = pool.run(f"{JOBS}:uneven_tokens", 2, {"capacity_factor": 0.5}, lengths)
    for (shape, finite, _), length in zip(results, lengths, strict=True):
        assert shape == (length, 1, 16) and finite


@pytest.mark.parametrize("kind", ["one token", "no visual tokens", "all visual", "k is E", "not finite"])
def test_odd_batches(pool, kind):
    for settings in ({}, {"level": "rank", "reroute": "group"}, {"spare_text": True}):
        found = pool.run(f"{JOBS}:odd_batch", 1, kind, settings)[0]
        bad = 2 if kind == "not finite" else 0
        assert found["nonfinite"] == bad
        assert found["finite"] >= found["tokens"] - bad
        if kind == "no visual tokens":
            assert found["visual"] == 0 and found["R_v"] == 0.0
        if kind == "all visual":
            assert found["visual"] == found["tokens"] and found["R_v"] == 1.0


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("length", "modality mask: found shape (2, 7), the layer has 2 sequences of 8 tokens"),
        ("batch", "modality mask: found shape (1, 8), the layer has 2 sequences of 8 tokens"),
        ("dtype", "modality mask: found torch.float32, expected torch.bool or"),
        ("device", "modality mask: found on meta, the hidden states are on cpu"),
        ("shape", "modality mask: found shape (16,), expected (any, any)"),
    ],
)
def test_a_mask_that_does_not_fit_is_an_error_and_hangs_nobody(pool, kind, message):
    with pytest.raises(RankFailed) as caught:
        pool.run(f"{JOBS}:bad_mask", 2, kind, [0], timeout=100)
    assert message in caught.value.errors[0][1]
    # The other rank learns from the closed connection that its peer is gone.
    assert caught.value.errors[1] is not None


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (
            {"moe_expert_capacity_factor": 1.0},
            {},
            "moe_expert_capacity_factor = 1.0 cannot be used with MACS",
        ),
        ({"moe_router_load_balancing_type": "sinkhorn"}, {}, "moe_router_load_balancing_type = 'sinkhorn'"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(pool, changes, settings, message):
    with pytest.raises(RankFailed) as caught:
        pool.run(f"{JOBS}:refused", 1, changes, settings)
    kind, found, _ = caught.value.errors[0]
    assert kind == "ValueError" and message in found


def test_experts_that_do_not_divide_are_refused(pool):
    with pytest.raises(RankFailed) as caught:
        pool.run(f"{JOBS}:refused", 2, {"experts": 3}, {})
    for _, found, _ in caught.value.errors:
        assert "multiple" in found or "divisible" in found


def test_a_profile_is_measured_over_all_ranks_and_belongs_to_one_model(pool, tmp_path):
    first, second = pool.run(f"{JOBS}:calibrate_and_use", 2, str(tmp_path))
    assert first["visual"] == second["visual"] and first["text"] == second["text"]
    assert sum(first["visual"][0]) == first["expected"] + second["expected"]
    assert sum(first["visual"][0]) + sum(first["text"][0]) == 2 * 2 * 8 * 2
    assert "it was measured on another model" in first["refusal"]


def test_weights_and_state_dict_are_stock(pool):
    assert pool.run(f"{JOBS}:parameters_are_stock", 1) == [True]


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_groups_may_be_passed_in(pool, dispatcher):
    settings = {"capacity_factor": 0.5, "reroute": "none"}
    found = pool.run(f"{JOBS}:without_global_state", 2, dispatcher, settings)
    assert found == pool.run(f"{JOBS}:with_global_state", 2, dispatcher, settings)
    assert all(one["dropped"] > 0 for one in found)


@pytest.mark.parametrize("first", ["prompt", "small"])
def test_a_prompt_is_planned_where_decoding_is_captured(pool, first):
    pytest.importorskip("megatron.core.inference.config", reason="this Megatron wants another configuration")
    for one in pool.run(f"{JOBS}:planned_where_graphs_are_on", 2, first):
        assert one["same"] and one["rows"] and one["on host"]
        assert one["points"] == ["before_ep_alltoall"] * (first == "small") + ["before_permutation_1"]


def test_reports_of_ranks_with_different_steps_are_not_added(pool):
    assert pool.run(f"{JOBS}:reports_of_uneven_steps", 2, 0, False) == [[1], [1]]
    assert pool.run(f"{JOBS}:reports_of_uneven_steps", 2, 2, True) == [[3], [1]]
    with pytest.raises(RankFailed) as caught:
        pool.run(f"{JOBS}:reports_of_uneven_steps", 2, 2, False)
    assert all("recorded 1 to 3 steps" in error[1] for error in caught.value.errors)


def test_multi_token_prediction_layers_are_bypassed(pool):
    pytest.importorskip("megatron.core.inference.config", reason="this Megatron tells no such layer")
    (found,) = pool.run(f"{JOBS}:layer_that_guesses_ahead", 1)
    assert found == {"layers": 0, "dispatcher": "MoEAlltoAllTokenDispatcher"}


@on_ranks(1)
@on_megatron
def test_a_layer_goes_with_its_model_and_without_a_garbage_collection():
    """A cycle would keep the process groups of a model that failed."""
    layer = build_layer(Runtime(MACSConfig(min_tokens=0)), layer_config("alltoall", 4, 2))
    with macs.modality(torch.zeros(1, 80, dtype=torch.bool)):
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
