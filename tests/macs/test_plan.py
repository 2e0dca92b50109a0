"""Whole plans: against the slow reference, and every invariant of the design as a property."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import reference
from support.cases import build_policy, configs, policies, routings

from macs import TEXT, MACSConfig, Planner, Tokens, Topology
from macs.steps.capacity import pool_capacity
from macs.steps.contracts import MASS_UNIT, UNIT, Routing, to_fixed
from macs.steps.demand import measure_demand
from macs.steps.weighting import semantic_weights


def planner_of(case, **changes):
    config, policy = case.config.updated(**changes), case.policy
    return Planner(
        config, case.topology, case.top_k, policy, modality_bias=case.bias, similarity=case.similarity
    )


def plan_of(case, sum_over_group=None, **changes):
    return planner_of(case, **changes).plan(
        case.hidden, case.experts, case.weights, case.scores, case.tokens, sum_over_group=sum_over_group
    )


def weights_of(case):
    planner = planner_of(case)
    counts = planner._counts(case.hidden, False)
    return semantic_weights(case.hidden, case.tokens, planner._weighting, counts, False).weight


def limits(case, weight):
    """Capacities of pools and rows of ranks, by source, and who plans: from checked parts."""
    tokens, topology, config = case.tokens, case.topology, case.config
    experts, ranks = topology.num_experts, topology.num_ranks
    planner = planner_of(case)
    counts, constants = planner._counts(case.hidden, False), planner.constants(torch.device("cpu"))
    routing = Routing(case.experts, case.weights, case.scores, case.top_k)
    measure_demand(routing, tokens, weight, planner._admission, counts)
    pool = list(range(experts)) if config.level == "expert" else list(topology.expert_rank)
    rows = None
    if config.target_load is not None:
        numbers = counts.tokens.tolist()
        rows = [
            [reference.row_limit(config.target_load, count * case.top_k, ranks)] * ranks for count in numbers
        ]
        if config.target_load >= 1 and len(rows) > 1:
            home = torch.tensor(topology.expert_rank)
            asked = counts.rows.new_zeros(len(rows), ranks).index_add(1, home, counts.rows).tolist()
            chosen = [s for s, count in enumerate(numbers) if count >= config.least_tokens("cpu")]
            several = [[one[s] for s in chosen] for one in (asked, numbers)]
            shared = reference.shared_limits(config.target_load, *several, case.top_k, ranks)
            for s, row in zip(chosen, shared, strict=True):
                rows[s] = row
    bound = None if rows is None else torch.tensor(rows)
    pools = pool_capacity(counts, constants, planner._capacity, case.top_k, bound).tolist()
    if rows is not None and planner._capacity.rows_only:
        pools, rows = [[count * UNIT for count in row] for row in rows], None
    active = [t >= config.least_tokens("cpu") for t in counts.tokens.tolist()]
    return pools, rows, active, pool


@given(routings(config=configs(), policy=policies()))
def test_plan_is_the_reference_plan(case):
    config, tokens = case.config, case.tokens
    weight = weights_of(case)
    cost = weight if case.policy.cost == "weight" else torch.full_like(weight, UNIT)
    room, rows, active, pool = limits(case, weight)
    plan = plan_of(case)
    mass = to_fixed(case.weights, MASS_UNIT).tolist()
    for s in range(len(case.topology.sources)):
        mine = [t for t in tokens.position.argsort().tolist() if tokens.source[t] == s and tokens.valid[t]]
        expected = reference.Case(
            experts=[case.experts[t].tolist() for t in mine],
            scores=[case.scores[t].tolist() for t in mine],
            cost=[int(cost[t]) for t in mine],
            weight=[int(weight[t]) for t in mine],
            room=room[s],
            remaining_rows=None if rows is None else rows[s],
            pool=pool,
            rank=list(case.topology.expert_rank),
            similarity=case.similarity.tolist(),
            rule=case.policy.priority,
            exempt=[bool(tokens.exempt[t]) for t in mine],
        )
        if active[s]:
            expected.admit()
            if config.reroute != "none":
                expected.reroute(case.policy.reroute_rounds, config.reroute)
            if config.max_drop is not None:
                masses = {(n, i): mass[t][i] for n, t in enumerate(mine) for i in range(case.top_k)}
                expected.limit_drops(masses, config.max_drop)
        for n, t in enumerate(mine):
            for i in range(case.top_k):
                want = expected.placed.get((n, i), -1) if active[s] else int(case.experts[t, i])
                assert plan.experts[t, i] == want
                assert bool(plan.rerouted[t, i]) == ((n, i) in expected.rerouted)
                check_weight(case, plan, t, i, config)


def check_weight(case, plan, t, i, config):
    """Kept weights pass through; rerouted ones follow the score; dropped ones are 0."""
    total, score = case.weights[t].sum(), case.scores[t][case.experts[t]].sum()
    raw = []
    for slot in range(case.top_k):
        expert = int(plan.experts[t, slot])
        if expert < 0:
            raw.append(0.0)
        elif plan.rerouted[t, slot]:
            share = float(case.scores[t, expert] / score) if score > 0 else 1.0
            raw.append(min(1.0, share) * float(total))
        else:
            raw.append(float(case.weights[t, slot]))
    if plan.rerouted[t, i]:
        assert float(plan.weights[t, i]) == pytest.approx(raw[i], rel=1e-5)
    else:
        assert float(plan.weights[t, i]) == raw[i]


def loads(case, plan, source, cost, of):
    """Cost by pool of one source's valid, not exempt and exempt, assignments."""
    found = Counter()
    for t in range(len(cost)):
        if case.tokens.source[t] == source and case.tokens.valid[t]:
            for expert in plan.experts[t].tolist():
                if expert >= 0:
                    found[of[expert]] += int(cost[t])
    return found


