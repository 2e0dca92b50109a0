"""The cost model of an MoE layer."""

from dataclasses import replace

import numpy as np
import pytest

from macs.config import MIN_TOKENS
from macs_tools.common.cost_model import CostModel, break_even, captured, on_network, stated_h100
from macs_tools.common.workloads import SHAPES, contenders

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
    assert on_network(MODEL, None, 1.0, None).exchange_ms(sent) == pytest.approx(0.5 + 10)
    assert on_network(MODEL, None, None, 4).exchange_ms(sent) == pytest.approx(0.5 + 15)
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


def test_launches_do_not_grow_with_the_tokens():
    stated = stated_h100(SHAPE)
    assert set(stated.launches) <= {*contenders(1.05), "*"}
    fixed = replace(stated, planner_ms={"*": 0.0})
    for title, launches in fixed.launches.items():
        assert fixed.planning_ms(title, 64) == fixed.planning_ms(title, 4096) == launches * fixed.launch_ms
        assert captured(fixed).planning_ms(title, 64) < fixed.planning_ms(title, 64)
    assert fixed.planning_ms("macs fast", 64) == fixed.planning_ms("*", 64)
    assert captured(MODEL) == MODEL


def test_the_least_step_on_a_gpu_is_where_a_plan_pays():
    shape = SHAPES["qwen3-vl-30b-a3b"]
    found = break_even(shape, 8, 1.2)
    assert found is not None and MIN_TOKENS["gpu"] / 2 < found <= MIN_TOKENS["gpu"]
    assert break_even(shape, 8, 2.0) < found < break_even(shape, 8, 1.1)
    assert break_even(shape, 8, 1.2, replayed=True) < found
    assert break_even(shape, 8, 1.04) is None  # nothing to win
