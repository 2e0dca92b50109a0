"""The fit of compensation on layers whose experts are what it assumes, and the file that keeps it."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.estimates import profile_of

from macs import MACSConfig, Modality, Profile, Runtime
from macs.records.compensation import Compensation, Explained, Moments, Regression

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


ROUTERS = [torch.randn(EXPERTS, FEATURES, generator=torch.Generator().manual_seed(one)) for one in (1, 2)]


def test_a_file_keeps_it(tmp_path):
    kept = profile_of(ROUTERS, K)
    kept.save(tmp_path / "one.safetensors")
    loaded = Profile.load(tmp_path / "one.safetensors")
    assert loaded.compensation.rank == 3 and loaded.digest == kept.digest
    for name, tensor in kept.compensation.tensors().items():
        assert torch.equal(loaded.compensation.tensors()[name], tensor)
    changed = replace(kept.compensation, mean=kept.compensation.mean + 1)
    assert replace(kept, compensation=changed).digest != kept.digest
    assert replace(kept, compensation=None).digest != kept.digest


def test_what_does_not_fit_is_refused(tmp_path):
    kept = profile_of(ROUTERS, K)
    path = tmp_path / "one.safetensors"
    kept.save(path)
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    del tensors["compensation_basis"]
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match=r"KeyError.*compensation_basis"):
        Profile.load(path)
    one = kept.compensation
    with pytest.raises(
        ValueError, match=r"profile.compensation: found 1 layers of 5 experts, expected 2 of 5"
    ):
        replace(kept, compensation=Compensation(*(getattr(one, name)[:1] for name in vars(one))))
    with pytest.raises(ValueError, match=r"compensation.mean: found a number that is not finite"):
        replace(one, mean=one.mean / 0)
    with pytest.raises(
        ValueError, match="5 experts of 12 features, found a layer of 5 experts of 13 features"
    ):
        one.tables(0, "all", torch.zeros(EXPERTS, 13))


@pytest.mark.parametrize(
    ("profile", "found"), [(None, "no profile"), ("bare", "a profile without compensation")]
)
def test_settings_need_what_they_ask_for(profile, found):
    given = None if profile is None else replace(profile_of(ROUTERS, K), compensation=None)
    with pytest.raises(
        ValueError, match=rf"config.compensation: found 'visual' and {found}, expected one that"
    ):
        Runtime(MACSConfig(compensation="visual"), profile=given)


def test_tables_hold_the_modalities_of_the_scope():
    one = profile_of(ROUTERS, K).compensation
    for scope, table_of in (("visual", [-1, 0]), ("all", [0, 1])):
        tables = one.tables(1, scope, ROUTERS[1])
        assert tables.table_of.tolist() == table_of and len(tables.basis) == max(table_of) + 1
        assert torch.equal(tables.coefficients[-1], one.coefficients[1, 1])
