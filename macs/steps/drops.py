"""The bound on drops: re-admits dropped assignments where more combine weight is lost than allowed.

Shapes: T tokens, k' assignments of a token, S sources.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .admission import limits_of, pools_of, subtract_load
from .contracts import Demand, LayerConstants, Placement
from .demand import key_bits, tie_count
from .fixed_point import MASS_UNIT, to_fixed
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
    if kernels_enabled(demand.device):
        from .kernels import drops as kernels

        return kernels.limit_drops(demand, placement, constants, max_drop)
    sources, top_k = placement.remaining.shape[0], demand.routing.top_k
    mass = torch.where(demand.planned[:, :top_k], to_fixed(demand.routing.weights[:, :top_k], MASS_UNIT), 0)
    mass = functional.pad(mass, (0, placement.experts.shape[1] - top_k))
    dropped = demand.planned & (placement.experts < 0) & (mass > 0)
    experts, source = demand.routing.experts, demand.tokens.source
    by_token = source[:, None].expand_as(dropped)

    def by_source(chosen: Tensor) -> Tensor:
        flat = torch.where(chosen, mass, 0).flatten()
        return flat.new_zeros(sources).scatter_add(0, by_token.flatten(), flat)

    excess = by_source(dropped) - (by_source(demand.planned).double() * max_drop).floor().long()
    # Re-admitted: every assignment before which the mass re-admitted is still short of the excess.
    pool = torch.where(dropped, by_token, sources).flatten()
    bits = key_bits(tie_count(demand.routing), sources)
    order = torch.sort((pool << bits) | demand.admission_key.flatten()).indices
    sorted_pool, sorted_mass = pool[order], mass.flatten()[order]
    load = mass.new_zeros(sources + 1).scatter_add(0, pool, mass.flatten())
    start = load.cumsum(0) - load
    before = sorted_mass.cumsum(0) - sorted_mass - start[sorted_pool]
    short = before < torch.cat([excess, excess.new_full((1,), -1)])[sorted_pool]
    back = torch.empty_like(short).scatter_(0, order, short).view(dropped.shape) & dropped
    remaining = [
        subtract_load(
            limit.capacity, pools_of(experts, back, limit.of_expert, source, limit.capacity), back, limit.cost
        )
        for limit in limits_of(demand, placement.remaining, placement.remaining_rows, constants)
    ]
    placed = torch.where(back, experts, placement.experts)
    rows = remaining[1] if len(remaining) > 1 else None
    return Placement(placed, remaining[0], rows, placement.moved)
