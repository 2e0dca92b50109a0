"""Kernels of the steps beside their reference implementations, one by one and in whole plans."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.kernels import (
    DEVICE,
    both,
    experts_of,
    generator,
    kernel_test,
    same,
    tokens_of,
)

from macs import MACSConfig, Modality, Planner, Topology
from macs.steps import admission, combine, demand, drops, rerouting
from macs.steps.contracts import UNIT, AdmissionRule, Capacities, Counts, Field, Routing, record_size
from macs.steps.kernels.dispatch import kernels
from macs.steps.record import TOTALS, Totals, append
from macs.tokens import ordered

SCORES = [torch.float32, torch.bfloat16, torch.float64]


def chosen(count, experts, k, added=0, dtype=torch.float32, seed=0):
    """A choice with scores of a dtype, of which the last ``added`` columns are a policy's."""
    random = generator(count, experts, k, seed)
    scores = torch.rand(count, experts, generator=random)
    if count > 2:
        scores[0, 0], scores[1, 1], scores[2, 2 % experts] = float("nan"), 2.0, 0.5 + 2.0**-25
    weights = torch.rand(count, k, generator=random) / k
    scores, weights = scores.to(dtype).to(DEVICE), weights.to(dtype).to(DEVICE)
    return Routing(experts_of(count, experts, k, seed), weights, scores, k - added)


def counts_for(sources, experts, by_weight=True):
    shapes = {"by_source": (3, sources), "rows": (sources, experts), "record": (record_size(experts),)}
    if by_weight:
        shapes["cost"] = sources, experts
    return Counts.zeros(shapes, torch.device(DEVICE))


def weight_of(count, seed=0):
    return torch.randint(1, UNIT, (count,), generator=generator(count, seed)).to(DEVICE)


@kernel_test
@pytest.mark.parametrize("rule", ["score", "product"])
@pytest.mark.parametrize("dtype", SCORES)
@pytest.mark.parametrize("added", [0, 2])
@pytest.mark.parametrize(("count", "experts", "k"), [(3, 4, 3), (45, 6, 3), (130, 512, 16), (0, 8, 3)])
@pytest.mark.parametrize("sources", [1, 5])
def test_demand(rule, dtype, added, count, experts, k, sources):
    choice, tokens = chosen(count, experts, k, added, dtype), tokens_of(count, sources)
    by_weight = rule == "product"
    given = (
        choice,
        tokens,
        weight_of(count),
        AdmissionRule(rule, by_weight),
        counts_for(sources, experts, by_weight),
    )
    found, expected, one, other = both(demand.measure_demand, *given)
    assert same(found, expected) and same(one[-1], other[-1])


def case_of(count, ranks=3, per_rank=2, k=3, by_weight=True, sources=1, seed=0, dtype=torch.float32):
    """A demand, and constants of experts on so many ranks, each expert a pool."""
    experts = ranks * per_rank
    policy = Planner(MACSConfig(level="expert"), Topology(experts, ranks, sources=tuple(range(sources))), k)
    constants = policy.constants(torch.device(DEVICE))
    likeness = torch.rand(experts, experts, generator=generator(experts)).to(DEVICE)
    given = chosen(count, experts, k, 0, dtype, seed), tokens_of(count, sources, seed), weight_of(count, seed)
    with kernels("torch"):
        asked = demand.measure_demand(
            *given, AdmissionRule("product", by_weight), counts_for(sources, experts, by_weight)
        )
    return asked, replace(constants, affinity=likeness)


def room_for(asked, constants, share, rows, seed=0):
    """Room for some share of what is asked; rows: whether ranks have a bound of their own."""
    random = generator(seed, "room")
    sources = len(constants.local_experts)
    even = len(asked.admission_key) * asked.admission_key.shape[1] / sources

    def some(pools, unit):
        spread = torch.rand(sources, pools, generator=random) * 2 * share * even / pools - 1
        return (spread * unit).long().to(DEVICE)

    active = torch.ones(sources, dtype=torch.bool, device=DEVICE)
    bound = some(constants.ranks, 1) if rows else None
    return Capacities(some(constants.pools, UNIT), bound, active, rows)


