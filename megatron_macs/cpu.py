"""Megatron-Core on a CPU, for examples and tests: stubs for what it asks of CUDA.

Megatron is written for CUDA, yet its layers, dispatchers and static inference engine compute
nothing that a CPU cannot. This context puts harmless stubs where it asks for a device, a stream
or an event, and takes every one of them back on leaving.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .compat import unnamed


class _Inert:
    """A stream or event that does nothing, at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return self if event is None else event

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, event: Any) -> float:
        return 0.0


def _with_number_splits(collective: Callable[..., Any]) -> Callable[..., Any]:
    """``all_to_all_single`` whose split sizes may be tensors, as they are where CUDA synchronises."""

    def numbers(splits: Any) -> Any:
        return splits.tolist() if isinstance(splits, Tensor) else splits

    @functools.wraps(collective)
    def run(
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return collective(
            output, input, numbers(output_split_sizes), numbers(input_split_sizes), *args, **kwargs
        )

    return run


def _gathering_uneven(collective: Callable[..., Any]) -> Callable[..., Any]:
    """``all_gather`` of parts with different numbers of rows, which NCCL takes and gloo does not."""

    @functools.wraps(collective)
    def run(outputs: list[Tensor], part: Tensor, group: Any = None, async_op: bool = False) -> Any:
        rows = [len(output) for output in outputs]
        if len(set(rows)) == 1:
            return collective(outputs, part, group, async_op)
        padded = part.new_zeros(max(rows), *part.shape[1:])
        padded[: len(part)] = part
        found = [torch.empty_like(padded) for _ in outputs]
        collective(found, padded, group)
        for output, whole in zip(outputs, found, strict=True):
            output.copy_(whole[: len(output)])
        return None

    return run


def _scattering_uneven(collective: Callable[..., Any]) -> Callable[..., Any]:
    """``reduce_scatter`` into parts with different numbers of rows, likewise."""

    @functools.wraps(collective)
    def run(output: Tensor, parts: list[Tensor], *args: Any, group: Any = None, **kwargs: Any) -> Any:
        rows = [len(part) for part in parts]
        if len(set(rows)) == 1:
            return collective(output, parts, *args, group=group, **kwargs)
        total = torch.cat(parts)
        torch.distributed.all_reduce(total, group=group)
        output.copy_(total.split(rows)[torch.distributed.get_rank(group)])
        return None

    return run


def _return_self(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


@contextmanager
def cpu_engine() -> Iterator[None]:
    """Within this context Megatron-Core runs on the CPU; on leaving, every symbol is as before.

    A ``RuntimeError`` where CUDA is available: there Megatron needs no help, and a stub would
    only hide it.
    """
    if torch.cuda.is_available():
        raise RuntimeError("cpu_engine: CUDA is available; Megatron runs on it without this context")
    from megatron.core.fusions import fused_softmax
    from megatron.core.inference import communication_utils
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    inert, cpu = _Inert(), torch.device("cpu")
    replacements: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: cpu),
        (torch.cuda, "current_stream", lambda device=None: inert),
        (torch.cuda, "stream", lambda stream=None: nullcontext()),
        (torch.cuda, "Stream", _Inert),
        (torch.cuda, "Event", _Inert),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (Tensor, "cuda", _return_self),
        (torch.nn.Module, "cuda", _return_self),
        (communication_utils, "_is_cuda", lambda tensor: None),  # an assertion
        (
            fused_softmax,
            "get_default_causal_mask",
            lambda size: torch.ones(size, size, dtype=torch.bool).triu(1),
        ),
        (CudaRNGStatesTracker, "fork", lambda self, *args, **kwargs: nullcontext()),
        (
            torch.distributed,
            "all_to_all_single",
            _with_number_splits(torch.distributed.all_to_all_single),
        ),
        (torch.distributed, "all_gather", _gathering_uneven(torch.distributed.all_gather)),
        (torch.distributed, "reduce_scatter", _scattering_uneven(torch.distributed.reduce_scatter)),
    ]
    # Streams that Megatron keeps on its classes, once made: the inert ones must not outlive this.
    replacements += [
        (MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None),
        (SharedExpertMLP, "stream", None),
    ]
    replacements += unnamed()  # names that this Megatron does without transformer-engine
    with ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(mock.patch.object(owner, name, value, create=not hasattr(owner, name)))
        yield
