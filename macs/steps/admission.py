"""Admission: which assignments stay at the expert that the router chose.

Shapes: T tokens, m assignments of a token, S sources, P pools, Q = S P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contracts import Capacities, Demand, LayerConstants, Placement
from .demand import key_bits, tie_count
from .kernels.dispatch import kernels_enabled


def admit(demand: Demand, capacities: Capacities, constants: LayerConstants) -> Placement:
    """Admit the longest prefix of each pool, by key, whose cost fits; then of each rank where its rows have a
    separate bound.

    Exempt tokens come first and are admitted even where they do not fit.

    Args:
        demand: the assignments in their order.
        capacities: of pools and ranks.
        constants: pool and rank of each expert.

    Returns:
        Placed experts and remaining capacities.
    """
    if kernels_enabled(demand.weight.device):
        from .kernels import admission as kernels

        return kernels.admit(demand, capacities, constants)
    experts, tokens = demand.routing.experts, demand.tokens
    limits = limits_of(demand.cost, capacities.pools, capacities.rows, constants)
    key, ties = demand.admission_key, tie_count(demand.routing)
    admitted, left = fill(limits, experts, demand.planned, tokens.source, key, ties, tokens.exempt[:, None])
    return Placement(experts.masked_fill(demand.planned ^ admitted, -1), *left)


@dataclass(frozen=True)
class PoolLimit:
    """of_expert int64 [E]: pool of each expert in 0..P-1; capacity int64 [S, P]; cost int64 [T, 1] of one
    assignment of each token."""

    of_expert: Tensor
    capacity: Tensor
    cost: Tensor

    def pools_of(self, experts: Tensor, included: Tensor, source: Tensor) -> Tensor:
        """Pool of each expert in experts [T, m], int64 in 0..Q-1; Q where it is not ``included``."""
        pool = self.of_expert[experts]  # -1 reads the last expert, and is not included
        if len(self.capacity) > 1:
            pool = torch.add(pool, source[:, None], alpha=self.capacity.shape[1])
        return pool.where(included, self.capacity.numel())

    def less(self, pool: Tensor, taken: Tensor) -> Tensor:
        """Capacity less the cost of the assignments taken bool [T, m] from pool [T, m]."""
        load = pool.new_zeros(self.capacity.numel() + 1)
        load.scatter_add_(0, pool.flatten(), (taken * self.cost).flatten())
        return self.capacity - load[:-1].view(self.capacity.shape)


def limits_of(cost: Tensor, pools: Tensor, rows: Tensor | None, constants: LayerConstants) -> list[PoolLimit]:
    """The limits an assignment has to fit: its pool's and, if there is one, that on its rank's rows."""
    limits = [PoolLimit(constants.pool_of_expert, pools, cost)]
    if rows is not None:
        limits.append(PoolLimit(constants.rank_of_expert, rows, torch.ones_like(cost)))
    return limits


def fill(
    limits: list[PoolLimit], experts: Tensor, asks: Tensor, source: Tensor, key: Tensor, ties: int,
    exempt: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Which of the assignments that ask fit every limit, bool [T, m], and what is left of the limits."""
    fits, pools = asks, []
    for limit in limits:
        pool, capacity = limit.pools_of(experts, fits, source), limit.capacity.flatten()
        before = cost_before(pool, key, limit.cost, len(capacity), ties)
        # A prefix of each pool, for costs are positive.
        first = before + limit.cost <= capacity[pool.clamp(max=len(capacity) - 1)]
        fits = fits & (first if exempt is None else first | exempt)
        pools.append(pool)
    return fits, [limit.less(pool, fits) for limit, pool in zip(limits, pools, strict=True)]


def cost_before(pool: Tensor, key: Tensor, cost: Tensor, pools: int, ties: int) -> Tensor:
    """Cost of what comes before each assignment in its pool, by ascending key.

    Args:
        pool: int64 [T, m] in 0..Q; Q: not included.
        key: int64 [T, m], with so many ``ties``.
        cost: int64 [T, m] or [T, 1].
        pools: Q.
        ties: as ``tie_count`` has them.

    Returns:
        int64 [T, m], anything for what is not included. One sort and one segmented sum.
    """
    order = torch.add(key, pool, alpha=1 << key_bits(ties, pools)).flatten().argsort()
    cost, sorted_pool = cost.expand(pool.shape).flatten()[order], pool.flatten()[order]
    load = pool.new_zeros(pools + 1).scatter_add_(0, sorted_pool, cost)
    before = cost.cumsum(0) - cost - (load.cumsum(0) - load)[sorted_pool]
    return torch.empty_like(before).scatter_(0, order, before).view(pool.shape)
