"""Kernels of the capacities; reference: ``macs.steps.capacity``.

Equal but for float64 sums of slopes, which are added in another order and rounded up to whole tokens.

    by_source                       int64   [3, S]  tokens, weights, visual weights
    group                           int64   [4, R]  ``GroupField``; written by the first, read where SHARED
    target                          float64 [1]     target_load
    cost, rows                      int64   [S, E]
    modality_bias                   float64 [E]
    pool_of_expert, rank_of_expert  int64   [E]
    capacity                        int64   [S, P]  written
    row_capacity                    int64   [S, R]  written where rows have a separate bound
    active                          bool    [S]     written
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..capacity import UNBOUNDED, GroupField
from ..contracts import UNIT, Capacities, CapacityRule, Counts, LayerConstants
from .shared import power_of_2, rint


def measure_capacities(
    counts: Counts, constants: LayerConstants, rule: CapacityRule, top_k: int, group: Tensor | None = None
) -> Capacities:
    """One launch, a program a source."""
    (sources, num_experts), device = counts.rows.shape, counts.rows.device
    bounded = rule.capacity_factor is None
    separate = bounded and not rule.rows_only
    pools = torch.empty(sources, constants.pools, dtype=torch.int64, device=device)
    rows = torch.empty(sources, constants.ranks, dtype=torch.int64, device=device) if separate else pools
    active = torch.empty(sources, dtype=torch.bool, device=device)
    _capacities[(sources,)](
        counts.by_source, constants.target_load, counts.by_source if group is None else group, counts.cost,
        counts.rows, constants.modality_bias, constants.pool_of_expert, constants.rank_of_expert, pools, rows,
        active, top_k, num_experts, sources, constants.pools, constants.ranks, constants.min_tokens,
        RHO=rule.modality_strength, GAMMA=0.0 if bounded else rule.capacity_factor,
        LEAST=round(rule.floor * UNIT), BY_WEIGHT=counts.cost.numel() > 0, BOUNDED=bounded,
        ROWS_ONLY=bounded and rule.rows_only, SHARED=group is not None, FREE=UNBOUNDED, UNIT=UNIT,
        POOLS=power_of_2(constants.pools), RANKS=power_of_2(constants.ranks),
    )  # fmt: skip
    return Capacities(pools, rows if separate else None, active, bounded)


@triton.jit
def _capacities(
    by_source, target, group, cost, rows, modality_bias, pool_of_expert, rank_of_expert,
    capacity, row_capacity, active, top_k, num_experts, sources, pools, ranks, min_tokens,
    RHO: tl.constexpr, GAMMA: tl.constexpr, LEAST: tl.constexpr, BY_WEIGHT: tl.constexpr,
    BOUNDED: tl.constexpr, ROWS_ONLY: tl.constexpr, SHARED: tl.constexpr, FREE: tl.constexpr,
    UNIT: tl.constexpr, POOLS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    source = tl.program_id(0)
    valid = tl.load(by_source + source)
    plans = valid >= min_tokens
    tl.store(active + source, plans)
    free = tl.full((), FREE, tl.int64)
    if BOUNDED:
        each = tl.arange(0, RANKS)
        target = tl.load(target)
        most_rows = tl.zeros([RANKS], tl.int64) + row_bound(valid, target, top_k, ranks)
        if SHARED:
            sent = rows_of_ranks(rows + source * num_experts, rank_of_expert, each, num_experts)
            most_rows = shared_bound(valid, sent, group, target, each, top_k, ranks)
        most_rows *= UNIT if ROWS_ONLY else 1
        tl.store(row_capacity + source * ranks + each, tl.where(plans, most_rows, free), mask=each < ranks)
    if not ROWS_ONLY:
        pool = tl.arange(0, POOLS)
        total_weight = tl.load(by_source + sources + source)
        seen = tl.load(by_source + 2 * sources + source).to(tl.float64)
        ratio = tl.where(total_weight > 0, seen / tl.maximum(total_weight, 1).to(tl.float64), 0.5)
        lean = tl.full((), RHO, tl.float64) * (ratio - 0.5)

        members, pooled = tl.zeros([POOLS], tl.int64), tl.zeros([POOLS], tl.int64)
        price, asked = tl.zeros([POOLS], tl.int64), tl.zeros([POOLS], tl.int64)
        rank = tl.zeros([POOLS], tl.int64)
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
        if BOUNDED:
            even = share * pooled.to(tl.float64) / (divisor * UNIT).to(tl.float64)
            full = price.to(tl.float64) / UNIT / tl.maximum(even, 1e-9)
            want = asked.to(tl.float64)
            slope = tl.where(asked > 0, want / tl.maximum(full, 1e-12), 0.0)
            best, total = tl.zeros([POOLS], tl.float64), tl.zeros([POOLS], tl.float64)
            limit = tl.zeros([POOLS], tl.int64) + row_bound(valid, target, top_k, ranks)
            if SHARED:
                of_rank = tl.zeros([POOLS], tl.int64)
                for one in range(pools):
                    taken = pool == one
                    peers = real & (rank == tl.sum(tl.where(taken, rank, 0), 0))
                    of_rank += tl.where(peers, tl.sum(tl.where(taken, asked, 0), 0), 0)
                limit = shared_bound(valid, of_rank, group, target, rank, top_k, ranks)
            limit = limit.to(tl.float64)
            for one in range(pools):
                here = pool == one
                own = tl.sum(tl.where(here, full, 0.0), 0)
                same = real & (rank == tl.sum(tl.where(here, rank, 0), 0))
                before = same & (full < own)
                whole = tl.sum(tl.where(before, want, 0.0), 0)
                rising = tl.sum(tl.where(same & ~before, slope, 0.0), 0)
                most = tl.sum(tl.where(here, limit, 0.0), 0)
                gamma = tl.where(rising > 0, (most - whole) / tl.maximum(rising, 1e-12), 0.0)
                best = tl.where(same, tl.maximum(best, gamma), best)
                total = tl.where(here, tl.sum(tl.where(same, want, 0.0), 0), total)
            share = tl.where(total <= limit, tl.where(share > 0, float("inf"), 0.0), share * best)
        else:
            share = tl.full((), GAMMA, tl.float64) * share
        ceiling = 1024.0 * everything.to(tl.float64)
        base = tl.minimum(tl.ceil(share - 1e-9), ceiling).to(tl.int64)
        result = tl.minimum(base * pooled // divisor, everything * UNIT)
        result = tl.where(plans, tl.maximum(result, LEAST), free)
        tl.store(capacity + source * pools + pool, result, mask=real)


def group_rows(counts: Counts, constants: LayerConstants, top_k: int) -> Tensor:
    """One launch of one program."""
    sources, num_experts = counts.rows.shape
    ranks = constants.ranks
    group = torch.empty(len(GroupField), ranks, dtype=torch.int64, device=counts.rows.device)
    _group_rows[(1,)](
        counts.by_source, constants.target_load, counts.rows,
        constants.rank_of_expert, group, top_k, num_experts, sources, ranks, constants.min_tokens,
        RANKS=power_of_2(ranks),
    )  # fmt: skip
    return group


@triton.jit
def own_bound(tokens, target, top_k, ranks):
    """A source's part of the group's bound on each rank's rows."""
    even = (tokens * top_k).to(tl.float64) / tl.full((), ranks, tl.float64)
    return tl.floor(even * target).to(tl.int64)


