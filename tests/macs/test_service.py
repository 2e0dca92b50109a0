"""Which experts rerouting may go to, and what small sources may give a rank."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import build_policy

from macs import MACSConfig, Planner, Tokens, Topology
from macs.steps.scoring import candidate_scores, enabled_experts

OUT = [-math.inf, -1e4, torch.finfo(torch.float32).min, -1.5]


@pytest.mark.parametrize("bias", OUT)
def test_a_bias_that_no_score_makes_up_for_takes_an_expert_out(bias):
    assert enabled_experts(torch.tensor([0.0, bias, 0.1, bias]), 2).tolist() == [True, False, True, False]
    # Biases may be shifted alike, and an expert that one of the k could be is in service.
    assert enabled_experts(torch.tensor([0.0, bias, 0.1, bias]) - 7, 2).tolist() == [True, False, True, False]
    assert enabled_experts(torch.tensor([0.0, bias, 0.1, bias]), 3).all()


def test_biases_that_scores_may_make_up_for_change_nothing():
    assert enabled_experts(torch.linspace(-0.49, 0.49, 8), 2).all()
    logits, experts = torch.randn(3, 8), torch.tensor([[0, 1]] * 3)
    plain = candidate_scores(logits, experts, "softmax")
    assert torch.equal(candidate_scores(logits, experts, "softmax", torch.zeros(8)), plain)


def test_among_groups_only_what_may_be_chosen_together_counts():
    bias = torch.tensor([0.0, 0.0, -9.0, 0.0, -9.0, -9.0, 0.0, 0.0])
    # Of 4 groups 2 are used. Expert 2 has expert 3 before it, and none of the third group; experts 4 and 5
    # have nobody of their own, and one of the second.
    assert enabled_experts(bias, 2, 4, 2).tolist() == [True, True, True, True, True, True, True, True]
    assert enabled_experts(bias, 1, 4, 2).tolist() == [True, True, False, True, False, False, True, True]
    assert enabled_experts(bias, 2, 4, 3).tolist() == [True, True, False, True, False, False, True, True]


@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([None, 2, 4]))
def test_an_expert_that_is_out_is_never_chosen_and_one_that_is_in_can_be(seed, top_k, groups):
    random = torch.Generator().manual_seed(seed)
    bias = torch.randint(-3, 1, (8,), generator=random).float()
    found = enabled_experts(bias, top_k, groups, groups if groups is None else 2)
    scores = torch.rand(256, 8, generator=random)
    chosen = scores + bias
    if groups is not None:
        best = chosen.view(256, groups, -1).topk(2, -1).values.sum(-1).topk(2, -1).indices
        closed = torch.ones(256, groups, dtype=torch.bool).scatter(1, best, False)
        chosen = chosen.masked_fill(closed.repeat_interleave(8 // groups, 1), -math.inf)
    assert bool(found[chosen.topk(top_k).indices].all())
    if groups is None:
        for expert in found.nonzero()[:, 0].tolist():
            best = torch.zeros(8)
            best[expert] = 1.0  # the most that scores can do for it
            assert (
                expert in (bias + best).topk(top_k).indices.tolist()
                or (bias > bias[expert] + 1).sum() < top_k
            )


@pytest.mark.parametrize("policy", ["macs", "rank-balanced", "expanded-drop"])
def test_no_policy_sends_a_token_to_an_expert_that_is_out(policy):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(256, 8, generator=random) + torch.tensor([2.0, 2, 0, 0, 0, 0, 0, 0])
    bias = torch.tensor([0.0] * 5 + [-1e4] * 3)
    scores = torch.sigmoid(logits)
    experts = (scores + bias).topk(2).indices
    topology = Topology(8, 4, sources=(3,))
    planner = build_policy(policy, MACSConfig(min_tokens=0, target_load=1.0, reroute="group"), topology, 2)
    hidden, weights = torch.randn(256, 4, generator=random), scores.gather(1, experts)
    plan = planner.plan(hidden, experts, weights, scores * enabled_experts(bias, 2))
    before = planner.plan(hidden, experts, weights, scores)
    assert int((before.experts >= 5).sum()) > 0  # what would happen otherwise
    assert int((plan.experts >= 5).sum()) == 0 and int((plan.experts >= 0).sum()) > 0


def planned(ranks, counts, top_k, target):
    """Rows of each rank after planning all sources, with so many tokens each, which crowd a few ranks."""
    source = torch.arange(ranks).repeat_interleave(torch.tensor(counts))
    random = torch.Generator().manual_seed(sum(counts))
    experts = 2 * ranks
    scores = torch.randn(len(source), experts, generator=random) + 2.0 * (
        torch.arange(experts) < experts // 8
    )
    weights, chosen = scores.softmax(1).topk(top_k)
    topology = Topology(experts, ranks, sources=tuple(range(ranks)))
    planner = Planner(MACSConfig(target_load=target, min_tokens=0), topology, top_k)
    tokens = replace(Tokens.all_text(len(source), "cpu"), source=source)
    plan = planner.plan(torch.zeros(len(source), 4), chosen, weights, scores.softmax(1), tokens)
    assert int(plan.statistics.unmet) == 0
    return plan.statistics.load_after.view(ranks, 2).sum(1)


@pytest.mark.parametrize(("tokens", "top_k"), [(70, 2), (100, 4), (300, 2)])
@pytest.mark.parametrize("target", [0.9, 1.0, 1.05])
def test_a_group_of_small_sources_keeps_to_its_target(tokens, top_k, target):
    """However little each of 64 sources may send to a rank by itself."""
    found = planned(64, [tokens] * 64, top_k, target)
    even = tokens * top_k
    assert int(found.max()) <= math.floor(target * even)
    if target >= 1:
        assert int(found.max()) >= math.floor(target * even) - 64  # rounding, one row a source at most


def test_a_group_of_uneven_sources_keeps_to_its_target():
    counts = [7 * number % 97 for number in range(64)]
    found = planned(64, counts, 2, 1.05)
    assert int(found.max()) <= math.floor(1.05 * sum(counts) * 2 / 64)