@given(routings(config=configs(max_drop=None, min_tokens=0), policy=policies(), exempt=False))
def test_nothing_is_over_its_capacity(case):
    weight = weights_of(case)
    cost = weight if case.policy.cost == "weight" else torch.full_like(weight, UNIT)
    room, rows, _, pool = limits(case, weight)
    plan = plan_of(case)
    for s in range(len(case.topology.sources)):
        for p, load in loads(case, plan, s, cost, pool).items():
            assert load <= room[s][p]
        if rows is not None:
            for r, count in loads(case, plan, s, [1] * len(cost), case.topology.expert_rank).items():
                assert count <= rows[s][r]
    assert int(plan.statistics.unmet) == 0


@given(routings(config=configs(), policy=policies()))
def test_every_assignment_is_kept_rerouted_or_dropped_once(case):
    plan = plan_of(case)
    valid = case.tokens.valid[:, None]
    kept = (plan.experts == case.experts) & valid
    rerouted, dropped = plan.rerouted & valid, (plan.experts < 0) & valid
    assert bool(((kept.int() + rerouted.int() + dropped.int()) == valid.int()).all())
    found = plan.statistics
    assert (int(found.kept), int(found.rerouted), int(found.dropped)) == (
        int(kept.sum()),
        int(rerouted.sum()),
        int(dropped.sum()),
    )
    assert int(found.load_before.sum()) == int(valid.sum()) * case.top_k
    assert int(found.load_after.sum()) == int(kept.sum() + rerouted.sum())
    total = float(found.kept_mass + found.rerouted_mass + found.dropped_mass)
    assert total == pytest.approx(float(case.weights[case.tokens.valid].sum()), abs=1e-6)


@given(routings(config=configs(), policy=policies()))
def test_no_token_holds_an_expert_twice(case):
    for row in plan_of(case).experts.tolist():
        held = [expert for expert in row if expert >= 0]
        assert len(set(held)) == len(held)


@given(routings(config=configs(capacity_factor=1e6, target_load=None, level="expert"), policy=policies()))
def test_with_nothing_over_capacity_the_plan_is_the_input(case):
    plan = plan_of(case)
    assert torch.equal(plan.experts, case.experts)
    assert torch.equal(plan.weights, case.weights)
    assert not bool(plan.rerouted.any())


@given(routings(config=configs(), policy=policies()))
def test_looking_at_all_tokens_changes_nothing(case):
    """As on a GPU, where no shape may follow from values."""
    first = plan_of(case)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("rerouting", "weighting"):
            patch.setattr(f"macs.steps.{module}.indices_of", lambda chosen: torch.arange(len(chosen)))
        second = plan_of(case)
    assert torch.equal(first.experts, second.experts) and torch.equal(first.weights, second.weights)
    assert torch.equal(first.statistics.record, second.statistics.record)


