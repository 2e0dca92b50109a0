"""The promise of no host synchronisation."""

import pytest
import torch
from hypothesis import given
from support.cases import build_policy, configs, routings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from macs import IMAGE, MACSConfig, Modality, Topology
from macs.policies import POLICIES
from macs.records.load import LayerRecorder


@pytest.mark.parametrize("name", list(POLICIES))
@given(case=routings(config=configs()))
def test_planning_reads_nothing_on_the_host(name, case):
    """On the meta device there are shapes but no values: reading one, or a shape that depends on
    one, is an error. What passes here has static shapes and no host synchronisation."""
    tokens = type(case.tokens)(**{name: value.to("meta") for name, value in vars(case.tokens).items()})
    arguments = [value.to("meta") for value in (case.hidden, case.experts, case.weights, case.scores)]
    policy = build_policy(name, case.config, case.topology, case.top_k)
    plan = policy.plan(*arguments, tokens)
    assert plan.experts.shape == (len(case.hidden), policy.width)
    routing_map, probs = plan.as_map(case.topology.num_experts)
    assert routing_map.shape == probs.shape == case.scores.shape
    LayerRecorder(case.topology, case.top_k, steps=2).record(plan.statistics)


def test_laying_out_tokens_reads_nothing_on_the_host():
    modality = Modality.of(torch.full((3, 5), IMAGE, dtype=torch.int8, device="meta"))
    assert modality.tokens(True).modality.shape == modality.tokens(sources=3).source.shape == (15,)


class Watch(TorchDispatchMode):
    """Operators that run within, and elements of the largest tensor that one puts out."""

    operators = size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        found = [one.numel() for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        self.size = max([self.size, *found])
        return out


@pytest.mark.parametrize("name", ["macs", "paper", "token-drop"])
def test_no_tensor_has_every_expert_for_every_assignment(name):
    """[T, k, E], of which 4096 tokens of a layer of 512 experts have 16 million."""
    count, experts, top_k = 256, 512, 8
    scores = torch.rand(count, experts)
    weights, chosen = scores.topk(top_k)
    planner = build_policy(name, MACSConfig(min_tokens=0), Topology(experts, 8), top_k)
    with Watch() as watch:
        planner.plan(torch.randn(count, 32), chosen, weights, scores)
    assert watch.size < count * top_k * experts


def test_a_default_plan_is_at_most_250_operators():
    """Which are most of its time on a CPU."""
    scores = torch.rand(256, 16)
    weights, chosen = scores.topk(2)
    tokens = Modality.of(torch.arange(256)[None] % 3 == 0).tokens()
    planner = build_policy("macs", MACSConfig(min_tokens=0), Topology(16, 4), 2)
    inputs = torch.randn(256, 64), chosen, weights, scores, tokens
    planner.plan(*inputs)  # puts the constants there
    with Watch() as watch:
        planner.plan(*inputs)
    assert 100 < watch.operators <= 250