drawn = given(
    count=st.integers(0, 90),
    sources=st.sampled_from([1, 3]),
    share=st.sampled_from([0.0, 0.3, 0.8, 3.0]),
    by_weight=st.booleans(),
    rows=st.booleans(),
    seed=st.integers(0, 999),
)


@kernel_test
@drawn
def test_admission(count, sources, share, by_weight, rows, seed):
    asked, constants = case_of(count, sources=sources, by_weight=by_weight, seed=seed)
    room = room_for(asked, constants, share, rows, seed)
    found, expected, one, other = both(admission.admit, asked, room, constants)
    assert same(found, expected) and same(one, other)


def admitted(asked, constants, room):
    with kernels("torch"):
        return admission.admit(asked, room, constants)


@kernel_test
def test_rerouting_by_a_similarity_of_any_layout_and_no_symmetry():
    scores = (torch.randn(60, 8, generator=generator(1)) - torch.arange(8) / 3).softmax(1)
    weights, experts = scores.topk(2, 1)
    likeness = torch.rand(8, 8, generator=generator(2)).T
    planner = Planner(
        MACSConfig(target_load=1.0, min_tokens=0, reroute="group"), Topology(8, 4), 2, similarity=likeness
    )
    inputs = [one.to(DEVICE) for one in (torch.randn(60, 8), experts, weights, scores)]
    found, expected, *_ = both(planner.plan, *inputs)
    assert torch.equal(found.experts, expected.experts) and bool(found.rerouted.any())


@kernel_test
@drawn
def test_rerouting(count, sources, share, by_weight, rows, seed):
    asked, constants = case_of(count, sources=sources, by_weight=by_weight, seed=seed)
    placed = admitted(asked, constants, room_for(asked, constants, share, rows, seed))
    # More room than was left, so that there is somewhere to go.
    more = replace(placed, remaining=placed.remaining + 5 * UNIT)
    more = more if placed.remaining_rows is None else replace(more, remaining_rows=placed.remaining_rows + 4)
    found, expected, *_ = both(rerouting.reroute, asked, more, constants, 1 + 2 * (seed % 2))
    assert same(found, expected)


@kernel_test
@drawn
def test_the_bound_on_drops(count, sources, share, by_weight, rows, seed):
    asked, constants = case_of(count, sources=sources, by_weight=by_weight, seed=seed)
    placed = admitted(asked, constants, room_for(asked, constants, share, rows, seed))
    for max_drop in (0.0, 0.1, 0.5):
        found, expected, *_ = both(drops.limit_drops, asked, placed, constants, max_drop)
        assert same(found, expected)


@kernel_test
@drawn
def test_record_and_combine_weights(count, sources, share, by_weight, rows, seed):
    asked, constants = case_of(count, sources=sources, by_weight=by_weight, seed=seed)
    room = room_for(asked, constants, share, rows, seed)
    placed = admitted(asked, constants, room)
    if seed % 2:
        with kernels("torch"):
            placed = rerouting.reroute(asked, placed, constants, 1)
    random = generator(seed)
    for recorded in (False, True):
        room = replace(room, active=(torch.rand(sources, generator=random) < 0.5).to(DEVICE))
        finite = (torch.rand(count, generator=random) < 0.9).to(DEVICE) if recorded else None
        counts = counts_for(sources, 6)
        found, expected, one, other = both(combine.combine, asked, placed, room, finite, counts)
        assert same(found.experts, expected.experts) and same(found.rerouted, expected.rerouted)
        assert same(one[-1], other[-1])
        torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=0, equal_nan=True)


