"""Estimates of dropped experts: against a loop over assignments, in Triton's interpreter, and in launches."""

from dataclasses import replace

import pytest
import torch
from support.kernels import DEVICE, both, generator, kernel_test
from torch.utils._python_dispatch import TorchDispatchMode

from macs import Modality
from macs.steps import compensation
from macs.steps.compensation import CompensationTables, Dropped, compensate
from macs.steps.kernels.dispatch import kernels

EXPERTS, FEATURES, K = 6, 20, 3


def case_of(count, rank, tables, dtype=torch.float32, added=0):
    random = generator(count, rank, tables)
    experts = torch.rand(count, EXPERTS, generator=random).argsort(1)[:, :K]
    experts = experts.masked_fill(torch.rand(count, K, generator=random) < 0.1, -1)
    drops = torch.rand(count, K + added, generator=random) < 0.4
    planned = torch.nn.functional.pad(experts, (0, added), value=2).masked_fill(drops, -1)
    given = CompensationTables(
        torch.randn(tables, FEATURES, rank, generator=random),
        torch.randn(tables, rank, generator=random),
        torch.randn(tables, EXPERTS, 1 + rank, FEATURES, generator=random),
        torch.tensor({1: [-1, 0], 2: [0, 1]}[tables]),
    ).to(torch.device(DEVICE))
    dropped = Dropped(
        torch.randn(count, FEATURES, generator=random).to(DEVICE, dtype),
        experts.to(DEVICE),
        torch.rand(count, K, generator=random).to(DEVICE, dtype),
        planned.to(DEVICE),
        Modality.of((torch.rand(1, count, generator=random) < 0.6).to(DEVICE)).tokens(),
    )
    return torch.randn(count, FEATURES, generator=random).to(DEVICE, dtype), dropped, given


def by_loop(output, dropped, tables):
    """The formula, assignment by assignment, in float64."""
    result = output.double().clone()
    for token, choice in enumerate(dropped.experts.tolist()):
        table = int(tables.table_of[int(dropped.tokens.visual[token])])
        x = dropped.hidden[token].double()
        for slot, expert in enumerate(choice):
            if expert < 0 or dropped.planned[token, slot] >= 0 or table < 0:
                continue
            features = torch.cat(
                [x.new_ones(1), tables.offset[table].double() + x @ tables.basis[table].double()]
            )
            estimate = features @ tables.coefficients[table, expert].double()
            result[token] += dropped.weights[token, slot].double() * estimate
    return result


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("count", "rank", "tables", "added"), [(37, 4, 2, 0), (9, 0, 1, 2), (0, 2, 2, 0)])
def test_estimates_are_the_formula(count, rank, tables, added, grouped, monkeypatch):
    if not grouped:  # as an older torch
        monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    output, dropped, given = case_of(count, rank, tables, added=added)
    found = compensate(output, dropped, given)
    assert found.dtype == output.dtype
    torch.testing.assert_close(found.double(), by_loop(output, dropped, given), rtol=1e-4, atol=1e-4)


def test_a_token_without_a_drop_keeps_its_bits():
    output, dropped, tables = case_of(50, 3, 1, torch.bfloat16)
    output[:, 0] = -0.0
    dropped.hidden[dropped.planned.amin(1) >= 0] = float("nan")
    found = compensate(output, dropped, tables)
    lost = (dropped.planned < 0) & (dropped.experts >= 0)
    kept = ~(lost.any(1) & dropped.tokens.visual)
    assert 0 < int(kept.sum()) < 50
    assert torch.equal(found[kept].view(torch.int16), output[kept].view(torch.int16))
    assert not torch.equal(found[~kept], output[~kept])


@kernel_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "rank", "tables", "added"), [(37, 5, 2, 0), (9, 0, 1, 2), (40, 18, 1, 0), (0, 2, 2, 0)]
)
def test_the_kernel_is_its_reference(count, rank, tables, added, dtype):
    output, dropped, given = case_of(count, rank, tables, dtype, added)
    found, expected, *_ = both(compensation.compensate, output, dropped, given)
    near = {torch.float32: 1e-4, torch.bfloat16: 2**-5}[dtype]
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    lost = ((dropped.planned[:, :K] < 0) & (dropped.experts >= 0)).any(1)
    unmoved = ~(lost & (given.table_of[dropped.tokens.visual.long()] >= 0))
    assert torch.equal(found[unmoved], output[unmoved])


@kernel_test
@pytest.mark.parametrize("choice", ["triton", "torch"])
def test_an_output_with_a_gradient_keeps_it(choice):
    """Also by torch with tables as they are on a GPU, and where these were made in inference mode."""
    output, dropped, tables = case_of(20, 3, 1)
    with torch.inference_mode():
        coefficients = tables.coefficients if choice == "triton" else tables.coefficients.bfloat16()
        tables = replace(tables, coefficients=coefficients.clone())
    with kernels(choice):
        compensate(output.requires_grad_(), dropped, tables).sum().backward()
    assert torch.equal(output.grad, torch.ones_like(output))


@pytest.mark.parametrize("many", [1, 2])
def test_a_cpu_makes_few_calls(many):
    output, dropped, tables = case_of(50, 3, many)
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    with Count():
        compensate(output, dropped, tables)
    computing = [one for one in calls if not one.is_view and "promote_types" not in str(one)]
    assert len(computing) <= 25, computing
