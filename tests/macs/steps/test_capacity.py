"""Loads and capacities against the slow reference in plain Python, and their kernel."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.cases import NO_BOUND, configs, routings
from support.kernels import DEVICE, both, generator, kernel_test, same

from macs import MACSConfig
from macs.steps.capacity import (
    bounds_of,
    capacities,
    effective_visual_ratio,
    max_capacity_factors,
    pool_capacity,
    row_bound,
)
from macs.steps.contracts import Choice, Constants, Sums, Terms
from macs.steps.demand import measure
from macs.steps.fixed_point import UNIT


def constants_of(config, ranks, pool=None, bias=None, places=(0,), min_tokens=0):
    """Of experts on these ranks, each in its pool."""
    ranks = torch.as_tensor(ranks)
    pool = torch.arange(len(ranks)) if pool is None else torch.as_tensor(pool)
    empty = torch.zeros(0)
    return Constants(
        pool_of_expert=pool,
        rank_of_expert=ranks,
        affinity=empty,
        modality_bias=torch.zeros(len(ranks), dtype=torch.float64) if bias is None else bias,
        reachable=empty,
        bounds=bounds_of(config),
        places=torch.tensor(places),
        local_experts=empty,
        pools=int(pool.max()) + 1,
        ranks=int(ranks.max()) + 1,
        min_tokens=min_tokens,
    ).to(torch.device(DEVICE))


def sums_of(tokens, weight=0, visual_weight=0, rows=None, cost=None):
    """Of sources with so many tokens; weights in tokens."""
    tokens = torch.as_tensor(tokens)
    if rows is None:
        rows = torch.zeros(len(tokens), 1, dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.int64)
    sums = Sums(
        none,
        none,
        tokens,
        tokens * 0 + weight * UNIT,
        tokens * 0 + visual_weight * UNIT,
        rows,
        none if cost is None else cost,
        none,
    )
    return Sums(**{name: one.to(DEVICE) for name, one in vars(sums).items()})


@given(routings(config=configs(**NO_BOUND)))
def test_loads_ratio_and_capacity(case):
    tokens, config = case.tokens, case.config
    weight = torch.where(tokens.visual, round(0.3 * UNIT), UNIT)
    by_weight = config.cost == "weight"
    cost = weight if by_weight else torch.full_like(weight, UNIT)
    sources, experts = len(case.topology.sources), case.topology.num_experts
    shapes = dict.fromkeys(("tokens", "weight", "visual_weight"), (sources,))
    sums = Sums.zeros(
        {**shapes, "rows": (sources, experts), **({"cost": (sources, experts)} if by_weight else {})},
        torch.device("cpu"),
    )
    choice = Choice(case.experts, case.weights, case.scores, case.top_k)
    measure(choice, tokens, weight, Terms(config.priority, by_weight), sums)
    ratio = effective_visual_ratio(sums)
    ranks = list(case.topology.expert_rank)
    pool = list(range(experts)) if config.level == "expert" else ranks
    bias = torch.tensor(case.bias, dtype=torch.float64)
    capacity = pool_capacity(sums, constants_of(config, ranks, pool, bias), config, case.top_k, None)
    for s in range(sources):
        mine = [t for t in range(len(weight)) if tokens.source[t] == s and tokens.valid[t]]
        for j in range(experts):
            asked = [t for t in mine if j in case.experts[t].tolist()]
            assert sums.rows[s, j] == len(asked)
            assert not by_weight or sums.cost[s, j] == sum(int(cost[t]) for t in asked)
        assert sums.tokens[s] == len(mine)
        own = [int(weight[t]) / UNIT for t in mine]
        visual = [bool(tokens.visual[t]) for t in mine]
        assert ratio[s].item() == pytest.approx(reference.visual_ratio(own, visual), abs=1e-12)
        expected = reference.capacities(config, own, visual, case.top_k, case.bias, pool)
        torch.testing.assert_close(
            capacity[s].double() / UNIT, torch.tensor(expected).double(), atol=1e-3, rtol=1e-5
        )


def test_visual_experts_grow_with_the_visual_ratio():
    config = MACSConfig.preset("paper")
    bias = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    for visual, order in ((900, 1), (100, -1)):
        sums = sums_of([1000], 1000, visual)
        constants = constants_of(config, [0, 1, 2], bias=bias)
        high, middle, low = pool_capacity(sums, constants, config, 1, None)[0].tolist()
        assert (high - middle) * order > 0 > (low - middle) * order
        assert middle == 334 * UNIT


def test_a_ranks_pool_is_its_even_share():
    """Rounded up once a rank, not once an expert: gamma bounds the rank."""
    ranks = torch.arange(256) // 32
    for factor, rows in ((1.0, 100), (1.05, 105), (1.1, 110), (1.101, 111)):
        config = MACSConfig(capacity_factor=factor)
        found = pool_capacity(sums_of([100], 100), constants_of(config, ranks, ranks), config, 8, None)
        assert found.tolist() == [[rows * UNIT] * 8]


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
    sums = sums_of(
        [tokens],
        tokens,
        rows=torch.tensor([[rows for rows, _, _ in pools]]),
        cost=torch.tensor([[round(cost * UNIT) for _, cost, _ in pools]]),
    )
    constants = constants_of(MACSConfig(target_load=target), rank_of)
    bound = row_bound(sums.tokens, constants, 1)
    even = torch.tensor([[even for _, _, even in pools]], dtype=torch.float64)
    found = max_capacity_factors(sums, constants, even, bound)[0].tolist()
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
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_load": 0.7},
        {"max_load_factor": 1.1},
        {"target_load": 1.2, "max_load_factor": 1.0},
        {"capacity_factor": 1.0, "max_load_factor": 0.5},
        {"capacity_factor": 1.0},
    ],
)
def test_kernel_of_the_bound_on_rows(ranks, settings):
    config = MACSConfig(**settings)
    places = (0, 5, 2, 63, 1)
    each = torch.arange(ranks)
    constants = constants_of(config, each, each, places=places, min_tokens=70)
    sums = sums_of([0, 1, 70, 300, 100_000], 5, rows=torch.zeros(5, ranks, dtype=torch.int64))
    found, expected, *_ = both(capacities, sums, constants, config, 3)
    assert same(found, expected) and found.active.tolist() == [False, False, True, True, True]


@kernel_test
@pytest.mark.parametrize("level", ["expert", "rank"])
@pytest.mark.parametrize("bound", [{"capacity_factor": 0.8}, {"target_load": 1.05}, {"target_load": 0.5}])
@pytest.mark.parametrize(("experts", "ranks"), [(8, 2), (96, 8), (6, 6)])
@pytest.mark.parametrize("by_weight", [True, False])
def test_kernel_of_capacities(level, bound, experts, ranks, by_weight):
    random = generator(experts, ranks)
    tokens = torch.tensor([0, 40, 3000])
    rows = torch.randint(0, 200, (3, experts), generator=random) * (tokens[:, None] > 0)
    config = MACSConfig(
        level=level, modality_strength=0.5, cost="weight" if by_weight else "one",
        **(bound if by_weight or level == "expert" else {"capacity_factor": 1.3, "max_load_factor": 1.0}),
    )  # fmt: skip
    bias = torch.randint(-1, 2, (experts,), generator=random).double()
    rank = torch.randperm(experts, generator=random).remainder(ranks)
    pool = rank if level == "rank" else None
    constants = constants_of(config, rank, pool, bias, places=(0, 1, 2), min_tokens=1)
    sums = sums_of(tokens, 1200, 400, rows, rows * (UNIT // 3) if by_weight else None)
    found, expected, *_ = both(capacities, sums, constants, config, 4)
    assert same(found, expected)
