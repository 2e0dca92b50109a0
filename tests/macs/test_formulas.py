"""Every formula against the slow reference in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.cases import NO_BOUND, configs, routings

from macs import MACSConfig, full_scores, within_groups
from macs.capacity import (
    LoadTable,
    Pools,
    bounds_of,
    effective_visual_ratio,
    measure,
    meeting_factors,
    pool_capacity,
    row_bound,
)
from macs.fixed_point import UNIT
from macs.weighting import (
    constant_weights,
    distinctness,
    entropy_weights,
    feature_entropy,
    normalize_entropy,
    relative_weights,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_entropy(dtype, size):
    generator = torch.Generator().manual_seed(size)
    scale = torch.tensor([[0.0], [0.1], [1.0], [10.0], [100.0]])
    hidden = (torch.randn(5, size, generator=generator) * scale).to(dtype)
    expected = [reference.entropy(row) for row in hidden.double().tolist()]
    found = feature_entropy(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), atol=2e-5, rtol=2e-5)


def test_entropy_heeds_neither_autocast_nor_default_dtype():
    hidden = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    expected = feature_entropy(hidden)
    visual, group = torch.ones(64, dtype=torch.bool), torch.zeros(64, dtype=torch.int64)
    weights = entropy_weights(expected, visual, group, 1, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(feature_entropy(hidden), expected)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(entropy_weights(expected, visual, group, 1, 1.0), weights)
    finally:
        torch.set_default_dtype(torch.float32)


def test_entropy_bounds():
    flat, peaked = torch.zeros(1, 16), torch.zeros(1, 16)
    peaked[0, 3] = 1000.0
    assert feature_entropy(flat).item() == pytest.approx(math.log(16))
    assert feature_entropy(peaked).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entropy_of_what_is_not_finite(bad):
    hidden = torch.randn(3, 8)
    hidden[1, 2] = bad
    assert torch.isnan(feature_entropy(hidden)).tolist() == [False, True, False]


@given(st.data())
def test_normalized_entropy_and_weights(data):
    count = data.draw(st.integers(1, 20))
    groups = data.draw(st.integers(1, 4))
    entropies = data.draw(
        st.lists(st.sampled_from([0.0, 0.5, 1.25, 2.0, 6.9, math.nan]), min_size=count, max_size=count)
    )
    group = data.draw(st.lists(st.integers(0, groups - 1), min_size=count, max_size=count))
    visual = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    sharpness = data.draw(st.sampled_from([-2.0, 0.0, 1.0, 3.0]))
    tensor = torch.tensor(entropies, dtype=torch.float32)
    found = entropy_weights(tensor, torch.tensor(visual), torch.tensor(group), groups, sharpness)
    expected = reference.weights(entropies, visual, group, sharpness)
    assert found.dtype == torch.int64
    assert int(found.min()) >= 1 and int(found.max()) <= UNIT
    torch.testing.assert_close(found.double() / UNIT, torch.tensor(expected).double(), atol=5e-5, rtol=0)


def test_entropy_is_normalized_within_its_group_alone():
    entropy = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])
    group = torch.tensor([0, 0, 1, 1, 2])
    included = torch.tensor([True] * 5)
    found = normalize_entropy(entropy, included, group, 3)
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.0]), atol=1e-4, rtol=0)


def test_no_spread_gives_one_half():
    entropy = torch.full((5,), 3.3) + torch.arange(5) * 1e-6
    weight = entropy_weights(
        entropy, torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.int64), 1, 1.0
    )
    assert weight.tolist() == [UNIT // 2] * 5


def test_salient_tokens_weigh_more():
    hidden = torch.zeros(4, 32)
    hidden[0, 0] = hidden[1, 1] = 20.0  # peaked: low entropy
    weight = entropy_weights(
        feature_entropy(hidden), torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.int64), 1, 1.0
    )
    assert weight[0] > UNIT // 2 > weight[2]


def test_constant_weights():
    visual = torch.tensor([True, False])
    assert constant_weights(visual, 0.25).tolist() == [UNIT // 4, UNIT]
    assert constant_weights(visual, 1e-4).tolist() == [7, UNIT]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sources", [1, 3])
def test_distinctness(dtype, sources):
    generator = torch.Generator().manual_seed(sources)
    hidden = torch.randn(30, 7, generator=generator)
    hidden[4] = 0
    hidden = hidden.to(dtype)
    visual = torch.rand(30, generator=generator) < 0.7
    source = torch.arange(30) % sources
    expected = []
    for t in range(30):
        mine = [reference.unit(hidden[i].tolist()) for i in range(30) if visual[i] and source[i] == source[t]]
        mean = reference.unit([sum(column) / len(mine) for column in zip(*mine, strict=True)])
        own = reference.unit(hidden[t].tolist())
        unlike = 1 - sum(a * b for a, b in zip(own, mean, strict=True))
        expected.append(unlike if visual[t] else 0.0)
    found = distinctness(hidden, visual, source, sources)
    assert found.dtype == torch.float32
    # Directions are quantized to 1/4000, and the result to 1/4096.
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2 / 4096)


@pytest.mark.parametrize("count", [40, 1024, 5000])
def test_permuted_tokens_are_as_distinct(count):
    """Exactly, in either engine's layout and any other order."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(count, 64, generator=generator).bfloat16() * 3
        visual = torch.rand(count, generator=generator) < 0.7
        source = torch.randint(0, 2, (count,), generator=generator)
        found = distinctness(hidden, visual, source, 2)
        for order in (
            torch.randperm(count, generator=generator),
            torch.arange(count).view(-1, 4).T.flatten(),
        ):
            permuted = distinctness(hidden[order], visual[order], source[order], 2)
            assert torch.equal(found[order], permuted)


