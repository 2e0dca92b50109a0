"""The fit of compensation on layers whose experts are what it assumes."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from macs import Modality
from macs_tools.tune.compensation import Explained, Moments, Regression

EXPERTS, FEATURES, K, RANK = 5, 12, 2, 3


def steps(count, seed=0, noise=0.0):
    """Steps of a layer with affine experts that read three directions alone, other ones by modality."""
    random = torch.Generator().manual_seed(7)
    directions = torch.randn(2, FEATURES, RANK, generator=random)
    experts = torch.randn(2, EXPERTS, 1 + RANK, FEATURES, generator=random)
    shift = 3 * torch.randn(2, FEATURES, generator=random)
    random = torch.Generator().manual_seed(seed)
    for _ in range(count):
        tokens = Modality.of(torch.rand(1, 300, generator=random) < 0.5).tokens()
        kind = tokens.visual.long()
        inner = torch.randn(300, RANK, generator=random)
        hidden = torch.einsum("tr,tdr->td", inner, directions[kind]) + shift[kind]
        chosen = torch.rand(300, EXPERTS - 1, generator=random).argsort(1)[:, :K]  # nobody takes the last
        weights = torch.rand(300, K, generator=random)
        features = torch.cat([torch.ones(300, 1), inner], 1)
        outputs = torch.einsum("tq,tkqd->tkd", features, experts[kind[:, None], chosen])
        output = (weights[:, :, None] * outputs).sum(1) + noise * torch.randn(300, FEATURES, generator=random)
        yield SimpleNamespace(hidden=hidden, experts=chosen, weights=weights, tokens=tokens), output


def swept(accumulators, count, seed=0, **options):
    for index, (event, output) in enumerate(steps(count, seed, **options)):
        accumulators[index % len(accumulators)].add(event, output)
    for one, other in itertools.pairwise(accumulators):  # as an all-reduce would
        for mine, theirs in zip(other.sums, one.sums, strict=True):
            mine += theirs
    return accumulators[-1]


def fitted(processes=1, **options):
    device = torch.device("cpu")
    moments = swept([Moments(FEATURES, device) for _ in range(processes)], 6, **options)
    principal = moments.principal(RANK)
    regression = swept([Regression(*principal, EXPERTS) for _ in range(processes)], 6, **options)
    coefficients = regression.solve()
    explained = swept([Explained(*principal, EXPERTS, coefficients)], 2, seed=99, **options)
    return moments, coefficients, explained.share()


@pytest.mark.parametrize("processes", [1, 3])
def test_affine_experts_are_explained(processes):
    moments, coefficients, share = fitted(processes)
    assert int(moments.count.sum()) == 1800
    assert (share > 0.999).all() and (share <= 1).all()
    assert (coefficients[:, -1] == 0).all() and (coefficients[:, :-1].abs().amax((2, 3)) > 0).all()


def test_what_cannot_be_explained_is_not():
    *_, share = fitted(noise=3.0)
    assert (share < 0.9).all() and (share > 0.1).all()
    empty = Explained(torch.zeros(2, FEATURES), torch.zeros(2, FEATURES, RANK), EXPERTS, fitted()[1])
    assert empty.share().tolist() == [0, 0]


def test_tokens_that_hardly_differ_do_not_magnify_what_does():
    """As one prompt's text before every picture: other text must not be estimated at many times its size."""
    moments = Moments(FEATURES, torch.device("cpu"))
    for event, output in steps(4):
        text = ~event.tokens.visual
        event.hidden[text] = 1 + 1e-4 * event.hidden[text]
        moments.add(event, output)
    _, basis = moments.principal(RANK)
    assert (basis[0] == 0).all() and (basis[1].norm(dim=0) > 0.99).all()
    assert moments.principal(0)[1].shape == (2, FEATURES, 0)


def test_features_that_are_not_finite_are_left_out():
    moments = Moments(FEATURES, torch.device("cpu"))
    for event, output in steps(1):
        event.hidden[:5] = float("nan")
        moments.add(event, output)
    assert int(moments.count.sum()) == 295 and moments.principal(RANK)[0].isfinite().all()


def test_sums_take_the_memory_that_is_stated():
    for one, stated in (
        (Moments(FEATURES, torch.device("cpu")), Moments.nbytes(FEATURES)),
        (
            Regression(torch.zeros(2, FEATURES), torch.zeros(2, FEATURES, RANK), EXPERTS),
            Regression.nbytes(EXPERTS, FEATURES, RANK),
        ),
    ):
        assert sum(tensor.nbytes for tensor in one.sums if tensor.dim() > 1) == stated
    assert 48 * Moments.nbytes(2048) < 2e9 and 48 * Regression.nbytes(128, 2048, 8) < 2e9
