"""Every Triton kernel beside its plain torch twin; in Triton's interpreter where there is no GPU.

Memory that nobody has written holds NaN, or the largest integer, while a kernel runs.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import configs, routings

from macs import (
    MACSConfig,
    Modality,
    Planner,
    Tokens,
    Topology,
    build_policy,
    capacity,
    plan,
    routing,
    weighting,
)
from macs.ops import fused, has_triton, kernels, runs_on

pytestmark = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = 1 << 16


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    real = torch.empty

    def empty(*shape, **named):
        fresh = real(*shape, **named)
        worst = float("nan") if fresh.is_floating_point() else fresh.dtype is torch.bool
        if not (fresh.is_floating_point() or fresh.dtype is torch.bool):
            worst = torch.iinfo(fresh.dtype).max
        return fresh.fill_(worst)

    monkeypatch.setattr(torch, "empty", empty)


def both(function, *arguments):
    """What the kernel says, and what its twin says."""
    with kernels("triton"):
        found = function(*arguments)
    with kernels("torch"):
        return found, function(*arguments)


def generator(*seed):
    return torch.Generator().manual_seed(hash(seed) % 2**31)


def features(count, size, dtype, seed=0, scale=3.0):
    return (torch.randn(count, size, generator=generator(count, size, seed)) * scale).to(dtype).to(DEVICE)


SIZES = [(5, 7), (1, 128), (37, 129), (3, 1500), (2, 8192), (0, 16)]


@pytest.mark.parametrize(("count", "size"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entropy(count, size, dtype):
    found, expected = both(weighting.feature_entropy, features(count, size, dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


def test_entropy_of_extremes():
    hidden = features(9, 40, torch.float32)
    hidden[0, 3], hidden[1, 39], hidden[2, 0] = float("nan"), float("inf"), -float("inf")
    hidden[3], hidden[4] = 7.0, 3e38
    hidden[5] = -3e38
    hidden[6, 0] = 1e4
    found, expected = both(weighting.feature_entropy, hidden)
    assert found[:3].isnan().all() and expected[:3].isnan().all()
    torch.testing.assert_close(found[3:], expected[3:], rtol=2e-6, atol=2e-6)


def test_features_that_are_not_side_by_side():
    hidden = features(2 * 11, 50, torch.float32)
    for view in (hidden[::2], hidden.T):
        found, expected = both(weighting.feature_entropy, view)
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("count", "size"), SIZES)
@pytest.mark.parametrize("sources", [1, 3])
def test_distinctness(count, size, sources):
    hidden = features(count, size, torch.bfloat16) + 0.5
    if count > 4:
        hidden[1, 2] = float("nan")
        hidden[3] = 0.0
    visual = (torch.rand(count, generator=generator(count)) < 0.6).to(DEVICE)
    source = torch.randint(0, sources, (count,), generator=generator(size)).to(DEVICE)
    found, expected = both(weighting.distinctness, hidden, visual, source, sources)
    assert torch.equal(found.isnan(), expected.isnan()) and int(found.isnan().sum()) == (count > 4)
    # Sums in another order: at most one of its steps apart.
    close = torch.nan_to_num(found - expected).abs() <= 1 / weighting.DISTINCT_UNIT
    assert close.all()


@pytest.mark.parametrize("groups", [1, 4, 300])
@pytest.mark.parametrize("count", [1, 77, 600])
def test_weights(groups, count):
    random = generator(groups, count)
    value = torch.rand(count, generator=random) * 3
    value[torch.rand(count, generator=random) < 0.05] = float("nan")
    visual = torch.rand(count, generator=random) < 0.7
    group = torch.randint(0, groups, (count,), generator=random)
    inputs = [one.to(DEVICE) for one in (value, visual, group)]
    found, expected = both(weighting.relative_weights, *inputs, groups, 1.5, 0.2)
    assert (found - expected).abs().max() <= 1
    flat, plain = both(
        weighting.relative_weights, torch.full_like(inputs[0], 1.25), *inputs[1:], groups, 1.0, 0.5
    )
    assert torch.equal(flat, plain) and set(flat.tolist()) <= {UNIT, UNIT // 2}


def choice(count, experts, k, seed=0, none=0.1):
    """A router's choice int64 [T, k], ascending, some of it -1 at the end of a row."""
    random = generator(count, experts, k, seed)
    picked = torch.rand(count, experts, generator=random).argsort(1)[:, :k].sort(1).values
    gone = torch.rand(count, k, generator=random) < none
    return torch.where(gone, -1, picked).to(DEVICE)


