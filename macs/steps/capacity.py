"""Capacities: what each expert or rank may take from each source.

A source with rows to spare at a rank lends them to sources that are over their bound there. Otherwise a
source would drop rows although the rank is within ``target_load`` over all sources, as where one source has
pictures and another has text. Below a target of 1 nothing is lent: every source keeps to its own bound.

Shapes: S source ranks, E experts, R ranks, P pools (experts or ranks). Loads and capacities are int64 in
fixed point (``UNIT`` is one token).
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from .contracts import UNIT, Capacities, CapacityRule, Counts, LayerConstants
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
    if kernels_enabled(counts.rows.device):
        from .kernels import capacity as kernels

        return kernels.measure_capacities(counts, constants, rule, top_k, group)
    active, rows = counts.tokens >= constants.min_tokens, None
    bounded = rule.capacity_factor is None
    if bounded and group is not None:
        rows = shared_bound(counts, constants, group, top_k)
    elif bounded:
        rows = row_bound(counts.tokens, constants, top_k)

    def of_active(capacity: Tensor) -> Tensor:
        return capacity.where(active[:, None], UNBOUNDED)

    if rows is not None and rule.rows_only:
        return Capacities(of_active(rows * UNIT), None, active, True)
    pools = of_active(pool_capacity(counts, constants, rule, top_k, rows))
    return Capacities(pools, None if rows is None else of_active(rows), active, bounded)


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


def row_bound(tokens: Tensor, constants: LayerConstants, top_k: int) -> Tensor:
    """Rows that a source may send to a rank by itself, floor(target T k / R): int64 [S, R].

    tokens int64 [S]: valid tokens of each source. With a target of 1 or more it covers the even share
    T k / R rounded up, so that an even routing loses nothing.
    """
    bound = own_bound(tokens, constants, top_k)
    even = (tokens * top_k + (constants.ranks - 1)) // constants.ranks
    return torch.where(constants.target_load >= 1, torch.maximum(bound, even[:, None]), bound)


def own_bound(tokens: Tensor, constants: LayerConstants, top_k: int) -> Tensor:
    """``row_bound`` before rounding up: a source's part of the group's bound, int64 [S, R]."""
    even = (tokens * top_k).double() / constants.ranks
    return (even * constants.target_load).floor().long()[:, None].expand(-1, constants.ranks)


class GroupField(IntEnum):
    """Rows of ``group_rows``, each a sum over the sources that plan."""

    ROWS = 0  # assignments to the rank
    OVER = 1  # those beyond the sources' own bounds
    UNDER = 2  # rows that the sources' own bounds leave
    TOKENS = 3  # valid tokens, the same for every rank


def group_rows(counts: Counts, constants: LayerConstants, top_k: int) -> Tensor:
    """Sums over this process's sources, ``GroupField`` by rank, to be summed over the group.

    Args:
        counts: tokens by source, rows by source and expert.
        constants: ``target_load``, and the rank of each expert.
        top_k: k.

    Returns:
        int64 [4, R]; a source that does not plan is not in it.
    """
    if kernels_enabled(counts.rows.device):
        from .kernels import capacity as kernels

        return kernels.group_rows(counts, constants, top_k)
    active = (counts.tokens >= constants.min_tokens).long()[:, None]
    rows = rows_of_ranks(counts, constants)
    left = own_bound(counts.tokens, constants, top_k) - rows
    tokens = counts.tokens[:, None].expand_as(rows)
    each = torch.stack([rows, (-left).clamp(min=0), left.clamp(min=0), tokens])
    return (each * active).sum(1)


def rows_of_ranks(counts: Counts, constants: LayerConstants) -> Tensor:
    """Assignments of each source to each rank, int64 [S, R]."""
    rows = counts.rows
    return rows.new_zeros(len(rows), constants.ranks).index_add_(1, constants.rank_of_expert, rows)


def shared_bound(counts: Counts, constants: LayerConstants, group: Tensor, top_k: int) -> Tensor:
    """Rows of each source at each rank, int64 [S, R], under the group's bound; for a target below 1, the
    source's own.

    group int64 [4, R]: ``group_rows`` of all sources. The group's bound is the ``row_bound`` of all their
    tokens. What it leaves is divided among the sources that are over, in proportion, rounded down; and taken
    from those that are under, in proportion, rounded up. So a rank within the group's bound drops nothing,
    and the sources together stay within it, or within the sum of their own bounds where rounding makes that
    one row more.
    """
    own = own_bound(counts.tokens, constants, top_k)
    left = own - rows_of_ranks(counts, constants)
    rows, over, under, tokens = group.unbind()
    whole = row_bound(tokens[:1], constants, top_k)[0]
    spare = torch.maximum(whole + over - rows, under)
    borrowed = torch.minimum(-left, -left * spare // over.clamp(min=1))
    lent = (left * torch.minimum(over, under) + under - 1) // under.clamp(min=1)
    shared = own + torch.where(left < 0, borrowed, -lent.clamp(min=0))
    return torch.where(constants.target_load >= 1, shared, own)
