"""Semantic weights against the slow reference in plain Python, and their kernels."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.kernels import DEVICE, both, features, kernel_test, tokens_of

from macs import WEIGHTINGS, Tokens
from macs.steps.contracts import UNIT, Counts
from macs.steps.weighting import (
    WeightRule,
    distinctness,
    feature_entropy,
    finite_features,
    relative_weights,
    semantic_weights,
)


def moments(groups):
    return torch.zeros(3, groups, dtype=torch.float64)


def entropy_of(hidden):
    return feature_entropy(hidden, torch.arange(len(hidden)))


def entropy_weights(entropy, visual, group, groups, sharpness):
    return relative_weights(entropy, visual, group, (-sharpness, 0.5), moments(groups))


def distinct(hidden, visual, source, sources):
    """Of the visual ones, in their order."""
    directions = torch.zeros(sources, hidden.shape[1], dtype=torch.float64)
    return distinctness(hidden, visual.nonzero()[:, 0], visual, source, directions)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_entropy(dtype, size):
    generator = torch.Generator().manual_seed(size)
    scale = torch.tensor([[0.0], [0.1], [1.0], [10.0], [100.0]])
    hidden = (torch.randn(5, size, generator=generator) * scale).to(dtype)
    expected = [reference.entropy(row) for row in hidden.double().tolist()]
    found = entropy_of(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), atol=2e-5, rtol=2e-5)


def test_entropy_ignores_autocast_and_default_dtype():
    hidden = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    expected = entropy_of(hidden)
    visual, group = torch.ones(64, dtype=torch.bool), torch.zeros(64, dtype=torch.int64)
    weights = entropy_weights(expected, visual, group, 1, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(entropy_of(hidden), expected)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(entropy_weights(expected, visual, group, 1, 1.0), weights)
    finally:
        torch.set_default_dtype(torch.float32)


def test_peaked_features_weigh_more_than_flat_ones():
    peaked, flat = torch.zeros(64), torch.full((64,), 0.1)
    peaked[3] = 20.0
    entropy = entropy_of(torch.stack([peaked, torch.linspace(0, 3, 64), flat]))
    visual, group = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    weight = entropy_weights(entropy, visual, group, 1, 1.0)
    assert weight[0] > weight[1] > weight[2]


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


def weights_of(hidden, tokens, weighting, average=0.25, sources=1):
    rule = WeightRule(weighting, 1.0, average, sources)
    counts = Counts.zeros(rule.shapes(hidden.shape[1]), hidden.device)
    return semantic_weights(hidden, tokens, rule, counts, True)


def test_constant_weights():
    tokens = Tokens.all_text(2, "cpu")
    tokens.modality[0] = 1
    for usual, weight in ((0.25, UNIT // 4), (1e-4, 7)):
        assert weights_of(torch.zeros(2, 3), tokens, "constant", usual).weight.tolist() == [weight, UNIT]


@pytest.mark.parametrize("rule", WEIGHTINGS)
def test_which_tokens_are_finite(rule):
    hidden = torch.randn(5, 6)
    hidden[1, 2], hidden[3, 0], hidden[4, 5] = math.nan, math.inf, -math.inf
    tokens = Tokens.all_text(5, "cpu")
    tokens.modality[3:] = 1
    found = weights_of(hidden, tokens, rule)
    assert found.finite.tolist() == finite_features(hidden).tolist() == [True, False, True, False, False]
    assert rule == "constant" or found.weight[3:].tolist() == [1, 1]


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
        expected.append(unlike)
    found = distinct(hidden, visual, source, sources)
    assert found.dtype == torch.float32
    # Quantised to 1/4096.
    torch.testing.assert_close(found, torch.tensor(expected)[visual], rtol=0, atol=1 / 4096)


@pytest.mark.parametrize("count", [40, 1024, 5000])
def test_permuted_tokens_are_as_distinct(count):
    """Exactly, in either engine's layout and any other order."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(count, 64, generator=generator).bfloat16() * 3
        visual = torch.rand(count, generator=generator) < 0.7
        source = torch.randint(0, 2, (count,), generator=generator)
        found = torch.zeros(count)
        found[visual] = distinct(hidden, visual, source, 2)
        for order in (
            torch.randperm(count, generator=generator),
            torch.arange(count).view(-1, 4).T.flatten(),
        ):
            permuted = distinct(hidden[order], visual[order], source[order], 2)
            assert torch.equal(found[order][visual[order]], permuted)


