"""Loads and capacities: what each expert or rank may take, and whose tokens may take it.

Shapes: S source ranks, E experts, R ranks, P pools (experts or ranks); loads and capacities are
int64 in fixed point (``UNIT`` is one token).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import MACSConfig
from .fixed_point import UNIT
from .modality import Tokens
from .ops import fused

MOST_ROWS = float(1 << 46)
"""More rows than there can be, and as many as capacities in fixed point can say."""


@dataclass(frozen=True)
class LoadTable:
    """What every source rank asks for; all int64.

    tokens [S] valid tokens; weight [S] their weights' sum; visual_weight [S] that of visual ones;
    cost [S, E] load asked of each expert, in fixed point; rows [S, E] the same in assignments.
    """

    tokens: Tensor
    weight: Tensor
    visual_weight: Tensor
    cost: Tensor
    rows: Tensor

    @property
    def device(self) -> torch.device:
        return self.rows.device


def loads_of(experts: Tensor, num_experts: int) -> Tensor:
    """Assignments of each expert: experts int64, any shape (-1: none) -> int64 [E]."""
    column = torch.where(experts < 0, num_experts, experts).flatten()
    return column.new_zeros(num_experts + 1).scatter_add(0, column, torch.ones_like(column))[:-1]


@fused("loads")
def measure(
    tokens: Tokens, weight: Tensor, cost: Tensor, experts: Tensor, num_sources: int, num_experts: int
) -> LoadTable:
    """Effective load L_j = sum of the costs of the assignments to j, per source, and its totals.

    weight and cost int64 [T], experts int64 [T, k] (-1: none).
    """
    counted = tokens.valid[:, None] & (experts >= 0)
    cell = experts if num_sources == 1 else tokens.source[:, None] * num_experts + experts
    cell = torch.where(counted, cell, num_sources * num_experts).flatten()

    def by_expert(values: Tensor) -> Tensor:
        flat = values.new_zeros(num_sources * num_experts + 1)
        flat = flat.scatter_add(0, cell, values[:, None].expand(counted.shape).flatten())
        return flat[:-1].view(num_sources, num_experts)

    def by_source(values: Tensor) -> Tensor:
        if num_sources == 1:
            return values.sum(0, keepdim=True)
        return values.new_zeros(num_sources).scatter_add(0, tokens.source, values)

    return LoadTable(
        tokens=by_source(tokens.valid.long()),
        weight=by_source(torch.where(tokens.valid, weight, 0)),
        visual_weight=by_source(torch.where(tokens.visual, weight, 0)),
        cost=by_expert(cost),
        rows=by_expert(torch.ones_like(cost)),
    )


def effective_visual_ratio(table: LoadTable) -> Tensor:
    """R_v = sum of visual weights / sum of weights, float64 [S]; 0.5 where there is no weight."""
    ratio = table.visual_weight.double() / table.weight.clamp(min=1).double()
    return torch.where(table.weight > 0, ratio, 0.5)


@dataclass(frozen=True)
class Pools:
    """What has a capacity: each expert, or the experts of each rank together.

    of_expert int64 [E] in 0..count-1, rank_of_expert int64 [E] in 0..ranks-1, modality_bias float64 [E]: m_j
    in -1..1.
    """

    of_expert: Tensor
    rank_of_expert: Tensor
    modality_bias: Tensor
    count: int
    ranks: int


@fused("capacity")
def pool_capacity(table: LoadTable, config: MACSConfig, top_k: int, pools: Pools, bound: Tensor) -> Tensor:
    """Capacity of every pool, int64 [S, P]: C_base (1 + rho m (R_v - 0.5)), at least ``min_capacity``.

    C_base is the even share of the pool's n experts, gamma T k n / E, in whole tokens,
    rounded up as count-based capacity is, so that text alone gives exactly that. A pool of several
    experts has the mean of their factors. With ``target_straggler`` every rank has its own gamma, see
    ``meeting_factors``, under the bound int64 [S, R] that is ``row_bound``'s.
    """
    num_experts, of_expert = len(pools.of_expert), pools.of_expert
    lean = effective_visual_ratio(table) - 0.5
    factor = 1 + config.modality_strength * lean[:, None] * pools.modality_bias
    # Integers from here on: the order in which a pool's experts are summed must not matter.
    fixed = (factor * UNIT).round().long()
    members = fixed.new_zeros(pools.count).index_add(0, of_expert, torch.ones_like(of_expert))
    pooled = fixed.new_zeros(len(fixed), pools.count).index_add(1, of_expert, fixed)

    share = (table.tokens.double() * top_k)[:, None] * members / num_experts
    if config.capacity_factor is not None:
        share = config.capacity_factor * share
    else:
        even = share * pooled / (members * UNIT)
        share = share * meeting_factors(table, even, bound, pools)
    # The small step down keeps the noise of the division from adding a token to a share that is whole.
    # Bounds keep the products in range; more room than for every assignment is never needed.
    everything = (table.tokens * top_k)[:, None]
    base = torch.minimum((share - 1e-9).ceil(), 1024.0 * everything).long()
    capacity = torch.minimum(base * pooled // members, everything * UNIT)
    return capacity.clamp(min=round(config.min_capacity * UNIT))


def bounds_of(config: MACSConfig) -> Tensor:
    """``target_straggler`` and ``max_load_factor``, float64 [2]; inf where there is none."""
    bounds = config.target_straggler, config.max_load_factor
    return torch.tensor([math.inf if one is None else one for one in bounds], dtype=torch.float64)


@fused("capacity")
def row_bound(tokens: Tensor, places: Tensor, bounds: Tensor, top_k: int, ranks: int) -> Tensor:
    """Rows that a rank may compute, by ``target_straggler`` and ``max_load_factor``: int64 [S, R].

    tokens int64 [S]: valid tokens of each source. bounds float64 [2]: ``bounds_of`` the settings. In whole
    rows: floor(target T k / R), where that covers the even share T k / R rounded up, so that what is
    even already loses nothing. A target of 1 or more may round to less than that where a source is small.
    If every source then rounded up, the group would exceed the target. So a source may give one row
    beyond floor(T k / R) to floor(target T k) - R floor(T k / R) ranks, from rank ``place`` times as many
    on: places int64 [S] are where the sources stand among those whose tokens meet, and with equally
    large sources the extra rows are spread evenly, the group keeping to the target. With uneven ones
    the worst is the sum over the sources of T k / R rounded up.
    """
    target, hard = bounds[0], bounds[1]
    total = (tokens * top_k).double()[:, None]
    even = total / ranks
    whole, least = even.ceil(), even.floor()
    room = (even * target).nan_to_num(0.0, MOST_ROWS).floor()  # no tokens times no bound is none
    extra = (total * target).nan_to_num(0.0, MOST_ROWS).floor() - ranks * least
    turn = torch.arange(ranks, device=total.device) - places[:, None] * extra
    rounded = least + (turn.remainder(ranks) < extra)
    room = torch.where((room < whole) & (target >= 1), rounded, room)
    return torch.minimum(room, (even * hard).nan_to_num(0.0, MOST_ROWS).floor()).long()


def meeting_factors(table: LoadTable, even: Tensor, bound: Tensor, pools: Pools) -> Tensor:
    """The largest capacity factor of every pool at which its rank admits at most ``bound`` rows.

    even float64 [S, P] is the capacity at a factor of 1, in tokens; bound int64 [S, R] -> float64 [S, P],
    the same for the pools of a rank; inf where the rank keeps to the bound by itself.

    A pool that is asked for a cost c admits all its n rows from the factor g = c / even on, and below
    that, on average, n gamma / g. What a rank admits is the sum over its pools: concave in gamma and
    straight between the g, so gamma is the largest at which one of its straight pieces meets the bound.
    The bound itself holds exactly, by a second admission: this makes sure that it has little to do.
    """
    sources = len(even)

    def by_pool(values: Tensor) -> Tensor:
        return values.new_zeros(sources, pools.count).index_add(1, pools.of_expert, values).double()

    rows, cost = by_pool(table.rows), by_pool(table.cost) / UNIT
    ranks = pools.ranks
    rank = pools.of_expert.new_zeros(pools.count).scatter(0, pools.of_expert, pools.rank_of_expert)  # [P]
    full = cost / even.clamp(min=1e-9)
    slope = torch.where(rows > 0, rows / full.clamp(min=1e-12), 0.0)
    same = rank[:, None] == rank  # [P, P]
    # For every pool: rows of its rank's pools that are full no later, and slopes of the others.
    before = (full[:, None, :] < full[:, :, None]) & same  # [S, P, P]
    whole = torch.where(before, rows[:, None, :], 0.0).sum(-1)
    rising = torch.where(same & ~before, slope[:, None, :], 0.0).sum(-1)
    gamma = ((bound[:, rank] - whole) / rising.clamp(min=1e-12)).masked_fill(rising <= 0, 0.0)
    column = rank.expand(sources, -1)
    by_rank = gamma.new_zeros(sources, ranks).scatter_reduce(1, column, gamma, "amax")
    asked = gamma.new_zeros(sources, ranks).index_add(1, rank, rows)
    return torch.where(asked <= bound, torch.inf, by_rank)[:, rank]
