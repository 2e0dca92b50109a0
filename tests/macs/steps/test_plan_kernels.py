"""Whole plans by kernels against those by plain torch; every kernel compiles."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from support.cases import build_policy, configs, policies, routings
from support.kernels import (
    DEVICE,
    both,
    generator,
    kernel_test,
)

from macs import POLICIES, MACSConfig, Modality, Planner, Tokens, Topology
from macs.steps.kernels.dispatch import has_triton, kernels, kernels_enabled
from macs.steps.weighting import semantic_weights


def on_device(case):
    """A drawn routing's inputs of ``plan``, where the kernels are."""
    tokens = Tokens(**{name: one.to(DEVICE) for name, one in vars(case.tokens).items()})
    return *(one.to(DEVICE) for one in (case.hidden, case.experts, case.weights, case.scores)), tokens


@kernel_test
@given(routings(config=configs(), policy=policies()))
def test_a_whole_plan_is_the_same(case):
    """But for the roundings of the weights, which are given to both alike."""
    planner = Planner(
        case.config,
        case.topology,
        case.top_k,
        case.policy,
        modality_bias=case.bias,
        similarity=case.similarity,
    )
    inputs = on_device(case)
    with kernels("torch"), pytest.MonkeyPatch.context() as patch:
        counts = planner._counts(inputs[0], True)
        weights = semantic_weights(inputs[0], inputs[4], planner._weighting, counts, True)
        patch.setattr("macs.planner.semantic_weights", lambda *given: weights)
        found, expected, *_ = both(planner.plan, *inputs)
    assert torch.equal(found.experts, expected.experts)
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(found.rerouted, expected.rerouted)
    assert torch.equal(found.statistics.record, expected.statistics.record)


@kernel_test
@pytest.mark.parametrize(("experts", "k"), [(2, 1), (96, 16), (512, 8)])
def test_plans_of_many_experts_are_the_same(experts, k):
    count = 41
    random = generator(experts, k)
    scores = (torch.randn(count, experts, generator=random) - torch.arange(experts) / experts * 4).softmax(1)
    weights, chosen = scores.topk(k, 1)
    tokens = Modality.of((torch.rand(1, count, generator=random) < 0.7).to(DEVICE)).tokens()
    hidden = torch.randn(count, 24, generator=random)
    inputs = [one.to(DEVICE) for one in (hidden, chosen, weights, scores)]
    one_round = replace(POLICIES["paper"], reroute_rounds=1)  # of 512 pools, which take seconds to interpret
    for policy, factor in (("macs", 0.5), (one_round if experts == 512 else "paper", 1.0)):
        config = MACSConfig(capacity_factor=factor, min_tokens=0)
        planner = Planner(config, Topology(experts, 2, sources=(0,)), k, policy)
        found, expected, *_ = both(planner.plan, *inputs, tokens)
        assert torch.equal(found.experts, expected.experts) and torch.equal(found.weights, expected.weights)
        assert int((found.experts != inputs[1]).sum()) > 0


@kernel_test
@pytest.mark.parametrize("policy", ["expanded-drop", "rank-balanced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [0, 33])
def test_other_policies_and_scores_that_are_not_numbers(policy, dtype, count):
    random = generator(count)
    scores = (torch.randn(count, 12, generator=random) - torch.arange(12) / 3).softmax(1).to(dtype)
    weights, chosen = scores.topk(3, 1)
    if count:
        scores[3, 9], scores[5, 0] = float("nan"), float("nan")
    tokens = Modality.of(torch.zeros(1, count, dtype=torch.bool, device=DEVICE)).tokens()
    inputs = [one.to(DEVICE) for one in (torch.randn(count, 8, generator=random), chosen, weights, scores)]
    config = MACSConfig(capacity_factor=0.7, min_tokens=0)
    planner = build_policy(policy, config, Topology(12, 3, sources=(1,)), 3)
    found, expected, *_ = both(planner.plan, *inputs, tokens)
    assert torch.equal(found.experts, expected.experts) and torch.equal(found.rerouted, expected.rerouted)
    # The interpreter cuts off what a GPU rounds to bfloat16.
    near = 2**-6 if dtype is torch.bfloat16 else 0
    torch.testing.assert_close(found.weights, expected.weights, rtol=near, atol=0, equal_nan=True)
    assert found.experts.shape == (count, planner.width)
    assert not count or int((found.experts[:, :3] != inputs[1]).sum()) > 0
    # The only open expert's score is no number: the others are not lost with it.
    assert not count or policy != "rank-balanced" or bool(found.rerouted.any())


def test_which_runs():
    assert not kernels_enabled(torch.device("cpu")) and kernels_enabled(torch.device("cuda")) == has_triton()
    with kernels("torch"):
        assert not kernels_enabled(torch.device("cuda"))
    with pytest.raises(ValueError, match="found 'cuda', expected 'auto'"), kernels("cuda"):
        pass


@pytest.mark.kernels
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_every_kernel_compiles_for_a_gpu(program):
    script = Path(__file__).parents[2] / "support" / "compile_kernels.py"
    run = program(script, TRITON_INTERPRET="0")
    folder = Path(__file__).parents[3] / "macs" / "steps" / "kernels"
    launched = {
        word.split("[")[0]
        for path in folder.glob("*.py")
        for word in path.read_text().split()
        if word.startswith("_") and "[" in word
    }
    compiled = {line.split()[0]: line.split() for line in run.stdout.splitlines()}
    assert set(compiled) >= launched and len(launched) > 10
    # None spills: what a division or a logarithm calls needs a few bytes.
    assert all(int(line[5]) <= 32 for line in compiled.values()), run.stdout
