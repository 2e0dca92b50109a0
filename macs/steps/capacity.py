"""Capacities: what each expert or rank may take, and whose tokens may take it.

Shapes: S source ranks, E experts, R ranks, P pools (experts or ranks); loads and capacities are
int64 in fixed point (``UNIT`` is one token).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import MACSConfig
from .contracts import Constants, Room, Sums
from .fixed_point import UNIT
from .kernels.dispatch import fused

MOST_ROWS = float(1 << 46)
"""More rows than there can be, and as many as capacities in fixed point can say."""

UNBOUNDED = 1 << 62
"""The room of a source that does not plan."""


@fused
def capacities(sums: Sums, constants: Constants, config: MACSConfig, top_k: int) -> Room:
    """The room of every pool and, where their rows have a bound of their own, of every rank.

    Capacities are ``pool_capacity``, or the ``row_bound`` itself where that is all they are. A source with
    fewer than ``min_tokens`` valid tokens does not plan, and is not bounded.
    """
    bounded = config.max_load_factor is not None or config.target_load is not None
    active = sums.tokens >= constants.min_tokens
    idle = ~active[:, None]
    rows = row_bound(sums.tokens, constants, top_k) if bounded else None
    if rows is not None and config.pools_rows:
        return Room((rows * UNIT).masked_fill_(idle, UNBOUNDED), None, active, bounded)
    pools = pool_capacity(sums, constants, config, top_k, rows).masked_fill_(idle, UNBOUNDED)
    return Room(pools, None if rows is None else rows.masked_fill_(idle, UNBOUNDED), active, bounded)


def loads_of(experts: Tensor, num_experts: int) -> Tensor:
    """Assignments of each expert.

    Args:
        experts: int64, any shape; -1: none.
        num_experts: E.

    Returns:
        int64 [E].
    """
    column = torch.where(experts < 0, num_experts, experts).flatten()
    return column.new_zeros(num_experts + 1).scatter_add(0, column, torch.ones_like(column))[:-1]


def effective_visual_ratio(sums: Sums) -> Tensor:
    """R_v = sum of visual weights / sum of weights, float64 [S]; 0.5 where there is no weight."""
    ratio = sums.visual_weight.double() / sums.weight.clamp(min=1).double()
    return torch.where(sums.weight > 0, ratio, 0.5)


def pool_capacity(
    sums: Sums, constants: Constants, config: MACSConfig, top_k: int, bound: Tensor | None
) -> Tensor:
    """Capacity of every pool, int64 [S, P]: C_base (1 + rho m (R_v - 0.5)), at least ``min_capacity``.

    C_base is the even share of the pool's n experts, gamma T k n / E, in whole tokens,
    rounded up as count-based capacity is, so that text alone gives exactly that. A pool of several
    experts has the mean of their factors. With ``target_load`` every rank has its own gamma, see
    ``max_capacity_factors``, under the bound int64 [S, R] of its rows.
    """
    of_expert, count = constants.pool_of_expert, constants.pools
    lean = effective_visual_ratio(sums) - 0.5
    factor = 1 + config.modality_strength * lean[:, None] * constants.modality_bias
    # Integers from here on: the order in which a pool's experts are summed must not matter.
    fixed = (factor * UNIT).round().long()
    members = fixed.new_zeros(count).index_add(0, of_expert, torch.ones_like(of_expert))
    pooled = fixed.new_zeros(len(fixed), count).index_add(1, of_expert, fixed)

    share = (sums.tokens.double() * top_k)[:, None] * members / len(of_expert)
    if config.capacity_factor is not None:
        share = config.capacity_factor * share
    else:
        assert bound is not None
        even = share * pooled / (members * UNIT)
        share = share * max_capacity_factors(sums, constants, even, bound)
    # The small step down keeps the noise of the division from adding a token to a share that is whole.
    # Bounds keep the products in range; more room than for every assignment is never needed.
    everything = (sums.tokens * top_k)[:, None]
    base = torch.minimum((share - 1e-9).ceil(), 1024.0 * everything).long()
    capacity = torch.minimum(base * pooled // members, everything * UNIT)
    return capacity.clamp(min=round(config.min_capacity * UNIT))


def bounds_of(config: MACSConfig) -> Tensor:
    """``target_load`` and ``max_load_factor``, float64 [2]; inf where there is none."""
    bounds = config.target_load, config.max_load_factor
    return torch.tensor([math.inf if one is None else one for one in bounds], dtype=torch.float64)


def row_bound(tokens: Tensor, constants: Constants, top_k: int) -> Tensor:
    """Rows that a rank may compute, by ``target_load`` and ``max_load_factor``: int64 [S, R].

    tokens int64 [S]: valid tokens of each source. In whole rows: floor(target T k / R), where that covers the
    even share T k / R rounded up, so that what is even already loses nothing. A target of 1 or more may
    round to less than that where a source is small. If every source then rounded up, the group would exceed
    the target. So a source may give one row beyond floor(T k / R) to floor(target T k) - R floor(T k / R)
    ranks, from rank ``place`` times as many on: ``constants.places`` int64 [S] are where the sources stand
    among those whose tokens meet, and with equally large sources the extra rows are spread evenly, the group
    keeping to the target. With uneven ones the worst is the sum over the sources of T k / R rounded up.
    """
    ranks = constants.ranks
    target, hard = constants.bounds
    total = (tokens * top_k).double()[:, None]
    even = total / ranks
    whole, least = even.ceil(), even.floor()
    room = (even * target).nan_to_num(0.0, MOST_ROWS).floor()  # no tokens times no bound is none
    extra = (total * target).nan_to_num(0.0, MOST_ROWS).floor() - ranks * least
    turn = torch.arange(ranks, device=total.device) - constants.places[:, None] * extra
    rounded = least + (turn.remainder(ranks) < extra)
    room = torch.where((room < whole) & (target >= 1), rounded, room)
    return torch.minimum(room, (even * hard).nan_to_num(0.0, MOST_ROWS).floor()).long()


def max_capacity_factors(sums: Sums, constants: Constants, even: Tensor, bound: Tensor) -> Tensor:
    """The largest capacity factor of every pool at which its rank admits at most ``bound`` rows.

    even float64 [S, P] is the capacity at a factor of 1, in tokens; bound int64 [S, R] -> float64 [S, P],
    the same for the pools of a rank; inf where the rank keeps to the bound by itself.

    A pool that is asked for a cost c admits all its n rows from the factor g = c / even on, and below
    that, on average, n gamma / g. What a rank admits is the sum over its pools: concave in gamma and
    straight between the g, so gamma is the largest at which one of its straight pieces meets the bound.
    The bound itself holds exactly, by a second admission: this makes sure that it has little to do.
    """
    sources, count, of_expert = len(even), constants.pools, constants.pool_of_expert

    def by_pool(values: Tensor) -> Tensor:
        return values.new_zeros(sources, count).index_add(1, of_expert, values).double()

    rows = by_pool(sums.rows)
    cost = by_pool(sums.cost) / UNIT if sums.cost.numel() else rows
    rank = of_expert.new_zeros(count).scatter(0, of_expert, constants.rank_of_expert)  # [P]
    full = cost / even.clamp(min=1e-9)
    slope = torch.where(rows > 0, rows / full.clamp(min=1e-12), 0.0)
    same = rank[:, None] == rank  # [P, P]
    # For every pool: rows of its rank's pools that are full no later, and slopes of the others.
    before = (full[:, None, :] < full[:, :, None]) & same  # [S, P, P]
    whole = torch.where(before, rows[:, None, :], 0.0).sum(-1)
    rising = torch.where(same & ~before, slope[:, None, :], 0.0).sum(-1)
    gamma = ((bound[:, rank] - whole) / rising.clamp(min=1e-12)).masked_fill(rising <= 0, 0.0)
    column = rank.expand(sources, -1)
    by_rank = gamma.new_zeros(sources, constants.ranks).scatter_reduce(1, column, gamma, "amax")
    asked = gamma.new_zeros(sources, constants.ranks).index_add(1, rank, rows)
    return torch.where(asked <= bound, torch.inf, by_rank)[:, rank]