@pytest.mark.parametrize(("count", "experts", "k"), [(1, 2, 1), (45, 6, 3), (130, 512, 16), (0, 8, 2)])
@pytest.mark.parametrize("sources", [1, 5])
def test_loads(count, experts, k, sources):
    random = generator(count, experts)
    chosen = choice(count, experts, k)
    source = torch.randint(0, sources, (count,), generator=random)
    tokens = replace(
        Tokens.all_text(count, DEVICE),
        source=source.to(DEVICE),
        valid=(torch.rand(count, generator=random) < 0.8).to(DEVICE),
        kinds=torch.randint(0, 2, (count,), generator=random).to(torch.int8).to(DEVICE),
    )
    weight, cost = torch.randint(1, UNIT, (2, count), generator=random).to(DEVICE)
    found, expected = both(capacity.measure, tokens, weight, cost, chosen, sources, experts)
    assert all(torch.equal(one, vars(expected)[name]) for name, one in vars(found).items())

    room = torch.randint(-5, 9, (sources, 4), generator=random).to(DEVICE) * UNIT
    of_expert = (torch.arange(experts) % 4).to(DEVICE)
    before = room.clone()
    found, expected = both(routing.less, room, tokens.source, of_expert, chosen, cost)
    assert torch.equal(found, expected) and torch.equal(room, before)


@pytest.mark.parametrize("ranks", [1, 3, 64])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_straggler": 0.7},
        {"max_load_factor": 1.1},
        {"target_straggler": 1.2, "max_load_factor": 1.0},
        {"capacity_factor": 1.0, "max_load_factor": 0.5},
        {"capacity_factor": 1.0},
    ],
)
def test_row_bound(ranks, settings):
    tokens = torch.tensor([0, 1, 70, 300, 100_000], device=DEVICE)
    places = torch.tensor([0, 5, 2, 63, 1], device=DEVICE)
    bounds = capacity.bounds_of(MACSConfig(**settings)).to(DEVICE)
    found, expected = both(capacity.row_bound, tokens, places, bounds, 3, ranks)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("level", ["expert", "rank"])
