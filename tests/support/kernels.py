"""For tests of a kernel beside its reference: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import settings

from macs import Tokens
from macs.steps.kernels.dispatch import has_triton, kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernel_test(function: Any) -> Any:
    """Mark a test of a kernel. In the interpreter, where a launch takes a hundred times longer, a property is
    asked with 25 examples under every profile."""
    if hasattr(function, "hypothesis") and DEVICE == "cpu":
        most = min(25, settings.default.max_examples)  # type: ignore[union-attr]
        function = settings(max_examples=most)(function)
    skip = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
    return pytest.mark.usefixtures("poisoned")(pytest.mark.kernels(skip(function)))


def both(function: Any, *arguments: Any) -> tuple[Any, Any, Any, Any]:
    """What the kernel says and what the reference says, and the arguments as each left them."""
    found = []
    for choice in ("triton", "torch"):
        given = copy.deepcopy(arguments)  # a step may change what it is given
        with kernels(choice):
            found.append((function(*given), given))
    return found[0][0], found[1][0], found[0][1], found[1][1]


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        if not (one.dtype == other.dtype and one.shape == other.shape):
            return False
        numbers = one.is_floating_point()
        return torch.allclose(one, other, 0, 0, equal_nan=True) if numbers else torch.equal(one, other)
    if isinstance(one, tuple):
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    if is_dataclass(one) and not isinstance(one, type):
        compared = [field.name for field in fields(one) if field.compare]
        return all(same(getattr(one, name), getattr(other, name)) for name in compared)
    return one == other


def generator(*seed: Any) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seed) % 2**31)


def features(count: int, size: int, dtype: torch.dtype, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(count, size, generator=generator(count, size, seed)) * scale).to(dtype).to(DEVICE)


def experts_of(count: int, experts: int, k: int, seed: int = 0, none: float = 0.1) -> torch.Tensor:
    """A router's choice int64 [T, k], ascending, some of it -1 at the end of a row."""
    random = generator(count, experts, k, seed)
    picked = torch.rand(count, experts, generator=random).argsort(1)[:, :k].sort(1).values
    gone = torch.rand(count, k, generator=random) < none
    return torch.where(gone, -1, picked).to(DEVICE)


def tokens_of(count: int, sources: int = 1, seed: int = 0, valid: float = 0.8) -> Tokens:
    """Text and pictures, padding, exempt ones, in no order."""
    random = generator(count, sources, seed)

    def some(share: float) -> torch.Tensor:
        return (torch.rand(count, generator=random) < share).to(DEVICE)

    return replace(
        Tokens.all_text(count, DEVICE),
        modality=some(0.6).to(torch.int8),
        valid=some(valid),
        exempt=some(0.1),
        position=torch.randperm(count, generator=random).to(DEVICE),
        source=torch.randint(0, sources, (count,), generator=random).to(DEVICE),
    )
