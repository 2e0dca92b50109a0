"""Stand-ins for NVLS symmetric memory and its kernels, with the contracts Megatron uses, over gloo.

A symmetric buffer is plain memory of each process. The gather writes every rank's rows, one rank after
the other, into everybody's; the scatter sums everybody's and hands each rank its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import token_dispatcher_inference as engine
from torch import Tensor

from .ranks import gathered


class _Buffer:
    """What ``SymmetricMemoryManager.get_buffer`` returns; its handle is the process group."""

    init_failure_reason = None

    def __init__(self, group: Any) -> None:
        self.group = group

    def maybe_get_tensor(self, shape: list[int], dtype: torch.dtype) -> dict[str, Any]:
        filler = float("nan") if dtype.is_floating_point else -1
        return {"tensor": torch.full(shape, filler, dtype=dtype), "handle": self.group}


class _Manager:
    buffers: ClassVar[dict[str, _Buffer]] = {}

    @classmethod
    def get_buffer(cls, name: str, process_group: Any = None, size_mb: int = 0) -> _Buffer:
        if process_group is not None:
            cls.buffers[name] = _Buffer(process_group)
        return cls.buffers[name]


def _metadata(local_tokens: int, local_buf: Tensor, symm_mem_hdl: Any, step_metadata: Tensor) -> None:
    counts = gathered(local_tokens, symm_mem_hdl)
    before = sum(counts[: dist.get_rank(symm_mem_hdl)])
    step_metadata.copy_(torch.tensor([sum(counts), before, max(counts)]))


def _gather(*tensors: Any, rank_token_offset: Tensor, **_: Any) -> None:
    outputs, inputs, handles = tensors[:3], tensors[3:6], tensors[6:]
    for output, rows, group in zip(outputs, inputs, handles, strict=True):
        everyone = torch.cat(gathered(rows.clone(), group))
        output.view(-1, rows.shape[1])[: len(everyone)] = everyone


def _scatter(output: Tensor, source: Tensor, group: Any, rank_token_offset: Tensor, **_: Any) -> None:
    total = torch.nan_to_num(source)  # rows beyond the valid ones hold anything
    dist.all_reduce(total, group=group)
    first = int(rank_token_offset)
    output.copy_(total[first : first + len(output)])


def _mask_padding(routing_map: Tensor, real_token_count: Tensor, tp_rank: int = 0) -> None:
    row = torch.arange(len(routing_map)) + tp_rank * len(routing_map)
    routing_map[row >= real_token_count] = -1


@contextmanager
def fake_nvls() -> Iterator[None]:
    """Within this context ``NVLSAllGatherVDispatcher`` runs on the CPU."""
    with ExitStack() as stack:
        for name, stand_in in (
            ("SymmetricMemoryManager", _Manager),
            ("fused_metadata_update", _metadata),
            ("multimem_all_gatherv_3tensor", _gather),
            ("multimem_reduce_scatter_v", _scatter),
            ("mask_routing_padding", _mask_padding),
        ):
            stack.enter_context(mock.patch.object(engine, name, stand_in))
        try:
            yield
        finally:
            engine.NVLSAllGatherVDispatcher._delete_buffers()
