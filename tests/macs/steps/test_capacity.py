"""Loads and capacities against the slow reference in plain Python, and their kernel."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.cases import configs, policies, routings
from support.kernels import DEVICE, both, generator, kernel_test, same

from macs.steps.capacity import (
    effective_visual_ratio,
    group_rows,
    max_capacity_factors,
    measure_capacities,
    pool_capacity,
    row_bound,
)
from macs.steps.contracts import UNIT, AdmissionRule, CapacityRule, Counts, LayerConstants, Routing
from macs.steps.demand import measure_demand


def constants_of(ranks, pool=None, bias=None, min_tokens=0, target=math.inf):
    """Of experts on these ranks, each in its pool."""
    ranks = torch.as_tensor(ranks)
    pool = torch.arange(len(ranks)) if pool is None else torch.as_tensor(pool)
    empty = torch.zeros(0)
    return LayerConstants(
        pool_of_expert=pool,
        rank_of_expert=ranks,
        affinity=empty,
        modality_bias=torch.zeros(len(ranks), dtype=torch.float64) if bias is None else bias,
        target_load=torch.tensor([target], dtype=torch.float64),
        local_experts=empty,
        pools=int(pool.max()) + 1,
        ranks=int(ranks.max()) + 1,
        min_tokens=min_tokens,
    ).to(torch.device(DEVICE))


def counts_of(tokens, weight=0, visual_weight=0, rows=None, cost=None):
    """Of sources with so many tokens; weights in tokens."""
    tokens = torch.as_tensor(tokens)
    rows = torch.zeros(len(tokens), 1, dtype=torch.int64) if rows is None else rows
    none = torch.zeros(0, dtype=torch.int64)
    by_source = torch.stack([tokens, tokens * 0 + weight * UNIT, tokens * 0 + visual_weight * UNIT])
    counts = Counts(by_source, rows, none if cost is None else cost, none, none, none)
    return Counts(**{name: value.to(DEVICE) for name, value in vars(counts).items()})


def rule(gamma=None, rho=0.0, floor=1.0, rows_only=False):
    return CapacityRule(gamma, rows_only, rho, floor)


@given(routings(config=configs(target_load=None), policy=policies()))
def test_loads_ratio_and_capacity(case):
    tokens, config, policy = case.tokens, case.config, case.policy
    weight = torch.where(tokens.visual, round(0.3 * UNIT), UNIT)
    by_weight = policy.cost == "weight"
    cost = weight if by_weight else torch.full_like(weight, UNIT)
    sources, experts = len(case.topology.sources), case.topology.num_experts
    shapes = {"by_source": (3, sources), "rows": (sources, experts)}
    if by_weight:
        shapes["cost"] = sources, experts
    counts = Counts.zeros(shapes, torch.device("cpu"))
    routing = Routing(case.experts, case.weights, case.scores, case.top_k)
    measure_demand(routing, tokens, weight, AdmissionRule(policy.priority, by_weight), counts)
    ratio = effective_visual_ratio(counts)
    ranks = list(case.topology.expert_rank)
    pool = list(range(experts)) if config.level == "expert" else ranks
    bias = torch.tensor(case.bias, dtype=torch.float64)
    form = config.capacity_factor, policy.modality_strength, policy.floor
    capacity = pool_capacity(counts, constants_of(ranks, pool, bias), rule(*form), case.top_k, None)
    for s in range(sources):
        mine = [t for t in range(len(weight)) if tokens.source[t] == s and tokens.valid[t]]
        for j in range(experts):
            asked = [t for t in mine if j in case.experts[t].tolist()]
            assert counts.rows[s, j] == len(asked)
            assert not by_weight or counts.cost[s, j] == sum(int(cost[t]) for t in asked)
        assert counts.tokens[s] == len(mine)
        own = [int(weight[t]) / UNIT for t in mine]
        visual = [bool(tokens.visual[t]) for t in mine]
        assert ratio[s].item() == pytest.approx(reference.visual_ratio(own, visual), abs=1e-12)
        expected = reference.capacities(*form, own, visual, case.top_k, case.bias, pool)
        torch.testing.assert_close(
            capacity[s].double() / UNIT, torch.tensor(expected).double(), atol=1e-3, rtol=1e-5
        )


def test_a_ranks_pool_is_its_even_share():
    """Rounded up once a rank, not once an expert: gamma bounds the rank."""
    ranks = torch.arange(256) // 32
    for factor, rows in ((1.0, 100), (1.05, 105), (1.1, 110), (1.101, 111)):
        capacity = pool_capacity(counts_of([100], 100), constants_of(ranks, ranks), rule(factor), 8, None)
        assert capacity.tolist() == [[rows * UNIT] * 8]


def admitted(factor, pools):
    """Rows a rank admits of its pools (rows, cost, even), as if every row of a pool cost the same."""
    return sum(rows * min(1.0, factor * even / cost) if cost else rows for rows, cost, even in pools)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 50), st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([0.5, 0.9, 1.0, 1.3]),
)
def test_every_rank_has_the_largest_factor_that_meets_the_bound(ranks, target):
    ranks = [[(rows, rows * cost / 4, even) for rows, cost, even in pools] for pools in ranks]
    pools = [pool for rank in ranks for pool in rank]
    rank_of = torch.tensor([r for r, rank in enumerate(ranks) for _ in rank])
    tokens = sum(rows for rows, _, _ in pools)
    counts = counts_of(
        [tokens],
        tokens,
        rows=torch.tensor([[rows for rows, _, _ in pools]]),
        cost=torch.tensor([[round(cost * UNIT) for _, cost, _ in pools]]),
    )
    constants = constants_of(rank_of, target=target)
    bound = row_bound(counts.tokens, constants, 1)
    even = torch.tensor([[even for _, _, even in pools]], dtype=torch.float64)
    found = max_capacity_factors(counts, constants, even, bound)[0].tolist()
    first = 0
    for rank in ranks:
        factor, limit = found[first], int(bound[0, int(rank_of[first])])
        assert found[first : first + len(rank)] == [factor] * len(rank)
        first += len(rank)
        if sum(rows for rows, _, _ in rank) <= limit:
            assert factor == math.inf
        else:
            assert admitted(factor, rank) <= limit + 1e-6
            assert admitted(factor * 1.001 + 1e-6, rank) > limit


@kernel_test
@pytest.mark.parametrize("ranks", [1, 3, 64])
@pytest.mark.parametrize("target", [1.05, 0.7, 1.2])
def test_kernel_of_the_bound_on_rows(ranks, target):
    each = torch.arange(ranks)
    constants = constants_of(each, each, min_tokens=70, target=target)
    counts = counts_of([0, 1, 70, 300, 100_000], 5, rows=torch.zeros(5, ranks, dtype=torch.int64))
    for form in (rule(rows_only=True), rule(1.0)):
        found, expected, *_ = both(measure_capacities, counts, constants, form, 3)
        assert same(found, expected) and found.active.tolist() == [False, False, True, True, True]


@kernel_test
def test_kernel_of_the_shared_bound_where_rounded_bounds_add_up_to_more():
    """Three times floor(60 * 1.15) are 207, floor(180 * 1.15) is 206 in floating point."""
    constants = constants_of(range(4), range(4), target=1.15)
    counts = counts_of([120] * 3, 5, rows=torch.tensor([[90, 80, 40, 30]] * 3))
    group = group_rows(counts, constants, 2)
    found, expected, *_ = both(measure_capacities, counts, constants, rule(rows_only=True), 2, group)
    assert same(found, expected) and (expected.pools // UNIT)[:, :2].tolist() == [[69, 69]] * 3


@kernel_test
@pytest.mark.parametrize(("experts", "ranks"), [(6, 3), (24, 24), (5, 1)])
@pytest.mark.parametrize("target", [1.0, 1.05, 0.7])
@pytest.mark.parametrize("level", ["expert", "rank"])
def test_kernel_of_the_shared_bound(experts, ranks, target, level):
    """Of sources that borrow, lend, do not plan, and have no tokens."""
    random = generator(experts, ranks)
    rank = torch.randperm(experts, generator=random).remainder(ranks)
    pool = rank if level == "rank" else None
    constants = constants_of(rank, pool, min_tokens=70, target=target)
    tokens = torch.tensor([0, 30, 1000, 7000])
    rows = torch.rand(4, experts, generator=random).square() * tokens[:, None] * 6 / experts
    counts = counts_of(tokens, 5, rows=rows.long())
    group, reference, *_ = both(group_rows, counts, constants, 3)
    assert torch.equal(group, reference) and group[3].tolist() == [8000] * ranks
    for more in (0, 400):  # rows that other processes lend
        group = reference + torch.tensor([0, 0, more, more], device=reference.device)[:, None]
        for form in (rule(rows_only=True), rule()) if level == "rank" else (rule(),):
            found, expected, *_ = both(measure_capacities, counts, constants, form, 3, group)
            assert same(found, expected)


@kernel_test
@pytest.mark.parametrize("level", ["expert", "rank"])
@pytest.mark.parametrize("bound", [(0.8, math.inf), (None, 1.05), (None, 0.5)])
@pytest.mark.parametrize(("experts", "ranks"), [(8, 2), (96, 8), (6, 6)])
@pytest.mark.parametrize("by_weight", [True, False])
def test_kernel_of_capacities(level, bound, experts, ranks, by_weight):
    random = generator(experts, ranks)
    tokens = torch.tensor([0, 40, 3000])
    rows = torch.randint(0, 200, (3, experts), generator=random) * (tokens[:, None] > 0)
    bias = torch.randint(-1, 2, (experts,), generator=random).double()
    rank = torch.randperm(experts, generator=random).remainder(ranks)
    pool = rank if level == "rank" else None
    constants = constants_of(rank, pool, bias, min_tokens=1, target=bound[1])
    counts = counts_of(tokens, 1200, 400, rows, rows * (UNIT // 3) if by_weight else None)
    found, expected, *_ = both(measure_capacities, counts, constants, rule(bound[0], 0.5), 4)
    assert same(found, expected)
