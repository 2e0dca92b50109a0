"""The promise of no host synchronisation."""

import pytest
import torch
from hypothesis import given
from support.cases import build_policy, configs, routings

from macs import IMAGE, Modality
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
