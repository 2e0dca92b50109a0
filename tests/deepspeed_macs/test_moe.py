"""DeepSpeed's own MoE layer with MACS, over 1, 2 and 4 gloo processes."""

import pytest

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from support.workers import RankFailed

JOBS = "support.deepspeed_jobs"


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_with_nothing_over_capacity_the_output_is_stock_bit_for_bit(pool, world, k):
    for same in pool.run(f"{JOBS}:gate_unbounded_is_stock", world, 8, k):
        assert same == dict.fromkeys(same, True)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("policy", ["vanilla", "token-drop", "expanded-drop", "rank-balanced", "macs"])
def test_the_layer_computes_its_plan_and_sends_no_empty_slot(pool, policy, k):
    found = pool.run(f"{JOBS}:gate_planned_output", 2, policy, {"capacity_factor": 0.8}, 8, k)
    rows = max(one["fullest"] for one in found)  # C, on every rank
    for one in found:
        assert one["error"] < 1e-5
        assert one["sent"] == [8 * rows] * 2  # there and back
        assert one["computed"] == [2 * 4 * rows]
        changed = one["statistics"]["dropped"] + one["statistics"]["rerouted"]
        assert (changed == 0) == (policy == "vanilla")


def test_fewer_rows_are_sent_and_computed_than_by_vanilla(pool):
    def rows(policy):
        return pool.run(f"{JOBS}:gate_planned_output", 2, policy, {"capacity_factor": 0.8}, 8, 2)[0]

    assert rows("macs")["sent"][0] < rows("vanilla")["sent"][0]
    assert rows("macs")["computed"][0] < rows("vanilla")["computed"][0]


@pytest.mark.parametrize("lengths", [[9, 0], [0, 9], [1, 30], [30, 0, 7, 2], [0, 0, 0, 5]])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_ranks_agree_on_c_with_uneven_tokens_or_none(pool, lengths, k):
    # deepspeedai/DeepSpeed#6809: ranks that drop by a capacity of their own hang in the all-to-all.
    block = {"capacity_factor": 0.5}
    found = pool.run(f"{JOBS}:gate_uneven_tokens", len(lengths), lengths, block, {}, k, timeout=60)
    for (shape, finite), length in zip(found, lengths, strict=True):
        assert shape == (1, length, 16) and finite


@pytest.mark.parametrize("lengths", [[9, 0], [30, 0, 7, 2]])
def test_steps_too_small_to_plan_agree_on_c_too(pool, lengths):
    found = pool.run(
        f"{JOBS}:gate_uneven_tokens", len(lengths), lengths, {"min_tokens": 8}, {}, 2, timeout=60
    )
    assert all(finite for _, finite in found)


def test_no_tokens_anywhere(pool):
    for shape, finite in pool.run(f"{JOBS}:gate_uneven_tokens", 2, [0, 0], {}, {}, 2, timeout=60):
        assert shape == (1, 0, 16) and finite


def test_noise_only_where_it_is_asked_for(pool):
    assert pool.run(f"{JOBS}:gate_is_deterministic", 1, {}) == [True]
    assert pool.run(f"{JOBS}:gate_is_deterministic", 1, {"second_expert_sampling": True}) == [False]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_tensor_parallel_ranks_share_the_rows(pool, world, k):
    for found in pool.run(f"{JOBS}:gate_under_tensor_parallelism", world, k, {}):
        assert found["error"] < 1e-5 and found["dropped"] > 0
        # C is a multiple of the tensor-parallel size; each rank computes its part of it.
        (rows,) = found["rows"]
        assert 0 <= rows * world - found["fullest"] < world


def test_tensor_parallel_ranks_with_the_same_tokens_must_plan_alike(pool):
    with pytest.raises(RankFailed, match="policy expanded-drop: the expert-parallel group holds"):
        pool.run(f"{JOBS}:gate_under_tensor_parallelism", 2, 2, {"policy": "expanded-drop"})
