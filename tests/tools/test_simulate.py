"""The cost model, the bounds that move weights, and the simulator over them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from macs.config import MIN_TOKENS
from macs_tools.common.cost_model import CostModel, at_home, break_even, captured, on_network, stated_h100
from macs_tools.common.workloads import SHAPES, contenders
from macs_tools.simulate import layers, run
from macs_tools.simulate import placement as moved_experts

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
    asked = np.array([[10, 0, 60, 0], [10, 0, 20, 20]])
    found = MODEL.layer(asked, MODEL.planning_ms("macs", 256))
    # Destination 0 computes 20 rows of expert 0; destination 1 has 80 and 20.
    assert found.experts == pytest.approx(8.0 + 2.0)
    # Source 0 sends 60 rows of a megabyte away and 10 come back from source 1: 60 ms out, 60 ms home.
    assert found.exchange == pytest.approx(2 * (0.5 + 60.0))
    assert found.source == pytest.approx(2.0 + 0.01 * (70 + 100) / 2)
    assert found.planner == 3.0 and MODEL.layer(asked).planner == 0.0
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


@pytest.mark.parametrize("replicas", [1, 3])
def test_replicas_fill_their_places_and_even_the_load(replicas):
    loads = np.random.default_rng(0).pareto(1.5, 32) * 100
    placement = moved_experts.replicated(loads, 4, replicas, 1000, 10)
    assert placement.share.sum(1) == pytest.approx(np.ones(32))
    copies = np.rint(1 / np.where(placement.share > 0, placement.share, np.inf).min(1))
    assert placement.memory == replicas * 1000 and placement.moved == (8 + replicas) * 1000 / 10
    # Copies of one expert may share a rank, and then are one place's worth.
    assert 32 <= (placement.share > 0).sum() <= copies.sum() <= 32 + 4 * replicas
    before = (loads @ at_home(32, 4)).max()
    after = (loads @ placement.share).max()
    assert loads.sum() / 4 <= after < before
    assert copies[loads.argmax()] > 1 == copies[loads.argmin()]


def test_least_loaded_is_even_and_pays_for_the_weights_it_moves():
    loads = np.array([400.0, 100, 50, 50, 0, 0, 100, 100])
    placement = moved_experts.least_loaded(loads, 4, 1000)
    assert placement.share.sum(1) == pytest.approx(np.ones(8))
    assert np.abs(loads @ placement.share - loads.sum() / 4).max() <= 1
    assert placement.moved >= placement.memory >= 1000
    # The first rank gives to two others: what it sends is more than what either of them gets.
    assert placement.moved == 2000 and placement.memory == 1000
    even = moved_experts.least_loaded(np.full(8, 10.0), 4, 1000)
    assert even.moved == 0 and (even.share == at_home(8, 4)).all()


def test_experts_at_home_cost_what_the_layer_costs():
    asked = np.random.default_rng(1).integers(0, 50, (4, 8))
    moved = MODEL.layer(asked, 0.0, at_home(8, 4)[:, ::-1], 7.0)
    assert MODEL.layer(asked, 0.0, at_home(8, 4)) == MODEL.layer(asked)
    assert moved.experts == MODEL.layer(asked).experts and moved.exchange > 7.0
    assert moved_experts.ideal(MODEL, asked).experts <= MODEL.layer(asked).experts


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


def test_policies_lie_between_vanilla_and_the_bound():
    known = contenders(1.05)
    chosen = {title: known[title] for title in ("vanilla", "token drop", "macs", "macs, nothing over")}
    chosen["rerouting"] = replace(known["macs"], config=known["macs"].config.updated(reroute="group"))
    stated = stated_h100(SHAPE)
    model = replace(stated, fixed_ms=0.0, planner_ms={"*": 0.0}, launch_ms=0.0, latency_ms=0.0)
    batch_of = layers.synthetic("image-flood", SHAPE, 4, 0)
    rows = layers.simulate(SHAPE, 4, batch_of, chosen, model, 2, replicas=(1,))
    by_title = {row["policy"]: row for row in rows}
    assert by_title["vanilla"]["ratio"] == 1 and by_title["vanilla"]["won_back"] == 0
    assert by_title["ideal balance"]["won_back"] == 1
    assert by_title["macs, nothing over"]["ms"] == by_title["vanilla"]["ms"]
    assert by_title["macs"]["load"] <= 1.06 < by_title["vanilla"]["load"]
    assert by_title["macs"]["won_back"] > 0 and by_title["macs"]["kept_mass"] < 1
    assert by_title["rerouting"]["dropped_mass"] < by_title["token drop"]["dropped_mass"]
    assert by_title["macs"]["dropped_mass"] > by_title["rerouting"]["dropped_mass"]
    assert by_title["EPLB, 1 replica a rank"]["extra_bytes"] == model.expert_bytes
    assert {"least-loaded EP", "EPLB, 1 replica a rank"} < set(by_title)


def test_the_command_sweeps_sizes_and_shares(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    flags = "--shape tiny --tokens 64 --ranks 2 4 --policies macs --shares 0.1 0.9 --replicas 1".split()
    flags += ["--plots", str(tmp_path / "plots"), "--json", str(tmp_path / "out")]
    run.main(flags)
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"size-image-flood.png", "share.png"}
    told = json.loads((tmp_path / "out").read_text())
    assert {row["ranks"] for row in told["sizes"]["image-flood"]} == {2, 4}
    assert {row["share"] for row in told["shares"]} == {0.1, 0.9}
    assert "won back" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["--shape", "tiny", "--ranks", "3"])
    assert "found 3, expected divisors of the 16 experts" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--policies", "mac"])
    assert "--policies: found 'mac', expected some of vanilla" in capsys.readouterr().err


def test_replicas_are_placed_anew_once_in_an_interval():
    """On traffic that moves on, what was placed for the first steps is of less and less use."""
    chosen = {"vanilla": contenders(1.05)["vanilla"]}
    batch_of = layers.synthetic("W6", SHAPE, 4, 0)
    model = replace(stated_h100(SHAPE), fixed_ms=0.0)
    often, seldom = (
        {row["policy"]: row for row in layers.simulate(SHAPE, 4, batch_of, chosen, model, 12, (1,), interval)}
        for interval in (1, 12)
    )
    title = "EPLB, 1 replica a rank"
    assert often[title]["load"] < seldom[title]["load"]
    assert often[title]["moved_bytes"] == 12 * seldom[title]["moved_bytes"]