@pytest.mark.parametrize(
    "bound", [{"capacity_factor": 0.8}, {"target_straggler": 1.05}, {"target_straggler": 0.5}]
)
@pytest.mark.parametrize(("experts", "ranks"), [(8, 2), (96, 8), (6, 6)])
def test_pool_capacity(level, bound, experts, ranks):
    random = generator(experts, ranks)
    sources = 3
    tokens = torch.tensor([0, 40, 3000])
    rows = torch.randint(0, 200, (sources, experts), generator=random) * (tokens[:, None] > 0)
    weight = tokens * (UNIT // 2)
    table = capacity.LoadTable(tokens, weight, weight // 3, rows * (UNIT // 3), rows)
    table = capacity.LoadTable(**{name: one.to(DEVICE) for name, one in vars(table).items()})
    config = MACSConfig(level=level, modality_strength=0.5, cost="weight", **bound)
    bias = torch.randint(-1, 2, (experts,), generator=random).double().to(DEVICE)
    rank = torch.randperm(experts, generator=random).remainder(ranks).to(DEVICE)
    pool = rank if level == "rank" else torch.arange(experts, device=DEVICE)
    limit = capacity.row_bound(
        table.tokens, torch.arange(sources, device=DEVICE), capacity.bounds_of(config).to(DEVICE), 4, ranks
    )
    pools = capacity.Pools(pool, rank, bias, int(pool.max()) + 1, ranks)
    found, expected = both(capacity.pool_capacity, table, config, 4, pools, limit)
    assert torch.equal(found, expected)


@given(
    count=st.integers(1, 90),
    pools=st.sampled_from([1, 3, 40]),
    levels=st.sampled_from([1, 3, 1 << 24]),
    unit=st.booleans(),
    width=st.sampled_from([1, 3]),
    seed=st.integers(0, 999),
)
def test_admission(count, pools, levels, unit, width, seed):
    random = generator(count, pools, levels, seed)
    pool = torch.randint(0, pools + 1, (count,), generator=random)
    priority = torch.randint(0, levels + 1, (count,), generator=random)
    priority[torch.rand(count, generator=random) < 0.1] = routing.EXEMPT_PRIORITY
    place = torch.randperm(count, generator=random)
    cost = torch.full((count,), UNIT) if unit else torch.randint(1, UNIT, (count,), generator=random)
    room = torch.randint(-1, 2 * count // pools + 2, (pools,), generator=random) * UNIT
    order = routing.order_of(priority, place, count)
    rows = count // width
    pool, order = (one[: rows * width].view(rows, width).to(DEVICE) for one in (pool, order))
    queue = routing.Queue(pool, order, cost[:rows].to(DEVICE), count)
    found, expected = both(routing.admit, queue, room.to(DEVICE))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rule", ["score", "product"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("added", [0, 2])
def test_order(rule, dtype, added):
    random = generator(1)
    score = torch.rand(33, 5, generator=random).to(dtype).to(DEVICE)
    score[0, 0], score[1, 1], score[2, 2] = float("nan"), 2.0, 0.5 + 2.0**-25
    weight = torch.randint(1, UNIT, (33,), generator=random).to(DEVICE)
    tokens = replace(
        Tokens.all_text(33, DEVICE),
        exempt=(torch.rand(33, generator=random) < 0.2).to(DEVICE),
        valid=(torch.rand(33, generator=random) < 0.8).to(DEVICE),
        position=torch.randperm(33, generator=random).to(DEVICE),
    )
    found, expected = both(routing.ask, choice(33, 5, 4), score, weight, tokens, rule, 4 - added)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "experts", "k"), [(33, 6, 3), (5, 512, 8), (0, 4, 2)])
def test_map(count, experts, k, dtype):
    chosen = choice(count, experts, k)
    weights = torch.rand(count, k, generator=generator(count)).to(dtype).to(DEVICE)
    found, expected = both(plan.map_of, chosen, weights, experts)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def on_device(case):
    """A drawn routing's inputs of ``plan``, where the kernels are."""
    tokens = Tokens(**{name: one.to(DEVICE) for name, one in vars(case.tokens).items()})
    return *(one.to(DEVICE) for one in (case.hidden, case.experts, case.weights, case.scores)), tokens


@given(routings(config=configs()))
def test_a_whole_plan_is_the_same(case):
    """But for the roundings of the weights, which are given to both alike."""
    planner = Planner(
        case.config, case.topology, case.top_k, modality_bias=case.bias, similarity=case.similarity
    )
    inputs = on_device(case)
    with kernels("torch"):
        weights = planner._weights(inputs[0], inputs[4])
    planner._weights = lambda hidden, tokens: weights
    found, expected = both(planner.plan, *inputs)
    assert torch.equal(found.experts, expected.experts)
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(found.rerouted, expected.rerouted)
    assert torch.equal(found.statistics.record, expected.statistics.record)


@pytest.mark.parametrize(("experts", "k"), [(2, 1), (96, 16), (512, 8)])
def test_plans_of_many_experts_are_the_same(experts, k):
    count = 41
    random = generator(experts, k)
    scores = (torch.randn(count, experts, generator=random) - torch.arange(experts) / experts * 4).softmax(1)
    weights, chosen = scores.topk(k, 1)
    tokens = Tokens.batch_major(Modality.of((torch.rand(1, count, generator=random) < 0.7).to(DEVICE)))
    hidden = torch.randn(count, 24, generator=random)
    inputs = [one.to(DEVICE) for one in (hidden, chosen, weights, scores)]
    for config in (
        MACSConfig(capacity_factor=0.5, min_tokens=0),
        MACSConfig.preset("paper").updated(min_tokens=0),
    ):
        planner = Planner(config, Topology(experts, 2, sources=(0,)), k)
        found, expected = both(planner.plan, *inputs, tokens)
        assert torch.equal(found.experts, expected.experts) and torch.equal(found.weights, expected.weights)
        assert int((found.experts != inputs[1]).sum()) > 0


@pytest.mark.parametrize("policy", ["expanded-drop", "rank-balanced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [0, 33])
def test_other_policies_and_scores_that_are_not_numbers(policy, dtype, count):
    random = generator(count)
    scores = (torch.randn(count, 12, generator=random) - torch.arange(12) / 3).softmax(1).to(dtype)
    weights, chosen = scores.topk(3, 1)
    if count:
        scores[3, 9], scores[5, 0] = float("nan"), float("nan")
    tokens = Tokens.batch_major(Modality.of(torch.zeros(1, count, dtype=torch.bool, device=DEVICE)))
    inputs = [one.to(DEVICE) for one in (torch.randn(count, 8, generator=random), chosen, weights, scores)]
    config = MACSConfig(capacity_factor=0.7, min_tokens=0)
    planner = build_policy(policy, config, Topology(12, 3, sources=(1,)), 3)
    found, expected = both(planner.plan, *inputs, tokens)
    assert torch.equal(found.experts, expected.experts) and torch.equal(found.rerouted, expected.rerouted)
    # The interpreter cuts off what a GPU rounds to bfloat16.
    near = 2**-6 if dtype is torch.bfloat16 else 0
    torch.testing.assert_close(found.weights, expected.weights, rtol=near, atol=0, equal_nan=True)
    assert found.experts.shape == (count, planner.slots)
    assert not count or int((found.experts[:, :3] != inputs[1]).sum()) > 0
    # The only open expert's score is no number: the others are not lost with it.
    assert not count or policy != "rank-balanced" or bool(found.rerouted.any())


def test_which_runs():
    assert not runs_on(torch.device("cpu")) and runs_on(torch.device("cuda"))
    with kernels("torch"):
        assert not runs_on(torch.device("cuda"))
    with pytest.raises(ValueError, match="found 'cuda', expected 'auto'"), kernels("cuda"):
        pass

    @fused("features")
    def feature_entropy(hidden):
        return "twin"

    assert feature_entropy(torch.ones(1, 4)) == "twin"
    with kernels("triton"):
        assert feature_entropy(torch.ones(1, 4, device=DEVICE)) != "twin"


def test_every_kernel_compiles_for_a_gpu():
    script = Path(__file__).parents[1] / "support" / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    sources = (Path(__file__).parents[2] / "macs" / "ops").glob("*.py")
    launched = {
        word.split("[")[0]
        for path in sources
        for word in path.read_text().split()
        if word.startswith("_") and "[" in word
    }
    assert {line.split()[0] for line in run.stdout.splitlines()} >= launched and len(launched) > 10
