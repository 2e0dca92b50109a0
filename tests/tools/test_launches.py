"""How many kernels a plan launches: counted, so that no commit adds one unseen."""

import pytest
import torch

from macs.planner import STEPS
from macs.steps.kernels.dispatch import has_triton
from macs_tools.common import launches
from macs_tools.common.launches import ADAPTER, AROUND, CASES, MASK, OTHER, PLANS, RECORD

pytestmark = pytest.mark.skipif(
    not has_triton() or not torch.backends.cuda.is_built(),
    reason="Triton is not installed, or this torch has no CUDA to make fake tensors of",
)
SHAPE = 8192, 2048, 128, 8, 8


@pytest.mark.parametrize("title", CASES)
def test_a_plan_launches_as_many_as_it_says(title):
    policy, settings = CASES[title]
    found = launches.count(policy, settings, SHAPE)
    plan = sum(found.by_step[step] for step in (*STEPS, OTHER))
    assert plan == PLANS[title], found.by_operator
    around = {step: found.by_step[step] for step in (ADAPTER, RECORD, MASK)}
    assert around == {ADAPTER: 5, RECORD: 1, MASK: 4} and AROUND == 6, found.by_operator


def test_without_records_statistics_cost_nothing():
    found = launches.count("macs", {}, SHAPE, statistics=False)
    assert sum(found.by_step[step] for step in (*STEPS, OTHER)) == PLANS["defaults"]
    assert found.by_step[RECORD] == 0


def test_counters_cost_no_launch_of_a_layer():
    found = launches.count("macs", {}, SHAPE, counted=True)
    assert found.by_step[RECORD] == 1


@pytest.mark.parametrize(("target", "more"), [(1.05, 1), (0.9, 0)])
def test_sharing_a_bound_costs_one_launch_and_an_all_reduce(target, more):
    found = launches.count("macs", {"target_load": target}, SHAPE, group=True)
    assert sum(found.by_step[step] for step in (*STEPS, OTHER)) == PLANS["defaults"] + more


def test_the_command_shows_them(capsys):
    launches.main(["--shape", "512", "256", "16", "2", "2", "--operators"])
    shown = capsys.readouterr().out
    assert "kernels launched by a plan" in shown and "triton _admit" in shown
