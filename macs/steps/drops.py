"""The bound on drops: re-admits dropped assignments where more combine weight is lost than allowed.

Shapes: T tokens, k' assignments of a token, S sources.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .admission import cost_before, limits_of
from .contracts import MASS_UNIT, Demand, LayerConstants, Placement, to_fixed
from .demand import tie_count
from .kernels.dispatch import kernels_enabled


def limit_drops(
    demand: Demand, placement: Placement, constants: LayerConstants, max_drop: float
) -> Placement:
    """Re-admit the best dropped assignments, to their own experts, until few enough are dropped.

    For each source: the fewest of the dropped, in priority order, so that the rest holds at most
    ``max_drop`` of its combine weight. This bound takes precedence over ``target_load``.

    Args:
        demand: the assignments in their order.
        placement: what is placed so far.
        constants: pools and ranks of the experts.
        max_drop: largest share of combine weight that may be dropped, 0..1.

    Returns:
        The placement; remaining capacities may be below 0.
    """
    if kernels_enabled(demand.weight.device):
        from .kernels import drops as kernels

        return kernels.limit_drops(demand, placement, constants, max_drop)
    sources, top_k = placement.remaining.shape[0], demand.routing.top_k
    mass = torch.where(demand.planned[:, :top_k], to_fixed(demand.routing.weights[:, :top_k], MASS_UNIT), 0)
    mass = functional.pad(mass, (0, placement.experts.shape[1] - top_k))
    dropped = demand.planned & (placement.experts < 0) & (mass > 0)
    experts, source = demand.routing.experts, demand.tokens.source

    def by_source(chosen: Tensor) -> Tensor:
        return mass.new_zeros(sources).index_add(0, source, (chosen * mass).sum(1))

    excess = by_source(dropped) - (by_source(demand.planned).double() * max_drop).floor().long()
    # Re-admitted: every assignment before which the mass re-admitted is still short of the excess.
    pool, ties = torch.where(dropped, source[:, None], sources), tie_count(demand.routing)
    back = dropped & (cost_before(pool, demand.admission_key, mass, sources, ties) < excess[source, None])
    left = [
        limit.less(limit.pools_of(experts, back, source), back)
        for limit in limits_of(demand.cost, placement.remaining, placement.remaining_rows, constants)
    ]
    return Placement(torch.where(back, experts, placement.experts), *left, moved=placement.moved)
