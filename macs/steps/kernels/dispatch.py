"""When a kernel does a step's work, and when plain torch does.

A function marked ``fused`` is plain torch: the readable form, and the reference implementation in its
kernel's tests. For tensors on a GPU, where Triton is installed, the function of the same name in the
file of the same name in this package takes its place: the same arguments, the same integers out (of floats,
and of what is rounded from them, see the kernel).

A kernel is compiled when it is first launched with tensors of some types: before a CUDA graph captures a
layer, run it once at that size, as engines do.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

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


def runs_on(device: torch.device) -> bool:
    """Whether kernels do the work for tensors on this device."""
    choice = _choice.get()
    return choice == "triton" or (choice == "auto" and device.type == "cuda" and has_triton())


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, whichever one the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def fused(reference: Function) -> Function:
    """Mark a function of a step, whose first argument has a ``device``, as one that has a kernel."""
    name, file = reference.__name__, reference.__module__.rpartition(".")[2]

    @functools.wraps(reference)
    def run(first: Any, *rest: Any, **named: Any) -> Any:
        if runs_on(first.device):
            kernel = getattr(importlib.import_module(f"{__package__}.{file}"), name)
            with _current(first.device):
                return kernel(first, *rest, **named)
        return reference(first, *rest, **named)

    run.reference = reference  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def may_be_any(chosen: Tensor) -> bool:
    """Whether any entry is chosen, bool [N]; on a GPU, which would have to tell the host, there may be."""
    return chosen.device.type != "cpu" or bool(chosen.any())


def indices_of(chosen: Tensor) -> Tensor:
    """Indices of the entries to look at, bool [N] -> int64 [M]: the chosen ones on a CPU; all on a GPU, which
    would have to tell the host how many they are."""
    if chosen.device.type == "cpu":
        return chosen.nonzero()[:, 0]
    return torch.arange(len(chosen), device=chosen.device)
