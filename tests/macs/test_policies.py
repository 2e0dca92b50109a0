"""The registry of policies: what a row says is what adapters and tools see."""

from dataclasses import replace

import pytest
import torch
from support.cases import AnyAdapter

from macs import POLICIES, MACSConfig, Modality, Planner, Runtime, Topology
from macs.policies import policy_of

EXPERTS, TOP_K, TOKENS = 8, 2, 96


def routed():
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(TOKENS, EXPERTS, generator=generator) * 2).softmax(1)
    weights, experts = scores.topk(TOP_K, 1)
    return torch.randn(TOKENS, 4, generator=generator), experts, weights, scores


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_policy_does_what_its_row_declares(name):
    policy = policy_of(name)
    planner = Planner(MACSConfig(target_load=1.0), Topology(EXPERTS, 4), TOP_K, name)
    inputs = routed()
    plan = planner.plan(*inputs)
    added = plan.experts[:, TOP_K:]
    assert (planner.width > TOP_K) == policy.adds_assignments == bool((added >= 0).any())
    changed = not torch.equal(plan.experts[:, :TOP_K], inputs[1])
    assert changed == policy.plans
    # A baseline treats visual tokens as text.
    seen = planner.plan(*inputs, Modality.of(torch.arange(TOKENS)[None] % 2 == 0).tokens())
    assert torch.equal(seen.experts, plan.experts) != policy.reads_modality


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(ValueError, match="unknown policy 'token_drop'; did you mean 'token-drop'"):
        policy_of("token_drop")


def test_a_policy_has_its_own_default_bound():
    given = {name: policy_of(name).configured(MACSConfig()) for name in ("macs", "paper", "padded")}
    assert given["macs"].target_load == 1.05
    assert (given["paper"].capacity_factor, given["padded"].capacity_factor) == (1.0, 1.2)
    for name in given:
        assert policy_of(name).configured(MACSConfig(target_load=1.05)).target_load == 1.05
        assert policy_of(name).configured(MACSConfig(capacity_factor=2.0)).capacity_factor == 2.0


def test_the_paper_is_fixed():
    row, config = POLICIES["paper"], POLICIES["paper"].configured(MACSConfig(level="rank", reroute="none"))
    assert (row.modality_strength, row.sharpness, row.bias_threshold) == (0.5, 1.0, 0.1)
    assert (row.cost, row.priority, row.reroute_rounds, row.similarity, row.floor) == (
        "weight",
        "score",
        2,
        True,
        1.0,
    )
    assert (config.level, config.weighting, config.reroute) == ("expert", "entropy", "rank")


def test_a_new_policy_is_a_row(monkeypatch):
    monkeypatch.setitem(POLICIES, "by-score", replace(POLICIES["macs"], priority="score"))
    runtime = Runtime(MACSConfig(), policy="by-score")
    weight = torch.randn(EXPERTS, 4)
    layer = runtime.add_layer(AnyAdapter(lambda: weight, Topology(EXPERTS, 4), TOP_K))
    assert not torch.equal(layer.planner.plan(*routed()).experts, routed()[1])
