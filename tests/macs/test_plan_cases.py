"""Plans of cases made by hand, and of the baselines."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from support.cases import build_policy, configs, routings

from macs import POLICIES, MACSConfig, Planner, Topology


def test_text_alone_makes_the_bound_give_way_and_that_is_counted():
    scores = (torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) - torch.arange(8)).softmax(1)
    weights, experts = scores.topk(2)
    for spare in (False, True):
        config = MACSConfig(target_load=1.0, min_tokens=0, spare_text=spare)
        plan = Planner(config, Topology(8, 4), 2).plan(torch.randn(64, 4), experts, weights, scores)
        assert torch.equal(plan.experts, experts) == spare and int(plan.statistics.unmet) == spare


def test_a_bound_on_drops_brings_back_no_expert_the_policy_added():
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).repeat(8, 1)
    experts = torch.tensor([[2, 3]]).repeat(8, 1)
    config = MACSConfig(min_tokens=0, capacity_factor=1.0, max_drop=0.0)
    policy = build_policy("expanded-drop", config, Topology(4, 1), 2)
    plan = policy.plan(torch.randn(8, 4), experts, torch.full((8, 2), 0.5), scores)
    # Experts 2 and 3 take everyone back; 0 and 1, which score higher but nobody chose, stay within
    # their capacity.
    assert plan.statistics.load_after.tolist() == [4, 4, 8, 8]


@pytest.mark.parametrize(("count", "top_k", "ranks"), [(64, 1, 128), (100, 1, 64), (76, 8, 128), (72, 2, 4)])
@pytest.mark.parametrize("level", ["rank", "expert"])
def test_what_is_even_already_loses_nothing(count, top_k, ranks, level):
    experts = torch.arange(count * top_k).view(count, top_k) % ranks
    planner = Planner(MACSConfig(level=level), Topology(ranks, ranks), top_k)
    plan = planner.plan(
        torch.randn(count, 4), experts, torch.ones(count, top_k), torch.rand(count, ranks).softmax(1)
    )
    assert torch.equal(plan.experts, experts) and int(plan.statistics.planned) == 1


def test_the_safe_preset_keeps_its_promise():
    """At most 1 % of combine weight dropped, however skewed: the target gives way, and it is counted."""
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(512, 64, generator=generator) + 4.0 * (torch.arange(64) < 8)).softmax(1)
    weights, experts = scores.topk(8)
    for name, met in (("fast", False), ("safe", True)):
        planner = Planner(MACSConfig.preset(name), Topology(64, 8), 8)
        found = planner.plan(torch.randn(512, 4), experts, weights, scores).statistics
        mass = float(found.kept_mass + found.rerouted_mass + found.dropped_mass)
        assert (float(found.dropped_mass) <= 0.01 * mass) == met
        assert int(found.unmet) == met


def test_rerouting_prefers_score_times_similarity_on_the_same_rank():
    similarity = torch.eye(6)
    similarity[0] = torch.tensor([1.0, 0.9, 0.3, 1.0, 1.0, 1.0])
    scores = torch.tensor([[0.5, 0.1, 0.25, 0.1, 0.04, 0.01]]).repeat(4, 1)
    config = MACSConfig(min_tokens=0, capacity_factor=1.5)
    planner = Planner(config, Topology(6, 2), 1, "paper", similarity=similarity)
    experts = torch.zeros(4, 1, dtype=torch.int64)
    plan = planner.plan(torch.randn(4, 4), experts, torch.ones(4, 1), scores)
    # One stays; expert 1 (0.1 x 0.9) beats 2 (0.25 x 0.3) and takes one; 2 takes one; 3 is elsewhere.
    assert plan.experts[:, 0].tolist() == [0, 1, 2, -1]
    torch.testing.assert_close(plan.weights[:, 0], torch.tensor([1.0, 0.2, 0.5, 0.0]))


@pytest.mark.parametrize("name", ["vanilla", "token-drop", "expanded-drop", "rank-balanced", "macs"])
@pytest.mark.parametrize("count", [0, 1, 65])
def test_policies_take_any_number_of_tokens(name, count):
    policy = build_policy(name, MACSConfig(min_tokens=0), Topology(8, 4), 8)
    experts = torch.arange(8).expand(count, 8).contiguous()
    plan = policy.plan(torch.randn(count, 5), experts, torch.rand(count, 8), torch.rand(count, 8))
    assert plan.experts.shape == plan.weights.shape == (count, policy.width)
    assert plan.experts.dtype == torch.int64 and plan.weights.dtype == torch.float32


@given(routings(config=configs(target_load=None, min_tokens=0), max_tokens=16))
def test_expanded_drop(case):
    """Best by score of each expert among top-k and the token's own rank's experts."""
    policy = build_policy(
        "expanded-drop",
        case.config.updated(max_drop=None),
        case.topology,
        case.top_k,
    )
    plan = policy.plan(case.hidden, case.experts, case.weights, case.scores, case.tokens)
    tokens, ranks = case.tokens, case.topology.expert_rank
    for s, home in enumerate(case.topology.sources):
        mine = [t for t in range(len(case.hidden)) if tokens.source[t] == s and tokens.valid[t]]
        limit = math.ceil(case.config.capacity_factor * (len(mine) * case.top_k) / case.topology.num_experts)
        for j in range(case.topology.num_experts):
            asks = [
                t
                for t in mine
                if j in case.experts[t].tolist()
                or (ranks[j] == home and case.scores[t, j] > 0 and not tokens.exempt[t])
            ]
            # A token's own choices come before its added ones where scores and tokens are equal.
            best = sorted(asks, key=lambda t: (not tokens.exempt[t], -case.scores[t, j], tokens.position[t]))
            kept = set(best[:limit]) | {t for t in asks if tokens.exempt[t]}
            assert kept == {t for t in mine if j in plan.experts[t].tolist()}


def test_rank_balanced_fills_the_ranks_evenly():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(64, 8, generator=generator) + torch.tensor([2.0, 2, 0, 0, 0, 0, 0, 0])
    scores = scores / scores.sum(1, keepdim=True)
    weights, experts = scores.topk(2)
    row = replace(POLICIES["rank-balanced"], reroute_rounds=4)
    policy = Planner(MACSConfig(min_tokens=0, capacity_factor=1.0), Topology(8, 4), 2, row)
    plan = policy.plan(torch.randn(64, 4), experts, weights, scores)
    rows = plan.statistics.load_after.view(4, 2).sum(1)
    assert int(plan.statistics.load_before.view(4, 2).sum(1).max()) > 100
    assert rows.tolist() == [32, 32, 32, 32]
