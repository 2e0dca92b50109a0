"""Stand-ins for DeepEP's and HybridEP's collectives, with the contracts Megatron uses, over gloo.

DeepEP: a token goes once to every rank that holds one of its experts, -1 standing for none; the
receiver gets local expert numbers. HybridEP: rows arrive by expert. Both sum what comes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor

from .ranks import gathered


class _CpuTorch:
    """``torch`` for a module that asks for CUDA tensors when it is constructed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*shape: Any, device: Any = None, **options: Any) -> Tensor:
        return torch.zeros(*shape, **options)


class Fake:
    """The collectives, and what they were handed."""

    def __init__(self) -> None:
        self.handed: list[tuple[Tensor, Tensor]] = []
        self.rows: list[int] = []

    def fused_dispatch(
        self, x: Tensor, token_indices: Tensor, token_probs: Tensor, num_experts: int, group: Any, **_: Any
    ) -> tuple[Any, ...]:
        self.handed.append((token_indices.clone(), token_probs.clone()))
        rank, local = dist.get_rank(group), num_experts // dist.get_world_size(group)
        parts, owners = [], []
        for source, (rows, indices, probs) in enumerate(gathered((x, token_indices, token_probs), group)):
            mine = (indices >= 0) & (indices // local == rank)
            numbers = torch.nonzero(mine.any(1))[:, 0]
            own = torch.where(mine, indices - rank * local, -1)[numbers]
            parts.append((rows[numbers], own, torch.where(mine, probs, 0)[numbers]))
            owners.append((source, numbers))
        received, indices, probs = (torch.cat(column) for column in zip(*parts, strict=True))
        counts = torch.bincount(indices[indices >= 0], minlength=local)
        self.rows.append(int(counts.sum()))
        return received, indices, probs, counts, (owners, len(x))

    def fused_combine(self, x: Tensor, group: Any, handle: Any, **_: Any) -> tuple[Tensor, None]:
        return self._combine(x, handle, group), None

    def hybrid_ep_dispatch(
        self, x: Tensor, routing_map: Tensor, probs: Tensor, group: Any, num_local_experts: int, **_: Any
    ) -> tuple[Any, ...]:
        self.handed.append((routing_map.clone(), probs.clone()))
        rank, first = dist.get_rank(group), dist.get_rank(group) * num_local_experts
        everyone = gathered((x, routing_map, probs), group)
        rows, weights, counts, owners = [], [], [], []
        for expert in range(first, first + num_local_experts):
            counts.append(0)
            for source, (hidden, chosen, weight) in enumerate(everyone):
                numbers = torch.nonzero(chosen[:, expert])[:, 0]
                rows.append(hidden[numbers])
                weights.append(weight[numbers, expert])
                owners.append((source, numbers))
                counts[-1] += len(numbers)
        self.rows.append(sum(counts))
        self._group = group
        assert rank == dist.get_rank(group)
        return torch.cat(rows), torch.cat(weights), None, torch.tensor(counts), (owners, len(x))

    def hybrid_ep_combine(self, x: Tensor, handle: Any, **_: Any) -> Tensor:
        return self._combine(x, handle, self._group)

    def _combine(self, x: Tensor, handle: Any, group: Any) -> Tensor:
        owners, count = handle
        sizes = [len(numbers) for _, numbers in owners]
        back = [
            (source, numbers, rows) for (source, numbers), rows in zip(owners, x.split(sizes), strict=True)
        ]
        combined = x.new_zeros(count, x.shape[1])
        for sent in gathered(back, group):
            for source, numbers, rows in sent:
                if source == dist.get_rank(group):
                    combined.index_add_(0, numbers, rows)
        return combined


@contextmanager
def fake_deepep() -> Iterator[Fake]:
    """Within this block Megatron finds both packages."""
    fake = Fake()
    replacements = {
        "fused_dispatch": fake.fused_dispatch,
        "fused_combine": fake.fused_combine,
        "hybrid_ep_dispatch": fake.hybrid_ep_dispatch,
        "hybrid_ep_combine": fake.hybrid_ep_combine,
        "set_deepep_num_sms": lambda number: None,
        "torch": _CpuTorch(),
    }
    with ExitStack() as stack:
        for name, value in replacements.items():
            stack.enter_context(mock.patch.object(token_dispatcher, name, value))
        yield fake