@triton.jit
def row_bound(tokens, target, top_k, ranks):
    """The bound of a source, or of a group, by itself."""
    bound = own_bound(tokens, target, top_k, ranks)
    return tl.where(target >= 1, tl.maximum(bound, (tokens * top_k + ranks - 1) // ranks), bound)


@triton.jit
def rows_of_ranks(rows, rank_of_expert, rank, num_experts):
    """Assignments of one source, whose rows [E] are given, to each of these ranks."""
    found = rank.to(tl.int64) * 0
    for expert in range(num_experts):
        mine = rank == tl.load(rank_of_expert + expert)
        found += tl.where(mine, tl.load(rows + expert), 0)
    return found


@triton.jit
def shared_bound(valid, sent, group, target, rank, top_k, ranks):
    """Rows of a source at each of these ranks, whose valid tokens and assignments there are given."""
    here = rank < ranks
    rows = tl.load(group + rank, mask=here, other=0)
    over = tl.load(group + ranks + rank, mask=here, other=0)
    under = tl.load(group + 2 * ranks + rank, mask=here, other=0)
    whole = row_bound(tl.load(group + 3 * ranks), target, top_k, ranks)
    own = own_bound(valid, target, top_k, ranks)
    need, free = tl.maximum(sent - own, 0), tl.maximum(own - sent, 0)
    borrowed = tl.minimum(need, need * tl.maximum(whole + over - rows, under) // tl.maximum(over, 1))
    lent = (free * tl.minimum(over, under) + tl.maximum(under - 1, 0)) // tl.maximum(under, 1)
    return tl.where(target >= 1, own + borrowed - lent, own)


@triton.jit
def _group_rows(
    by_source, target, rows, rank_of_expert, group,
    top_k, num_experts, sources, ranks, min_tokens, RANKS: tl.constexpr,
):  # fmt: skip
    rank = tl.arange(0, RANKS)
    target = tl.load(target)
    total, over = tl.zeros([RANKS], tl.int64), tl.zeros([RANKS], tl.int64)
    under, tokens = tl.zeros([RANKS], tl.int64), tl.zeros([RANKS], tl.int64)
    for source in range(sources):
        valid = tl.load(by_source + source)
        sent = rows_of_ranks(rows + source * num_experts, rank_of_expert, rank, num_experts)
        left = own_bound(valid, target, top_k, ranks) - sent
        plans = valid >= min_tokens
        total += tl.where(plans, sent, 0)
        over += tl.where(plans, tl.maximum(-left, 0), 0)
        under += tl.where(plans, tl.maximum(left, 0), 0)
        tokens += tl.where(plans, valid, 0)
    here = rank < ranks
    tl.store(group + rank, total, mask=here)
    tl.store(group + ranks + rank, over, mask=here)
    tl.store(group + 2 * ranks + rank, under, mask=here)
    tl.store(group + 3 * ranks + rank, tokens, mask=here)
