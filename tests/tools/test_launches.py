"""How many kernels a plan launches: counted, so that no commit adds one unseen."""

import pytest
import torch

from macs import Modality
from macs.planner import STEPS
from macs.steps.compensation import CompensationTables, Dropped, compensate
from macs.steps.kernels.dispatch import has_triton
from macs_tools.common import launches
from macs_tools.common.launches import ADAPTER, AROUND, MASK, OTHER, PLANS, RECORD

pytestmark = pytest.mark.skipif(
    not has_triton() or not torch.backends.cuda.is_built(),
    reason="Triton is not installed, or this torch has no CUDA to make fake tensors of",
)
SHAPE = 8192, 2048, 128, 8, 8


@pytest.mark.parametrize("title", PLANS)
def test_a_plan_launches_as_many_as_it_says(title):
    expected, policy, settings = PLANS[title]
    found = launches.count(policy, settings, SHAPE)
    plan = sum(found.by_step[step] for step in (*STEPS, OTHER))
    assert plan == expected, found.by_operator
    around = {step: found.by_step[step] for step in (ADAPTER, RECORD, MASK)}
    assert around == {ADAPTER: 5, RECORD: 1, MASK: 4} and AROUND == 6, found.by_operator


@pytest.mark.parametrize(
    ("settings", "options", "more", "record"),
    [
        ({}, {"statistics": False}, 0, 0),  # without records, statistics cost nothing
        ({}, {"counted": True}, 0, 1),  # counters cost no launch of a layer
        ({"target_load": 1.05}, {"group": True}, 1, 1),  # sharing a bound costs one, and an all-reduce
        ({"target_load": 0.9}, {"group": True}, 0, 1),
    ],
)
def test_what_a_plan_launches_more(settings, options, more, record):
    found = launches.count("macs", settings, SHAPE, **options)
    assert sum(found.by_step[step] for step in (*STEPS, OTHER)) == PLANS["defaults"][0] + more
    assert found.by_step[RECORD] == record


@pytest.mark.parametrize("tables", [1, 2])
def test_compensation_costs_three_launches(tables):
    with launches.counting() as found:
        count, size, experts, k, _ = SHAPE
        made = {"dtype": torch.bfloat16, "device": torch.device("cuda", 0)}
        chosen = torch.empty(count, k, dtype=torch.int64, device="cuda")
        tokens = Modality.of(torch.empty(2, count // 2, dtype=torch.bool, device="cuda")).tokens(True)
        dropped = Dropped(
            torch.empty(count, size, **made), chosen, torch.empty(count, k, **made), chosen, tokens
        )
        given = CompensationTables(
            torch.empty(tables, size, 16, **made),
            torch.empty(tables, 16, device="cuda"),
            torch.empty(tables, experts, 17, size, **made),
            torch.empty(2, dtype=torch.int64, device="cuda"),
        )
        output = torch.empty(count, size, **made)
        found.by_operator.clear()
        compensate(output, dropped, given)
    assert sum(found.by_operator.values()) == 3, found.by_operator


def test_the_command_shows_them(capsys):
    launches.main(["--shape", "512", "256", "16", "2", "2"])
    assert "kernels launched by a plan" in capsys.readouterr().out