@kernel_test
@pytest.mark.parametrize("dtype", SCORES)
@pytest.mark.parametrize(("count", "per_rank"), [(33, 2), (5, 40), (0, 2)])
def test_local_experts(dtype, count, per_rank):
    asked, constants = case_of(count, 3, per_rank, sources=3, dtype=dtype)
    given = asked.routing, asked.tokens, constants
    found, expected, *_ = both(combine.add_local_experts, *given)
    assert same(found.experts, expected.experts)
    # The interpreter cuts off what a GPU rounds to bfloat16.
    near = 2**-6 if dtype is torch.bfloat16 else 0
    torch.testing.assert_close(found.weights, expected.weights, rtol=near, atol=0, equal_nan=True)
    assert not count or int((found.experts[:, 3:] >= 0).sum()) > 0


@kernel_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "experts", "k"), [(33, 6, 3), (5, 512, 8), (0, 4, 2)])
def test_map(count, experts, k, dtype):
    weights = torch.rand(count, k, generator=generator(count)).to(dtype).to(DEVICE)
    plan = combine.Plan(experts_of(count, experts, k), weights, weights > 0, None)
    found, expected, *_ = both(combine.Plan.as_map, plan, experts)
    assert same(found, expected)


def test_the_choice_in_a_map_ascends_and_marks_what_is_missing():
    rows = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    experts, weights = combine.routing_from_map(rows, torch.arange(16.0).view(4, 4), 2)
    assert experts.tolist() == [[0, 2], [3, -1], [-1, -1], [0, 1]]
    assert weights[experts >= 0].tolist() == [0.0, 2.0, 7.0, 12.0, 13.0]


@kernel_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "experts", "k"), [(33, 6, 3), (5, 512, 8), (0, 4, 2), (9, 4, 1)])
def test_choice_in_a_map(count, experts, k, dtype):
    random = generator(count, experts)
    chosen = (torch.rand(count, experts, generator=random) < k / experts).to(DEVICE)
    probs = torch.rand(count, experts, generator=random).to(dtype).to(DEVICE)
    found, expected, *_ = both(combine.routing_from_map, chosen, probs, k)
    assert same(found, expected)


@kernel_test
@pytest.mark.parametrize("sequence_major", [False, True])
@pytest.mark.parametrize("sources", [1, 3])
def test_layout_of_tokens(sequence_major, sources):
    flags = torch.rand(3, 7, 50, generator=generator(7)).to(DEVICE) < 0.5
    whole = Modality.of(flags[0], valid=flags[1], exempt=flags[2])
    for one in (whole, whole.columns(8, 20), Modality.of(flags[0, :0])):
        found, expected, *_ = both(ordered, one, sequence_major, sources)
        assert same(found, expected)


@kernel_test
@pytest.mark.parametrize(("experts", "ranks"), [(6, 2), (6, 6), (512, 1), (512, 64)])
def test_counters_beside_a_ring(experts, ranks):
    """Counts of records, and of their busiest ranks and experts, wherever these live; and a ring alone."""
    width = record_size(experts)
    experts_of_rank = (
        torch.randperm(experts, generator=generator(3)).view(ranks, -1).sort(1).values.to(DEVICE)
    )
    kept = {}
    for choice in ("triton", "torch"):
        ring = torch.zeros(3, width, dtype=torch.int64, device=DEVICE)
        alone = ring.clone(), ring[0, :1].clone()
        kept[choice] = ring, ring[0, :1].clone(), ring.new_zeros(len(TOTALS) + width), experts_of_rank, *alone
    total = torch.zeros(len(TOTALS), dtype=torch.int64)
    for step in range(5):
        record = torch.randint(0, 2**40, (width,), generator=generator(step))
        record[Field.PLANNED] = step % 3
        for choice, one in kept.items():
            with kernels(choice):
                append(record.to(DEVICE), *one[:2], Totals(*one[2:4]))
                append(record.to(DEVICE), *one[4:])
        assert same(*kept.values()) and int(kept["triton"][5]) == step + 1
        before, after = (record[len(Field) + part * experts :][:experts] for part in (1, 2))
        total[0] += 1
        total[1] += step % 3 > 0
        for number, loads in enumerate((before, after)):
            total[2 + number] += max(int(loads[one].sum()) for one in experts_of_rank.cpu())
            total[4 + number] += int(loads.max())
    assert torch.equal(kept["triton"][2][: len(TOTALS)].cpu(), total)
