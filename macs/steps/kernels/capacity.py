"""The kernel of capacities; reference implementation: ``macs.steps.capacity``.

Equal but for float64 sums of slopes, which are added in another order; what follows from them is rounded up
to whole tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...config import MACSConfig
from ..capacity import MOST_ROWS, UNBOUNDED
from ..contracts import Constants, Room, Sums
from ..fixed_point import UNIT
from .shared import power_of_2, rint


def capacities(sums: Sums, constants: Constants, config: MACSConfig, top_k: int) -> Room:
    """One launch, a program a source."""
    sources, num_experts = sums.rows.shape
    bounded = config.max_load_factor is not None or config.target_load is not None
    own_rows = bounded and not config.pools_rows
    pools = torch.empty(sources, constants.pools, dtype=torch.int64, device=sums.device)
    active = torch.empty(sources, dtype=torch.bool, device=sums.device)
    rows = torch.empty(sources, constants.ranks, dtype=torch.int64, device=sums.device) if own_rows else pools
    told = {"MOST": int(MOST_ROWS), "FREE": UNBOUNDED, "UNIT": UNIT, "RANKS": power_of_2(constants.ranks)}
    bounds = constants.places, constants.bounds
    if config.pools_rows:
        _rank_capacities[(sources,)](
            sums.tokens, *bounds, pools, active, top_k, constants.ranks, constants.min_tokens, **told
        )
        return Room(pools, None, active, bounded)
    _pool_capacities[(sources,)](
        sums.tokens, *bounds, sums.weight, sums.visual_weight, sums.cost, sums.rows,
        constants.modality_bias, constants.pool_of_expert, constants.rank_of_expert, pools, rows, active,
        top_k, num_experts, constants.pools, constants.ranks, constants.min_tokens,
        RHO=config.modality_strength, MEETS=config.capacity_factor is None,
        GAMMA=0.0 if config.capacity_factor is None else config.capacity_factor,
        LEAST=round(config.min_capacity * UNIT), BY_WEIGHT=sums.cost.numel() > 0, BOUNDED=own_rows,
        POOLS=power_of_2(constants.pools), **told,
    )  # fmt: skip
    return Room(pools, rows if own_rows else None, active, bounded)


@triton.jit
def _times(share, bound, MOST: tl.constexpr):
    """The whole part of a product; no bound times nothing is nothing."""
    product = share * bound
    product = tl.where(product == product, product, 0.0)
    return tl.floor(tl.minimum(product, tl.full((), MOST, tl.float64))).to(tl.int64)


@triton.jit
def _row_bound(valid, places, bounds, rank, top_k, ranks, MOST: tl.constexpr):
    """Rows of each of these ranks, for a source's valid tokens."""
    target, hard = tl.load(bounds), tl.load(bounds + 1)
    rows = valid * top_k
    total = rows.to(tl.float64)
    even = total / tl.full((), ranks, tl.float64)
    least = rows // ranks
    whole = (rows + ranks - 1) // ranks
    extra = _times(total, target, MOST) - ranks * least
    turn = (rank - tl.load(places + tl.program_id(0)) * extra) % ranks
    turn = tl.where(turn < 0, turn + ranks, turn)
    rounded = least + (turn < extra).to(tl.int64)
    bound = _times(even, target, MOST)
    bound = tl.where((bound < whole) & (target >= 1), rounded, bound)
    return tl.minimum(bound, _times(even, hard, MOST))


@triton.jit
def _source(tokens, active, min_tokens):
    """A program's source, its valid tokens, and whether it plans, which it says."""
    source = tl.program_id(0)
    valid = tl.load(tokens + source)
    plans = valid >= min_tokens
    tl.store(active + source, plans)
    return source, valid, plans


@triton.jit
def _rank_capacities(
    tokens, places, bounds, capacity, active, top_k, ranks, min_tokens,
    MOST: tl.constexpr, FREE: tl.constexpr, UNIT: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    source, valid, plans = _source(tokens, active, min_tokens)
    rank = tl.arange(0, RANKS)
    bound = _row_bound(valid, places, bounds, rank, top_k, ranks, MOST)
    bound = tl.where(plans, bound * UNIT, tl.full((), FREE, tl.int64))
    tl.store(capacity + source * ranks + rank, bound, mask=rank < ranks)


@triton.jit
def _pool_capacities(
    tokens, places, bounds, weight, visual_weight, cost, rows, modality_bias, pool_of_expert, rank_of_expert,
    capacity, row_capacity, active, top_k, num_experts, pools, ranks, min_tokens,
    RHO: tl.constexpr, MEETS: tl.constexpr, GAMMA: tl.constexpr, LEAST: tl.constexpr,
    BY_WEIGHT: tl.constexpr, BOUNDED: tl.constexpr, POOLS: tl.constexpr,
    MOST: tl.constexpr, FREE: tl.constexpr, UNIT: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    source, valid, plans = _source(tokens, active, min_tokens)
    free = tl.full((), FREE, tl.int64)
    if BOUNDED:
        each = tl.arange(0, RANKS)
        most_rows = _row_bound(valid, places, bounds, each, top_k, ranks, MOST)
        tl.store(row_capacity + source * ranks + each, tl.where(plans, most_rows, free), mask=each < ranks)
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
        if BY_WEIGHT:
            price += tl.where(mine, tl.load(cost + source * num_experts + expert), 0)
        asked += tl.where(mine, tl.load(rows + source * num_experts + expert), 0)
        rank = tl.where(mine, tl.load(rank_of_expert + expert), rank)
    if not BY_WEIGHT:
        price = asked * UNIT
    real = pool < pools
    divisor = tl.where(real, members, 1)
    everything = valid * top_k
    share = everything.to(tl.float64) * members.to(tl.float64) / tl.full((), num_experts, tl.float64)
    if MEETS:
        even = share * pooled.to(tl.float64) / (divisor * UNIT).to(tl.float64)
        full = price.to(tl.float64) / UNIT / tl.maximum(even, 1e-9)
        want = asked.to(tl.float64)
        slope = tl.where(asked > 0, want / tl.maximum(full, 1e-12), 0.0)
        best, total = tl.zeros([POOLS], tl.float64), tl.zeros([POOLS], tl.float64)
        limit = _row_bound(valid, places, bounds, rank, top_k, ranks, MOST).to(tl.float64)
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
    told = tl.where(plans, tl.maximum(told, LEAST), free)
    tl.store(capacity + source * pools + pool, told, mask=real)