def test_distinct_tokens_weigh_more_and_nonfinite_ones_nothing():
    hidden = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0], [float("nan"), 0.0], [0.0, 9.0]])
    visual = torch.tensor([True] * 8 + [False])
    source = torch.zeros(9, dtype=torch.int64)
    distinct = distinctness(hidden, visual, source, 1)
    assert torch.isnan(distinct[7]) and bool(torch.isfinite(distinct[:7]).all())
    weight = relative_weights(distinct, visual, source, 1, 1.0, 0.2).tolist()
    assert weight[8] == UNIT and weight[7] == 1
    assert len(set(weight[:6])) == 1 and weight[0] < 0.2 * UNIT < weight[6] <= 0.4 * UNIT
    # Alike all of them: each weighs what the usual one does.
    alike = distinctness(hidden[:6], visual[:6], source[:6], 1)
    assert relative_weights(alike, visual[:6], source[:6], 1, 1.0, 0.2).tolist() == [round(0.2 * UNIT)] * 6


@given(routings(config=configs(**NO_BOUND)))
def test_loads_ratio_and_capacity(case):
    tokens, config = case.tokens, case.config
    weight = constant_weights(tokens.visual, 0.3)
    cost = weight if config.cost == "weight" else torch.full_like(weight, UNIT)
    sources, experts = len(case.topology.sources), case.topology.num_experts
    table = measure(tokens, weight, cost, case.experts, sources, experts)
    ratio = effective_visual_ratio(table)
    ranks = list(case.topology.expert_rank)
    pool = list(range(experts)) if config.level == "expert" else ranks
    bias = torch.tensor(case.bias, dtype=torch.float64)
    pools = Pools(torch.tensor(pool), torch.tensor(ranks), bias, max(pool) + 1, max(ranks) + 1)
    unbounded = torch.zeros(sources, max(ranks) + 1, dtype=torch.int64)
    capacity = pool_capacity(table, config, case.top_k, pools, unbounded)
    for s in range(sources):
        mine = [t for t in range(len(weight)) if tokens.source[t] == s and tokens.valid[t]]
        for j in range(experts):
            asked = [t for t in mine if j in case.experts[t].tolist()]
            assert table.cost[s, j] == sum(int(cost[t]) for t in asked)
            assert table.rows[s, j] == len(asked)
        assert table.tokens[s] == len(mine)
        own = [int(weight[t]) / UNIT for t in mine]
        visual = [bool(tokens.visual[t]) for t in mine]
        assert ratio[s].item() == pytest.approx(reference.visual_ratio(own, visual), abs=1e-12)
        expected = reference.capacities(config, own, visual, case.top_k, case.bias, pool)
        torch.testing.assert_close(
            capacity[s].double() / UNIT, torch.tensor(expected).double(), atol=1e-3, rtol=1e-5
        )


def test_visual_experts_grow_with_the_visual_ratio():
    config = MACSConfig.preset("paper")
    one = torch.tensor([1000])
    bias, each = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), torch.arange(3)
    for visual, order in ((900, 1), (100, -1)):
        table = LoadTable(one, one * UNIT, torch.tensor([visual * UNIT]), one[:, None] * 0, one[:, None] * 0)
        high, middle, low = pool_capacity(table, config, 1, Pools(each, each, bias, 3, 3), each[None])[
            0
        ].tolist()
        assert (high - middle) * order > 0 > (low - middle) * order
        assert middle == 334 * UNIT


def test_a_ranks_pool_is_its_even_share():
    """Rounded up once a rank, not once an expert: gamma bounds the rank."""
    one, none = torch.tensor([100]), torch.zeros(1, 256, dtype=torch.int64)
    table = LoadTable(one, one * UNIT, one * 0, none, none)
    bias, ranks = torch.zeros(256, dtype=torch.float64), torch.arange(256) // 32
    for factor, rows in ((1.0, 100), (1.05, 105), (1.1, 110), (1.101, 111)):
        pools = Pools(ranks, ranks, bias, 8, 8)
        found = pool_capacity(table, MACSConfig(capacity_factor=factor), 8, pools, none)
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
    scalar = torch.tensor([tokens])
    table = LoadTable(
        scalar,
        scalar * UNIT,
        scalar * 0,
        torch.tensor([[round(cost * UNIT) for _, cost, _ in pools]]),
        torch.tensor([[rows for rows, _, _ in pools]]),
    )
    config = MACSConfig(target_straggler=target)
    zero = torch.zeros(1, dtype=torch.int64)
    bound = row_bound(table.tokens, zero, bounds_of(config), 1, len(ranks))
    even = torch.tensor([[even for _, _, even in pools]], dtype=torch.float64)
    each = torch.arange(len(pools))
    found = meeting_factors(table, even, bound, Pools(each, rank_of, each.double(), len(pools), len(ranks)))[
        0
    ].tolist()
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


def test_scores_are_the_unbiased_softmax_or_sigmoid():
    logits = torch.randn(3, 4).bfloat16()
    assert torch.equal(full_scores(logits, "softmax"), torch.softmax(logits.float(), -1))
    assert torch.equal(full_scores(logits, "sigmoid"), torch.sigmoid(logits.float()))


def test_other_score_functions_are_named():
    with pytest.raises(ValueError, match="score function: found 'relu', expected softmax or sigmoid"):
        full_scores(torch.randn(3, 4), "relu")


def test_only_the_groups_a_token_uses_keep_their_scores():
    scores = torch.ones(3, 6)
    found = within_groups(scores, torch.tensor([[0, 1], [1, 5], [2, -1]]), 3)
    assert found.tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]]
    assert within_groups(scores, torch.tensor([[0, 1]] * 3), None) is scores
