"""Fixtures of the steps' tests."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written holds NaN, or the largest integer."""
    real = torch.empty

    def empty(*shape, **named):
        fresh = real(*shape, **named)
        if fresh.is_floating_point():
            return fresh.fill_(float("nan"))
        return fresh.fill_(True if fresh.dtype is torch.bool else torch.iinfo(fresh.dtype).max)

    monkeypatch.setattr(torch, "empty", empty)
