"""The tool that sets planners of two checkouts beside each other."""

import sys
from pathlib import Path

import pytest
import torch

from macs import Modality
from macs_tools.bench import compare as planners

ROOT = Path(__file__).parents[2]


def test_a_checkout_beside_itself(capsys):
    before = sys.modules["macs"]
    planners.main(["--against", str(ROOT), "--shape", "256", "16", "8", "2", "2", "--repeats", "2"])
    assert sys.modules["macs"] is before
    shown = capsys.readouterr().out
    assert "T 256 D 16" in shown and "expanded-drop" in shown


def case():
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(400, 8, generator=generator) - torch.arange(8) / 3).softmax(1)
    weights, experts = scores.topk(2, 1)
    mask = torch.rand(1, 400, generator=generator) < 0.6
    tokens = {name: one for name, one in vars(Modality.of(mask).batch_major()).items() if name != "segment"}
    inputs = [torch.randn(400, 16, generator=generator), experts, weights, scores]
    return {"inputs": inputs, "tokens": tokens, "top_k": 2, "bias": None, "similarity": None}


def test_plans_that_differ_are_counted(monkeypatch):
    packages = {"before": planners.macs_of(ROOT), "now": planners.macs_of(ROOT)}
    assert packages["before"] is not packages["now"]
    assert planners.same_plans(packages, [case()]) == {"same": 2 * len(planners.SETTINGS)}
    build = packages["now"].build_policy
    monkeypatch.setattr(
        packages["now"],
        "build_policy",
        lambda name, config, *rest, **named: build("vanilla", config, *rest, **named),
    )
    found = planners.same_plans(packages, [case()])
    assert found["same"] < 2 * len(planners.SETTINGS) and found["not the same: defaults"] == 2


def test_the_features_go_into_the_weights_and_nowhere_else(capsys):
    planners.main(["--way"])
    shown = capsys.readouterr().out
    files = {line.split()[0] for line in shown.splitlines() if line.startswith("  ")}
    assert files == {"planner.py", "checks.py", "steps/kernels/dispatch.py", "steps/weighting.py"}


def test_plans_need_something_to_be_compared_with(capsys):
    with pytest.raises(SystemExit):
        planners.main(["--plans"])
    assert "expected the checkout to compare with" in capsys.readouterr().err
