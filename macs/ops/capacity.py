"""Kernels of capacities; reference implementation: ``macs.capacity``.

Equal but for float64 sums of slopes, which are added in another order; what follows from them is rounded up
to whole tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..capacity import MOST_ROWS, LoadTable, Pools
from ..config import MACSConfig
from ..fixed_point import UNIT
from .shared import power_of_2, rint


def row_bound(tokens: Tensor, places: Tensor, bounds: Tensor, top_k: int, ranks: int) -> Tensor:
    """One launch."""
    room = torch.empty(len(tokens), ranks, dtype=torch.int64, device=tokens.device)
    tensors = tokens.contiguous(), places.contiguous(), bounds.contiguous()
    _row_bound[(len(tokens),)](*tensors, room, top_k, ranks, MOST=int(MOST_ROWS), RANKS=power_of_2(ranks))
    return room


@triton.jit
def _times(share, bound, MOST: tl.constexpr):
    """The whole part of a product; no bound times nothing is nothing."""
    product = share * bound
    product = tl.where(product == product, product, 0.0)
    return tl.floor(tl.minimum(product, tl.full((), MOST, tl.float64)))


@triton.jit
def _row_bound(tokens, places, bounds, room, top_k, ranks, MOST: tl.constexpr, RANKS: tl.constexpr):
    source = tl.program_id(0)
    rank = tl.arange(0, RANKS)
    target, hard = tl.load(bounds), tl.load(bounds + 1)
    rows = tl.load(tokens + source) * top_k
    total = rows.to(tl.float64)
    even = total / tl.full((), ranks, tl.float64)
    least = rows // ranks
    whole = (rows + ranks - 1) // ranks
    bound = _times(even, target, MOST).to(tl.int64)
    extra = _times(total, target, MOST).to(tl.int64) - ranks * least
    turn = (rank - tl.load(places + source) * extra) % ranks
    turn = tl.where(turn < 0, turn + ranks, turn)
    rounded = least + (turn < extra).to(tl.int64)
    bound = tl.where((bound < whole) & (target >= 1), rounded, bound)
    bound = tl.minimum(bound, _times(even, hard, MOST).to(tl.int64))
    tl.store(room + source * ranks + rank, bound, mask=rank < ranks)


def pool_capacity(table: LoadTable, config: MACSConfig, top_k: int, pools: Pools, bound: Tensor) -> Tensor:
    """One launch, a program a source."""
    sources, num_experts = table.rows.shape
    capacity = torch.empty(sources, pools.count, dtype=torch.int64, device=table.device)
    tensors = (
        table.tokens, table.weight, table.visual_weight, table.cost, table.rows,
        pools.modality_bias, pools.of_expert, pools.rank_of_expert, bound,
    )  # fmt: skip
    _pool_capacity[(sources,)](
        *(one.contiguous() for one in tensors), capacity, top_k, num_experts, pools.count, pools.ranks,
        RHO=config.modality_strength, MEETS=config.capacity_factor is None,
        GAMMA=0.0 if config.capacity_factor is None else config.capacity_factor,
        LEAST=round(config.min_capacity * UNIT), UNIT=UNIT, POOLS=power_of_2(pools.count),
    )  # fmt: skip
    return capacity


@triton.jit
def _pool_capacity(
    tokens, weight, visual_weight, cost, rows, modality_bias, pool_of_expert, rank_of_expert, bound, capacity,
    top_k, num_experts, pools, ranks,
    RHO: tl.constexpr, MEETS: tl.constexpr, GAMMA: tl.constexpr, LEAST: tl.constexpr, UNIT: tl.constexpr,
    POOLS: tl.constexpr,
):  # fmt: skip
    source = tl.program_id(0)
    pool = tl.arange(0, POOLS)
    heavy = tl.load(weight + source)
    seen = tl.load(visual_weight + source).to(tl.float64)
    ratio = tl.where(heavy > 0, seen / tl.maximum(heavy, 1).to(tl.float64), 0.5)
    lean = tl.full((), RHO, tl.float64) * (ratio - 0.5)

    members, pooled = tl.zeros([POOLS], tl.int64), tl.zeros([POOLS], tl.int64)
    price, asked, rank = tl.zeros([POOLS], tl.int64), tl.zeros([POOLS], tl.int64), tl.zeros([POOLS], tl.int64)
    for expert in range(num_experts):
        mine = pool == tl.load(pool_of_expert + expert)
        factor = rint((1 + lean * tl.load(modality_bias + expert)) * UNIT).to(tl.int64)
        members += tl.where(mine, 1, 0)
        pooled += tl.where(mine, factor, 0)
        price += tl.where(mine, tl.load(cost + source * num_experts + expert), 0)
        asked += tl.where(mine, tl.load(rows + source * num_experts + expert), 0)
        rank = tl.where(mine, tl.load(rank_of_expert + expert), rank)
    real = pool < pools
    divisor = tl.where(real, members, 1)
    everything = tl.load(tokens + source) * top_k
    share = everything.to(tl.float64) * members.to(tl.float64) / tl.full((), num_experts, tl.float64)
    if MEETS:
        even = share * pooled.to(tl.float64) / (divisor * UNIT).to(tl.float64)
        full = price.to(tl.float64) / UNIT / tl.maximum(even, 1e-9)
        want = asked.to(tl.float64)
        slope = tl.where(asked > 0, want / tl.maximum(full, 1e-12), 0.0)
        best, total = tl.zeros([POOLS], tl.float64), tl.zeros([POOLS], tl.float64)
        limit = tl.load(bound + source * ranks + rank, mask=real, other=0).to(tl.float64)
        for one in range(pools):
            here = pool == one
            own = tl.sum(tl.where(here, full, 0.0), 0)
            same = real & (rank == tl.sum(tl.where(here, rank, 0), 0))
            before = same & (full < own)
            whole = tl.sum(tl.where(before, want, 0.0), 0)
            rising = tl.sum(tl.where(same & ~before, slope, 0.0), 0)
            room = tl.sum(tl.where(here, limit, 0.0), 0)
            gamma = tl.where(rising > 0, (room - whole) / tl.maximum(rising, 1e-12), 0.0)
            best = tl.where(same, tl.maximum(best, gamma), best)
            total = tl.where(here, tl.sum(tl.where(same, want, 0.0), 0), total)
        share = tl.where(total <= limit, tl.where(share > 0, float("inf"), 0.0), share * best)
    else:
        share = tl.full((), GAMMA, tl.float64) * share
    most = 1024.0 * everything.to(tl.float64)
    base = tl.minimum(tl.ceil(share - 1e-9), most).to(tl.int64)
    told = tl.minimum(base * pooled // divisor, everything * UNIT)
    tl.store(capacity + source * pools + pool, tl.maximum(told, LEAST), mask=real)
