"""Megatron's inference-optimised MoE layer: both dispatchers, the router, the fused kernels."""

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from support.workers import RankFailed

from megatron_macs.compat import inference_optimized

if inference_optimized() is None:
    pytest.skip("this Megatron has no inference-optimised MoE layer", allow_module_level=True)

JOBS = "support.megatron_inference_layer"
RANKS = {"one": [30], "two": [24, 24], "four": [12, 12, 12, 12], "two, uneven": [30, 11]}


@pytest.mark.parametrize("dispatcher", ["nccl", "nvls"])
@pytest.mark.parametrize("ranks", RANKS)
def test_with_nothing_over_capacity_the_output_is_stock_bit_for_bit(pool, ranks, dispatcher):
    counts = RANKS[ranks]
    for same in pool.run(f"{JOBS}:unbounded_is_stock", len(counts), dispatcher, counts):
        assert same == dict.fromkeys(same, True)


@pytest.mark.parametrize("dispatcher", ["nccl", "nvls"])
@pytest.mark.parametrize("ranks", RANKS)
def test_the_layer_computes_its_plan(pool, ranks, dispatcher):
    counts = RANKS[ranks]
    settings = {"capacity_factor": 0.5}
    for one in pool.run(f"{JOBS}:planned_output", len(counts), dispatcher, counts, settings):
        assert max(one["errors"]) < 0.02  # bfloat16
        assert min(one["moved"]) > 0 and one["plans"] == 3


def test_padding_of_a_cuda_graph_does_not_affect_the_plan(pool):
    counts = [40, 40]
    found = pool.run(f"{JOBS}:planned_output", 2, "nvls", counts, {"capacity_factor": 0.5}, 12)
    assert all(max(one["errors"]) < 0.02 and min(one["moved"]) > 0 for one in found)


def test_both_dispatchers_of_the_layer_are_ours(pool):
    (found,) = pool.run(f"{JOBS}:names", 1)
    assert found.router == "MACSInferenceTopKRouter"
    assert found.plain == "MACSAlltoAllTokenDispatcher"
    assert found.engine == "MACSNCCLAllGatherDispatcher" and found.known


def test_a_policy_that_adds_assignments_is_refused(pool):
    with pytest.raises(RankFailed, match="transformer_impl = 'inference_optimized' sends 3 assignments"):
        pool.run(f"{JOBS}:refused", 1, "expanded-drop")
