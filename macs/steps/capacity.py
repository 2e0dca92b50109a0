"""Capacities: what each expert or rank may take from each source.

Shapes: S source ranks, E experts, R ranks, P pools (experts or ranks). Loads and capacities are int64 in
fixed point (``UNIT`` is one token).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bounds import row_bound, shared_bound
from .contracts import Capacities, CapacityRule, Counts, LayerConstants
from .fixed_point import UNIT
from .kernels.dispatch import kernels_enabled

UNBOUNDED = 1 << 62
"""The capacity of a source that does not plan."""


def measure_capacities(
    counts: Counts, constants: LayerConstants, rule: CapacityRule, top_k: int, group: Tensor | None = None
) -> Capacities:
    """Capacity of every pool and, where rows have a separate bound, of every rank.

    Args:
        counts: tokens, weights, rows and costs by source.
        constants: ``target_load``, and the pool and rank of each expert.
        rule: how capacities follow from them; ``rows_only``: the bound on rows is the capacity.
        top_k: k.
        group: ``group_rows`` of all sources, int64 [4, R]; none: each source keeps to its own bound.

    Returns:
        The capacities. A source with fewer than ``min_tokens`` valid tokens does not plan and is unbounded.
    """
    if kernels_enabled(counts.device):
        from .kernels import capacity as kernels

        return kernels.measure_capacities(counts, constants, rule, top_k, group)
    active = counts.tokens >= constants.min_tokens
    idle = ~active[:, None]
    rows = None
    if rule.bounded and group is not None:
        rows = shared_bound(counts, constants, group, top_k)
    elif rule.bounded:
        rows = row_bound(counts.tokens, constants, top_k)
    if rows is not None and rule.rows_only:
        return Capacities((rows * UNIT).masked_fill_(idle, UNBOUNDED), None, active, True)
    pools = pool_capacity(counts, constants, rule, top_k, rows).masked_fill_(idle, UNBOUNDED)
    return Capacities(
        pools, None if rows is None else rows.masked_fill(idle, UNBOUNDED), active, rule.bounded
    )


def effective_visual_ratio(counts: Counts) -> Tensor:
    """R_v = sum of visual weights / sum of weights, float64 [S]; 0.5 where there is no weight."""
    _, weight, visual_weight = counts.by_source.double().unbind()
    return torch.where(weight > 0, visual_weight / weight.clamp(min=1), 0.5)


def pool_capacity(
    counts: Counts, constants: LayerConstants, rule: CapacityRule, top_k: int, bound: Tensor | None
) -> Tensor:
    """Capacity of every pool, int64 [S, P]: C_base (1 + rho m (R_v - 0.5)), at least the floor (the paper's
    equation for modality-adaptive capacity).

    C_base is the even share of the pool's n experts, gamma T k n / E, in whole tokens, rounded up as
    count-based capacity is, so that text alone gives exactly that. A pool of several experts has the mean of
    their factors. With a bound int64 [S, R] on rows every rank has its own gamma (``max_capacity_factors``).
    """
    of_expert, pools = constants.pool_of_expert, constants.pools
    lean = effective_visual_ratio(counts) - 0.5
    factor = 1 + rule.modality_strength * lean[:, None] * constants.modality_bias
    # Integers from here on: the order in which a pool's experts are summed must not matter.
    fixed = (factor * UNIT).round().long()
    members = fixed.new_zeros(pools).index_add(0, of_expert, torch.ones_like(of_expert))
    pooled = fixed.new_zeros(len(fixed), pools).index_add(1, of_expert, fixed)

    share = (counts.tokens.double() * top_k)[:, None] * members / len(of_expert)
    if bound is None:
        assert rule.capacity_factor is not None
        share = rule.capacity_factor * share
    else:
        even = share * pooled / (members * UNIT)
        share = share * max_capacity_factors(counts, constants, even, bound)
    # The small step down keeps the noise of the division from adding a token to a whole share. The limits
    # keep the products in range; more capacity than for every assignment is never needed.
    everything = (counts.tokens * top_k)[:, None]
    base = torch.minimum((share - 1e-9).ceil(), 1024.0 * everything).long()
    capacity = torch.minimum(base * pooled // members, everything * UNIT)
    return capacity.clamp(min=round(rule.floor * UNIT))


def max_capacity_factors(counts: Counts, constants: LayerConstants, even: Tensor, bound: Tensor) -> Tensor:
    """The largest capacity factor of every pool at which its rank admits at most ``bound`` rows.

    even float64 [S, P]: capacity at a factor of 1, in tokens; bound int64 [S, R] -> float64 [S, P], equal for
    the pools of a rank; inf where the rank is within its bound anyway.

    A pool with cost c admits all its n rows from the factor g = c / even on, and n gamma / g on average below
    that. What a rank admits is the sum over its pools: concave in gamma and straight between the g, so gamma
    is the largest at which one of its straight pieces meets the bound. A second admission makes the bound
    exact; this makes sure that it has little to do.
    """
    sources, pools, of_expert = len(even), constants.pools, constants.pool_of_expert

    def by_pool(values: Tensor) -> Tensor:
        return values.new_zeros(sources, pools).index_add(1, of_expert, values).double()

    rows = by_pool(counts.rows)
    cost = by_pool(counts.cost) / UNIT if counts.cost.numel() else rows
    rank = of_expert.new_zeros(pools).scatter(0, of_expert, constants.rank_of_expert)  # [P]
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
    total = gamma.new_zeros(sources, constants.ranks).index_add(1, rank, rows)
    return torch.where(total <= bound, torch.inf, by_rank)[:, rank]
