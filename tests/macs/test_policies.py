"""The registry of policies: what a row says is what adapters and tools see."""

import pytest
import torch
from support.cases import AnySeam

from macs import POLICIES, MACSConfig, Modality, Planner, Policy, Runtime, Topology, build_policy, policy_of

EXPERTS, TOP_K, TOKENS = 8, 2, 96


def routed():
    scores = (torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)) * 2).softmax(1)
    weights, experts = scores.topk(TOP_K, 1)
    return torch.randn(TOKENS, 4), experts, weights, scores


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_policy_does_what_its_row_says(name):
    policy = policy_of(name)
    planner = build_policy(name, MACSConfig(target_load=1.0), Topology(EXPERTS, 4), TOP_K)
    assert isinstance(planner, policy.planner) and policy.summary
    inputs = routed()
    plan = planner.plan(*inputs)
    added = plan.experts[:, TOP_K:]
    assert (planner.slots > TOP_K) == policy.adds_assignments == bool((added >= 0).any())
    changed = not torch.equal(plan.experts[:, :TOP_K], inputs[1])
    assert changed == policy.plans == planner.plans
    # Which tokens are visual is nothing to a baseline.
    seen = planner.plan(*inputs, Modality.of(torch.arange(TOKENS)[None] % 2 == 0).batch_major())
    assert torch.equal(seen.experts, plan.experts) != policy.reads_modality


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(ValueError, match="unknown policy 'token_drop'; did you mean 'token-drop'"):
        policy_of("token_drop")


def test_a_new_policy_is_a_row(monkeypatch):
    class LastExpert(Planner):
        plans = True

    row = Policy("for this test", {"level": "rank"}, LastExpert, reads_modality=True)
    monkeypatch.setitem(POLICIES, "last", row)
    runtime = Runtime(MACSConfig(), policy="last")
    weight = torch.randn(EXPERTS, 4)
    layer = runtime.add_layer(AnySeam(lambda: weight, Topology(EXPERTS, 4), TOP_K))
    assert isinstance(layer.planner, LastExpert)
    assert not torch.equal(layer.planner.plan(*routed()).experts, routed()[1])
