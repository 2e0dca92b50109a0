"""Policies and balancers on one cost model: times, loads, and the weights that balancers move."""

from dataclasses import replace

import numpy as np
import pytest

from macs_tools.common.cost_model import at_home
from macs_tools.common.workloads import SHAPES, contenders, draw
from macs_tools.hardware.machine import machine
from macs_tools.report import placement as moved_experts
from macs_tools.report.simulation import requested_by, simulate

SHAPE = replace(SHAPES["tiny"], tokens=256)
MODEL = machine("h100", "trtllm", SHAPE)


def image_flood(step, rank):
    return draw("image-flood", SHAPE, step, rank, 4)


@pytest.mark.parametrize("replicas", [1, 3])
def test_replicas_fill_their_places_and_even_the_load(replicas):
    loads = np.random.default_rng(0).pareto(1.5, 32) * 100
    placement = moved_experts.replicated(loads, 4, replicas, 1000)
    assert placement.share.sum(1) == pytest.approx(np.ones(32))
    copies = np.rint(1 / np.where(placement.share > 0, placement.share, np.inf).min(1))
    assert (
        placement.memory == replicas * 1000
        and placement.moved == (8 + replicas) * 1000 / moved_experts.INTERVAL
    )
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
    requested = np.random.default_rng(1).integers(0, 50, (4, 8))
    moved = MODEL.layer(requested, 0.0, at_home(8, 4)[:, ::-1], 7.0)
    assert MODEL.layer(requested, 0.0, at_home(8, 4)) == MODEL.layer(requested)
    assert moved.experts == MODEL.layer(requested).experts and moved.exchange > 7.0
    assert moved_experts.ideal(MODEL, requested, SHAPE.tokens).experts <= MODEL.layer(requested).experts


def test_policies_lie_between_vanilla_and_the_bound():
    known = contenders(1.05)
    chosen = {title: known[title] for title in ("vanilla", "token drop", "macs", "macs, nothing over")}
    chosen["rerouting"] = replace(known["macs"], config=known["macs"].config.updated(reroute="group"))
    model = replace(MODEL, fixed_ms=0.0, planner_ms={"*": 0.0}, launch_ms=0.0, latency_ms=0.0)
    rows = simulate(SHAPE, 4, image_flood, chosen, model)
    by_title = {row["policy"]: row for row in rows}
    assert by_title["vanilla"]["ratio"] == 1 > by_title["ideal balance"]["ratio"]
    assert by_title["macs, nothing over"]["ms"] == by_title["vanilla"]["ms"]
    assert by_title["macs"]["load"] <= 1.06 < by_title["vanilla"]["load"]
    assert by_title["macs"]["ratio"] < 1 and by_title["macs"]["kept_mass"] < 1
    assert by_title["rerouting"]["dropped_mass"] < by_title["token drop"]["dropped_mass"]
    assert by_title["macs"]["dropped_mass"] > by_title["rerouting"]["dropped_mass"]
    assert by_title["EPLB, 1 replica"]["extra_bytes"] == model.expert_bytes
    assert {"least-loaded EP", "EPLB, 1 replica"} < set(by_title)


def test_replicas_are_placed_by_another_step():
    """Where the hot experts move on, EPLB's copies are of the wrong ones."""
    chosen = {"vanilla": contenders(1.05)["vanilla"]}

    def same(step, rank):
        return draw("rotating", SHAPE, 0, rank, 4)

    def rotated(step, rank):
        return draw("rotating", SHAPE, 3 * step, rank, 4)

    loads = []
    for batch_of in (same, rotated):
        rows = simulate(SHAPE, 4, batch_of, chosen, MODEL)
        loads.append({row["policy"]: row["load"] for row in rows}["EPLB, 1 replica"])
    assert loads[0] < loads[1]


def test_planned_ranks_stand_for_the_others():
    chosen = {"vanilla": contenders(1.05)["vanilla"]}
    rows = requested_by(SHAPE, chosen, image_flood, 0, 4, sources=2)["vanilla"].rows
    assert (rows[0] == rows[1]).all() and (rows[2] == rows[3]).all() and not (rows[0] == rows[2]).all()
