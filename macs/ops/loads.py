"""Kernels that count loads, in integers: exactly their twins in ``macs.capacity`` and ``macs.routing``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..capacity import LoadTable
from ..modality import TEXT, Tokens
from .shared import power_of_2

TILE = 1024
"""Assignments of one program."""
FEW = 64
"""So many places are summed within a program, before memory sees them."""


def measure(
    tokens: Tokens, weight: Tensor, cost: Tensor, experts: Tensor, num_sources: int, num_experts: int
) -> LoadTable:
    """One launch, and the memory that it adds to."""
    count, k = experts.shape
    size = 3 * num_sources
    memory = torch.zeros(size + 2 * num_sources * num_experts, dtype=torch.int64, device=experts.device)
    by_source, by_expert = memory[:size].view(3, -1), memory[size:].view(2, num_sources, num_experts)
    if count:
        columns = power_of_2(k)
        block = max(1, TILE // max(columns, power_of_2(num_sources)))
        told = tokens.source, tokens.valid, tokens.kinds, weight, cost, experts
        tensors = (one.contiguous() for one in told)
        _measure[(triton.cdiv(count, block),)](
            *tensors, by_source, by_expert, count, k, num_sources, num_experts,
            TEXT=TEXT, TOKENS=block, K=columns, SOURCES=power_of_2(num_sources),
        )  # fmt: skip
    return LoadTable(*by_source, *by_expert)


@triton.jit(do_not_specialize=["count"])
def _measure(
    source, valid, kinds, weight, cost, experts, by_source, by_expert, count, k, sources, num_experts,
    TEXT: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = token < count
    of = tl.load(source + token, mask=here, other=0)
    counts = tl.load(valid + token, mask=here, other=0).to(tl.int1) & here
    seen = counts & (tl.load(kinds + token, mask=here, other=TEXT) != TEXT)
    heavy = tl.load(weight + token, mask=here, other=0)
    place = tl.arange(0, SOURCES)
    hit = of[:, None] == place[None, :]
    inside = place < sources
    tl.atomic_add(
        by_source + place, tl.sum((hit & counts[:, None]).to(tl.int64), 0), mask=inside, sem="relaxed"
    )
    weighs = tl.where(hit & counts[:, None], heavy[:, None], 0)
    tl.atomic_add(by_source + sources + place, tl.sum(weighs, 0), mask=inside, sem="relaxed")
    weighs = tl.where(hit & seen[:, None], heavy[:, None], 0)
    tl.atomic_add(by_source + 2 * sources + place, tl.sum(weighs, 0), mask=inside, sem="relaxed")

    column = tl.arange(0, K)
    real = here[:, None] & (column < k)[None, :]
    expert = tl.load(experts + token.to(tl.int64)[:, None] * k + column[None, :], mask=real, other=-1)
    asks = counts[:, None] & (expert >= 0)
    cell = of[:, None] * num_experts + expert
    price = tl.load(cost + token, mask=here, other=0)[:, None] + tl.zeros([TOKENS, K], tl.int64)
    tl.atomic_add(by_expert + cell, price, mask=asks, sem="relaxed")
    tl.atomic_add(
        by_expert + sources * num_experts + cell, tl.full([TOKENS, K], 1, tl.int64), mask=asks, sem="relaxed"
    )


def less(room: Tensor, source: Tensor, of_expert: Tensor, experts: Tensor, cost: Tensor) -> Tensor:
    """One launch, and the copy it takes from."""
    left = room.clone(memory_format=torch.contiguous_format)
    count, k = experts.shape
    if count:
        columns, cells = power_of_2(k), room.numel()
        tokens = max(1, TILE // columns)
        _less[(triton.cdiv(count, tokens),)](
            left, source.contiguous(), of_expert, experts.contiguous(), cost.contiguous(),
            count, k, room.shape[1], cells,
            TOKENS=tokens, K=columns, CELLS=power_of_2(cells) if cells <= FEW else 0,
        )  # fmt: skip
    return left


@triton.jit(do_not_specialize=["count"])
def _less(
    left, source, of_expert, experts, cost, count, k, pools, cells,
    TOKENS: tl.constexpr, K: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = token < count
    of = tl.load(source + token, mask=here, other=0)
    price = tl.load(cost + token, mask=here, other=0)
    column = tl.arange(0, K)
    real = here[:, None] & (column < k)[None, :]
    expert = tl.load(experts + token.to(tl.int64)[:, None] * k + column[None, :], mask=real, other=-1)
    takes = expert >= 0
    cell = of[:, None] * pools + tl.load(of_expert + expert, mask=takes, other=0)
    if CELLS > 0:
        # All tokens meet in a few places: add up here before memory sees them.
        place = tl.arange(0, CELLS)
        total = tl.zeros([CELLS], tl.int64)
        for one in tl.static_range(K):
            mine = column == one
            where = tl.sum(tl.where(mine[None, :] & takes, cell + 1, 0), 1) - 1  # -1: takes nothing
            total += tl.sum(tl.where(where[:, None] == place[None, :], price[:, None], 0), 0)
        tl.atomic_add(left + place, -total, mask=place < cells, sem="relaxed")
    else:
        each = price[:, None] + tl.zeros([TOKENS, K], tl.int64)
        tl.atomic_add(left + cell, -each, mask=takes, sem="relaxed")
