"""How long something takes, on a CPU or a GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


def settle() -> None:
    """Wait for what a GPU has queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any]) -> float:
    """Of one call on this process: by the clock, or by events on a GPU."""
    settle()  # what is queued before is not its own
    if torch.cuda.is_available():
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        work()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


@contextlib.contextmanager
def clocked(spent: dict[str, float], step: str) -> Iterator[None]:
    """Adds up what a step of a plan takes."""
    settle()
    started = time.perf_counter()
    try:
        yield
    finally:
        settle()
        spent[step] = spent.get(step, 0.0) + (time.perf_counter() - started) * 1e3
