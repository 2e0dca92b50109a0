"""Admission: which assignments stay at the expert that the router chose.

Shapes: T tokens, m assignments of a token, S sources, P pools, Q = S P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .capacity import UNBOUNDED
from .contracts import Capacities, Demand, LayerConstants, Placement
from .demand import key_bits, tie_count
from .kernels.dispatch import kernels_enabled


def admit(demand: Demand, capacities: Capacities, constants: LayerConstants) -> Placement:
    """Admit the ``longest_prefix`` of each pool, then of each rank where its rows have a separate bound.

    Exempt tokens come first and are admitted even where they do not fit.

    Args:
        demand: the assignments in their order.
        capacities: of pools and ranks.
        constants: pool and rank of each expert.

    Returns:
        Placed experts and remaining capacities.
    """
    if kernels_enabled(demand.device):
        from .kernels import admission as kernels

        return kernels.admit(demand, capacities, constants)
    experts, exempt = demand.routing.experts, demand.tokens.exempt[:, None]
    admitted, bounded = demand.planned, []
    for limit in limits_of(demand, capacities.pools, capacities.rows, constants):
        pool = pools_of(experts, admitted, limit.of_expert, demand.tokens.source, limit.capacity)
        queue = Queue(pool, demand.admission_key, limit.cost, tie_count(demand.routing))
        admitted = admitted & (longest_prefix(queue, limit.capacity.flatten()) | exempt)
        bounded.append((limit, pool))
    placed = experts.masked_fill(demand.planned & ~admitted, -1)
    remaining = [subtract_load(limit.capacity, pool, admitted, limit.cost) for limit, pool in bounded]
    return Placement(placed, remaining[0], remaining[1] if len(remaining) > 1 else None)


@dataclass(frozen=True)
class PoolLimit:
    """of_expert int64 [E]: pool of each expert in 0..P-1; capacity int64 [S, P]; cost int64 [T] of one
    assignment of each token."""

    of_expert: Tensor
    capacity: Tensor
    cost: Tensor


def limits_of(
    demand: Demand, pools: Tensor, rows: Tensor | None, constants: LayerConstants
) -> list[PoolLimit]:
    """The limits an assignment has to fit: its pool's and, if there is one, that on its rank's rows."""
    limits = [PoolLimit(constants.pool_of_expert, pools, demand.cost)]
    if rows is not None:
        limits.append(PoolLimit(constants.rank_of_expert, rows, torch.ones_like(demand.weight)))
    return limits


def pools_of(
    experts: Tensor, included: Tensor, of_expert: Tensor, source: Tensor, capacity: Tensor
) -> Tensor:
    """Pool of each expert in experts [T, m], int64 in 0..Q-1; Q where it is not ``included``."""
    pool = of_expert[experts]  # -1 reads the last expert, and is not included
    if capacity.shape[0] > 1:
        pool = pool + source[:, None] * capacity.shape[1]
    return pool.masked_fill(~included, capacity.numel())


@dataclass(frozen=True)
class Queue:
    """Assignments that ask for admission: pool int64 [T, m] in 0..Q (Q: not included), key int64 [T, m]
    (``demand.admission_key``), cost int64 [T] > 0, ties: number of tie-breaks in the key."""

    pool: Tensor
    key: Tensor
    cost: Tensor
    ties: int


def longest_prefix(queue: Queue, capacity: Tensor) -> Tensor:
    """The longest prefix of every pool, by ascending key, whose cost fits its capacity.

    capacity int64 [Q] -> bool [T, m], True for what is not included: one sort and one segmented sum.
    """
    bits, pools = key_bits(queue.ties, len(capacity)), len(capacity) + 1
    pool = queue.pool.flatten()
    order = ((pool << bits) | queue.key.flatten()).argsort()
    pool, cost = pool[order], queue.cost[:, None].expand(queue.pool.shape).flatten()[order]
    load = load_of(pool, cost, pools)
    # Costs are positive, so the running sum of a pool rises, and what fits is a prefix.
    running = cost.cumsum(0) - (load.cumsum(0) - load)[pool]
    fits = running <= torch.cat([capacity, capacity.new_full((1,), UNBOUNDED)])[pool]
    return torch.empty_like(fits).scatter_(0, order, fits).view(queue.pool.shape)


def load_of(pool: Tensor, cost: Tensor, pools: int) -> Tensor:
    """Summed cost of each pool: pool int64 [N], cost int64 [N] -> int64 [pools]."""
    return pool.new_zeros(pools).scatter_add_(0, pool, cost)


def subtract_load(capacity: Tensor, pool: Tensor, taken: Tensor, cost: Tensor) -> Tensor:
    """Capacity int64 [S, P] less the cost int64 [T] of the assignments taken bool [T, m] from pool [T, m]."""
    load = load_of(pool.flatten(), (taken * cost[:, None]).flatten(), capacity.numel() + 1)
    return capacity - load[:-1].view(capacity.shape)