def test_distinct_tokens_weigh_more_and_nonfinite_ones_nothing():
    hidden = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0], [float("nan"), 0.0], [0.0, 9.0]])
    tokens = Tokens.all_text(9, "cpu")
    tokens.modality[:8] = 1
    weight = weights_of(hidden, tokens, "distinct", 0.2).weight.tolist()
    assert weight[8] == UNIT and weight[7] == 1
    assert len(set(weight[:6])) == 1 and weight[0] < 0.2 * UNIT < weight[6] <= 0.4 * UNIT
    # Alike all of them: each weighs what the usual one does.
    tokens = Tokens.all_text(6, "cpu")
    tokens.modality[:] = 1
    assert weights_of(hidden[:6], tokens, "distinct", 0.2).weight.tolist() == [round(0.2 * UNIT)] * 6


SIZES = [(5, 7), (1, 128), (37, 129), (3, 1500), (2, 8192), (0, 16)]


@kernel_test
@pytest.mark.parametrize(("count", "size"), SIZES)
@pytest.mark.parametrize("rule", WEIGHTINGS)
@pytest.mark.parametrize("sources", [1, 3])
def test_kernels(count, size, rule, sources):
    hidden = features(count, size, torch.bfloat16) + 0.5
    if count > 4:
        hidden[1, 2], hidden[3], hidden[4, 0] = float("nan"), 0.0, float("inf")
    tokens = tokens_of(count, sources)
    found, expected, *_ = both(weights_of, hidden, tokens, rule, 0.2, sources)
    assert torch.equal(found.finite, expected.finite)
    assert (found.weight.dtype == torch.int64 and not count) or int(found.weight.min()) >= 1
    # A norm or an entropy in another order of addition: a step of distinctness or of entropy apart.
    assert not count or (found.weight - expected.weight).abs().max() <= (32 if rule == "distinct" else 4)
    assert torch.equal(found.weight[~tokens.visual], expected.weight[~tokens.visual])


@kernel_test
def test_kernels_leave_text_unread_unless_asked():
    hidden, tokens = features(40, 64, torch.float32), tokens_of(40)
    rule = WeightRule("distinct", 1.0, 0.2, 1)
    shapes = rule.shapes(64)
    found, expected, *_ = both(
        lambda told: semantic_weights(hidden, tokens, rule, Counts.zeros(shapes, hidden.device), told), False
    )
    assert found.finite is None and expected.finite is None
    assert (found.weight - expected.weight).abs().max() <= 32


@kernel_test
def test_kernels_on_extremes():
    hidden = features(9, 40, torch.float32)
    hidden[0, 3], hidden[1, 39], hidden[2, 0] = float("nan"), float("inf"), -float("inf")
    hidden[3], hidden[4] = 7.0, 3e37
    hidden[5] = -3e37
    hidden[6, 0] = 1e4
    tokens = Tokens.all_text(9, DEVICE)
    tokens.modality[:] = 1
    for rule in ("distinct", "entropy"):
        found, expected, *_ = both(weights_of, hidden, tokens, rule)
        assert (found.weight - expected.weight).abs().max() <= 4 and found.weight[:3].tolist() == [1, 1, 1]


@kernel_test
@pytest.mark.parametrize("rule", ["distinct", "entropy"])
def test_kernels_on_features_that_are_not_side_by_side(rule):
    hidden = features(2 * 11, 50, torch.float32)
    for view in (hidden[::2], hidden.T):
        found, expected, *_ = both(weights_of, view, tokens_of(len(view)), rule)
        assert (found.weight - expected.weight).abs().max() <= 32


@kernel_test
def test_sums_of_many_tokens_are_close():
    hidden, tokens = features(300, 8, torch.float32), tokens_of(300, 4)
    rule = WeightRule("distinct", 2.0, 0.2, 4)
    counts = Counts.zeros(rule.shapes(8), hidden.device)
    _, _, (_, one), (_, other) = both(
        lambda finite, counts: semantic_weights(hidden, tokens, rule, counts, finite), True, counts
    )
    assert torch.equal(one.moments[0], other.moments[0]) and int(one.moments[0].sum()) > 0
    torch.testing.assert_close(one.directions, other.directions, rtol=1e-6, atol=1e-6)
