"""When a Triton kernel does a step's work, and when plain torch does.

A kernel is compiled when it is first launched with tensors of given dtypes: before a CUDA graph captures a
layer, run it once at that size, as engines do.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_choice: ContextVar[str] = ContextVar("macs_kernels", default="auto")


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Within this block: "torch" (none), "triton" (always, as in Triton's interpreter), or "auto"."""
    if choice not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels: found {choice!r}, expected 'auto', 'torch' or 'triton'")
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def kernels_enabled(device: torch.device) -> bool:
    """Whether kernels do the work for tensors on this device."""
    choice = _choice.get()
    return choice == "triton" or (choice == "auto" and device.type == "cuda" and has_triton())


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, whichever one the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def indices_of(chosen: Tensor) -> Tensor:
    """Indices of the entries to look at, bool [N] -> int64 [M]: the chosen ones on a CPU; all on a GPU, where
    counting them would synchronise with the host."""
    if chosen.device.type == "cpu":
        return chosen.nonzero()[:, 0]
    return torch.arange(len(chosen), device=chosen.device)
