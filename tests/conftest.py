"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from support.workers import Pool

# Speed lives in benchmarks: no test fails because a machine is slow.
settings.register_profile("macs", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("macs")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes, started once for the whole session."""
    workers = Pool()
    yield workers
    workers.close()
