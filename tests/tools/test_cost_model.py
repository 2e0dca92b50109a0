"""The cost model of an MoE layer."""

from dataclasses import replace

import numpy as np
import pytest

from macs.config import MIN_TOKENS
from macs_tools.common.cost_model import CostModel, at_load, break_even, captured
from macs_tools.common.workloads import SHAPES, contenders
from macs_tools.hardware.machine import machine

SHAPE = replace(SHAPES["tiny"], tokens=256)
MODEL = CostModel(
    rows=[0.0, 10.0, 110.0],
    ms=[1.0, 1.0, 11.0],
    fixed_ms=2.0,
    row_ms=0.01,
    latency_ms=0.5,
    inside_gbs=1.0,
    beyond_gbs=0.1,
    node=2,
    row_bytes=1_000_000,
    hidden=64,
    ffn=32,
    tokens=256,
    planner_ms={"macs": 3.0},
)


def test_parts_of_a_layer_are_those_of_the_slowest():
    requested = np.array([[10, 0, 60, 0], [10, 0, 20, 20]])
    found = MODEL.layer(requested, MODEL.planning_ms("macs", 256))
    # Destination 0 computes 20 rows of expert 0; destination 1 has 80 and 20.
    assert found.experts == pytest.approx(8.0 + 2.0)
    # Source 0 sends 60 rows of a megabyte away and 10 come back from source 1: 60 ms out, 60 ms home.
    assert found.exchange == pytest.approx(2 * (0.5 + 60.0))
    assert found.source == pytest.approx(2.0 + 0.01 * (70 + 100) / 2)
    assert found.planner == 3.0 and MODEL.layer(requested).planner == 0.0
    assert MODEL.planning_ms("macs", 512) == 6.0 and MODEL.planning_ms("vanilla", 512) == 0.0
    with pytest.raises(ValueError, match="found no planner_ms of 'token drop' among"):
        MODEL.planning_ms("token drop", 256)
    assert replace(MODEL, planner_ms={"*": 1.0}).planning_ms("token drop", 256) == 1.0
    assert found.total == pytest.approx(found.experts + found.exchange + found.source + 3.0)
    assert MODEL.expert_ms(np.array([0, 5, 60, 210])).tolist() == pytest.approx([0.0, 1.0, 6.0, 21.0])


def test_a_rank_is_faster_while_the_others_are_idle():
    shared = replace(MODEL, alone=0.5)
    rows = np.array([[110.0], [10.0]])
    assert shared.experts_ms(rows) == pytest.approx(0.5 * 11 + 0.5 * 1)
    assert MODEL.experts_ms(rows) == pytest.approx(11)
    assert shared.experts_ms(rows[::-1]) == shared.experts_ms(rows)
    assert shared.experts_ms(rows[:1].repeat(2, 0)) == pytest.approx(11)


def test_what_leaves_a_node_goes_by_the_slower_network():
    sent = np.zeros((4, 4))
    sent[0, 1] = 10
    assert MODEL.exchange_ms(sent) == pytest.approx(0.5 + 10)
    sent[0, 2] = 5
    assert MODEL.exchange_ms(sent) == pytest.approx(0.5 + 50)
    assert replace(MODEL, beyond_gbs=1.0).exchange_ms(sent) == pytest.approx(0.5 + 10)
    assert replace(MODEL, node=4).exchange_ms(sent) == pytest.approx(0.5 + 15)
    assert MODEL.exchange_ms(np.ones((1, 1))) == 0.0


def test_a_cost_model_comes_back_from_its_file(tmp_path):
    MODEL.save(tmp_path / "a")
    assert CostModel.load(tmp_path / "a") == MODEL
    MODEL.check(SHAPE)
    with pytest.raises(ValueError, match="found one of D 64, FFN 32, expected D 1024"):
        MODEL.check(SHAPES["cpu"])
    (tmp_path / "a").write_text('{"rowz": 1}')
    with pytest.raises(ValueError, match=r"cost model .*rowz"):
        CostModel.load(tmp_path / "a")


def test_a_token_is_sent_once_to_a_rank_and_once_to_a_node():
    once = replace(MODEL, once=True, top_k=2, tokens=100)
    even = np.full((2, 2), 100.0)
    # Of 100 tokens with two experts each, three in four have one on the other rank.
    assert once.copies(even, 100) == pytest.approx(np.full((2, 2), 75.0))
    assert once.exchange_ms(even) == pytest.approx(0.5 + 75)
    assert MODEL.exchange_ms(even) == pytest.approx(0.5 + 100)
    assert once.copies(np.array([[200.0]]), 100) == 100
    # Over two nodes of two ranks each rank sends 75 tokens to the other node, and gets 75 from it.
    assert once.exchange_ms(np.full((4, 4), 50.0)) == pytest.approx(0.5 + 750)
    # What a rank sees of the tokens it got takes time, too, wherever their experts are.
    seen = replace(once, seen_ms=0.01)
    requested = np.full((2, 4), 50.0)
    more = seen.layer(requested, tokens=100).experts - once.layer(requested, tokens=100).experts
    assert more == pytest.approx(0.01 * 2 * 150)


def test_a_load_is_that_of_the_first_rank():
    rows = at_load(SHAPE, 4, 1.6, 100).reshape(4, 4, -1).sum((0, 2))
    assert rows.sum() == pytest.approx(400 * SHAPE.top_k) and rows[0] == pytest.approx(1.6 * rows.mean())
    assert rows[1:] == pytest.approx(np.full(3, rows[1]))


def test_launches_do_not_grow_with_the_tokens():
    h100 = machine("h100", "vllm", SHAPE)
    assert set(h100.launches) <= {*contenders(1.05), "*"}
    fixed = replace(h100, planner_ms={"*": 0.0})
    for title, launches in fixed.launches.items():
        assert fixed.planning_ms(title, 64) == fixed.planning_ms(title, 4096) == launches * fixed.launch_ms
        assert captured(fixed).planning_ms(title, 64) < fixed.planning_ms(title, 64)
    assert fixed.planning_ms("macs fast", 64) == fixed.planning_ms("*", 64)
    assert captured(MODEL) == MODEL


def test_the_least_step_on_a_gpu_is_where_a_plan_pays():
    """At a load of 1.5 on an H100, launched one by one."""
    shape = SHAPES["qwen3-vl-30b-a3b"]
    h100 = machine("h100", "trtllm", shape)
    found = break_even(h100, shape, 8, 1.5)
    assert found is not None and MIN_TOKENS["gpu"] / 2 < found <= MIN_TOKENS["gpu"]
    assert break_even(h100, shape, 8, 2.0) < found < break_even(h100, shape, 8, 1.2)
    assert break_even(captured(h100), shape, 8, 1.5) < found
    assert break_even(h100, shape, 8, 1.04) is None  # nothing to win