@given(routings(config=configs(), policy=policies(), distinct=True), st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_the_plan(case, random):
    # Distinct priorities: by score, and no two tokens' scores are equal.
    case = replace(case, policy=replace(case.policy, priority="score"))
    order = list(range(len(case.hidden)))
    random.shuffle(order)
    order = torch.tensor(order)
    tokens = Tokens(**{name: value[order] for name, value in vars(case.tokens).items()})
    tokens = replace(tokens, position=torch.arange(len(order)))
    permuted = replace(
        case,
        hidden=case.hidden[order],
        experts=case.experts[order],
        weights=case.weights[order],
        scores=case.scores[order],
        tokens=tokens,
    )
    first, second = plan_of(case), plan_of(permuted)
    assert torch.equal(first.experts[order], second.experts)
    assert torch.equal(first.weights[order], second.weights)


@given(routings(config=configs(), policy=policies()))
def test_columns_may_come_in_any_order(case):
    # A rotation: unlike a reversal it is not its own inverse.
    rotated = replace(case, experts=case.experts.roll(1, 1), weights=case.weights.roll(1, 1))
    first, second = plan_of(case), plan_of(rotated)
    assert torch.equal(first.experts, second.experts.roll(-1, 1))
    assert torch.equal(first.weights, second.weights.roll(-1, 1))


@given(
    routings(
        config=configs(reroute="none", max_drop=None, target_load=None, min_tokens=0),
        policy=policies(modality_strength=0.0),
    ),
    st.sampled_from([(0.3, 0.5), (0.5, 1.0), (1.0, 1.1), (1.0, 3.0)]),
)
def test_a_larger_capacity_factor_never_drops_more(case, factors):
    low, high = (plan_of(case, capacity_factor=factor).experts for factor in factors)
    assert not bool(((high < 0) & (low >= 0)).any())


@given(
    routings(
        ids=(0,),
        exempt=False,
        config=configs(level="expert", reroute="none", max_drop=None, target_load=None, min_tokens=0),
        policy=policies(modality_strength=0.0, floor=0.0, priority="score"),
    )
)
def test_text_alone_gives_count_based_capacity(case):
    plan = plan_of(case)
    dropped = build_policy("token-drop", case.config, case.topology, case.top_k).plan(
        case.hidden, case.experts, case.weights, case.scores, case.tokens
    )
    assert torch.equal(plan.experts, dropped.experts)


def alone(case, s, rank):
    """The tokens of source ``s`` in a process of their own, and which rows they are."""
    rows = (case.tokens.source == s).nonzero()[:, 0]
    tokens = Tokens(**{name: value[rows] for name, value in vars(case.tokens).items()})
    place = tokens.position.argsort().argsort()
    tokens = replace(tokens, source=torch.zeros_like(tokens.source), position=place)
    own = {name: getattr(case, name)[rows] for name in ("hidden", "experts", "weights", "scores")}
    topology = replace(case.topology, sources=(rank,))
    return replace(case, topology=topology, tokens=tokens, **own), rows


@given(routings(config=configs(), policy=policies()))
def test_sources_in_one_process_are_as_many_processes(case):
    """Each source planned alone plans the same, where they add up their rows as a group does."""
    if len(case.topology.sources) == 1:
        return  # by itself a source keeps to its own bound
    whole = plan_of(case)
    each = [alone(case, s, rank) for s, rank in enumerate(case.topology.sources)]
    # Fewer are left alone, padding and all, without a look.
    each = [(one, rows) for one, rows in each if len(rows) >= case.config.least_tokens("cpu")]
    total = []
    for one, _ in each:
        plan_of(one, sum_over_group=lambda rows: total.append(rows.clone()))
    for one, rows in each:
        plan = plan_of(one, sum_over_group=lambda rows: rows.copy_(sum(total)))
        assert torch.equal(plan.experts, whole.experts[rows])
        assert torch.equal(plan.weights, whole.weights[rows])


@given(routings(config=configs(target_load=1.0, min_tokens=0), policy=policies(), exempt=False))
def test_a_group_within_its_bound_loses_nothing(case):
    """Whatever the single sources have; and no group is above its bound."""
    assume(len(case.topology.sources) > 1)
    plan = plan_of(case)
    ranks, valid = case.topology.num_ranks, int(case.tokens.valid.sum())
    home = torch.tensor(case.topology.expert_rank)
    before, after = (
        torch.zeros(ranks, dtype=torch.int64).index_add(0, home, getattr(plan.statistics, name))
        for name in ("load_before", "load_after")
    )
    bound = reference.row_limit(1.0, valid * case.top_k, ranks)
    if int(before.max()) <= bound:
        assert torch.equal(plan.experts, case.experts)
    if case.config.max_drop is None:
        assert int(after.max()) <= bound


@given(routings(config=configs(), policy=policies(), exempt=False))
def test_max_drop_is_kept(case):
    assume(case.config.max_drop is not None)
    plan = plan_of(case)
    mass = to_fixed(case.weights, MASS_UNIT)
    for s in range(len(case.topology.sources)):
        mine = ((case.tokens.source == s) & case.tokens.valid)[:, None]
        dropped = int(torch.where(mine & (plan.experts < 0), mass, 0).sum())
        assert dropped <= float(case.config.max_drop) * int(torch.where(mine, mass, 0).sum())


@given(routings(config=configs(), policy=policies()))
def test_exempt_tokens_and_padding_are_unchanged(case):
    plan = plan_of(case)
    tokens = case.tokens
    spared = tokens.exempt & tokens.valid
    assert torch.equal(plan.experts[spared], case.experts[spared])
    padding = ~tokens.valid
    assert torch.equal(plan.experts[padding], case.experts[padding])
    assert torch.equal(plan.weights[padding], case.weights[padding])


@given(routings(config=configs(spare_text=True)))
def test_spared_text_is_exempt_text(case):
    plan = plan_of(case)
    text = (case.tokens.modality == TEXT) & case.tokens.valid
    assert torch.equal(plan.experts[text], case.experts[text])
    assert torch.equal(plan.weights[text], case.weights[text])
    told = replace(case, config=case.config.updated(spare_text=False), tokens=case.tokens.with_text_exempt())
    assert torch.equal(plan.experts, plan_of(told).experts)
    assert torch.equal(plan.statistics.record, plan_of(told).statistics.record)


def test_an_expert_that_is_not_there_is_an_error():
    planner = Planner(MACSConfig(capacity_factor=1.0, min_tokens=0), Topology(4), 2, "macs")
    scores = torch.full((3, 4), 0.25)
    for experts in (torch.tensor([[0, 4]] * 3), torch.tensor([[0, 2**40]] * 3)):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            planner.plan(torch.randn(3, 8), experts, torch.full((3, 2), 0.5), scores)
