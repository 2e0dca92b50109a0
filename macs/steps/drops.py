"""The bound on drops: takes some of the dropped back where more are lost than may be.

Shapes: T tokens, k' assignments of a token, S sources.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .admission import Queue, bounds_of, longest_prefix, pools_of, subtract_load
from .contracts import Constants, Demand, Placement
from .demand import order_bits, places_of
from .fixed_point import MASS_UNIT, to_fixed
from .kernels.dispatch import fused


@fused
def limit_drops(
    demand: Demand, placement: Placement, constants: Constants, max_drop: float, hard: bool
) -> tuple[Placement, Tensor]:
    """Re-admit the best of the dropped, to their own experts, until few enough are dropped.

    For each source: the fewest of the dropped, in priority order, are taken back so that the rest holds at
    most ``max_drop`` of its combine weight. It takes precedence over a target; a ``hard`` bound on rows
    takes precedence over it: what that shuts out stays out. Also returns for which sources more than that
    stays dropped, bool [S].
    """
    sources, top_k = placement.room.shape[0], demand.choice.top_k
    mass = torch.where(demand.planned[:, :top_k], to_fixed(demand.choice.weights[:, :top_k], MASS_UNIT), 0)
    mass = functional.pad(mass, (0, placement.experts.shape[1] - top_k))
    dropped = demand.planned & (placement.experts < 0) & (mass > 0)
    own, source, places = demand.choice.experts, demand.tokens.source, places_of(demand.choice)
    bounds = bounds_of(demand, placement.room, placement.row_room, constants)
    open_ = dropped
    if hard:
        rows = bounds[-1]  # the bound on rows, of its own or as the pools' capacity
        pool = pools_of(own, dropped, rows.of_expert, source, rows.room)
        queue = Queue(pool, demand.order, rows.cost, places)
        open_ = dropped & longest_prefix(queue, rows.room.flatten())
    source = source[:, None].expand_as(dropped)

    def by_source(who: Tensor) -> Tensor:
        flat = torch.where(who, mass, 0).flatten()
        return flat.new_zeros(sources).scatter_add(0, source.flatten(), flat)

    excess = by_source(dropped) - (by_source(demand.planned).double() * max_drop).floor().long()
    # Taken back: everyone before whom the mass taken back is still short of the excess.
    pool = torch.where(open_, source, sources).flatten()
    bits = order_bits(places, sources)
    order = torch.sort((pool << bits) | demand.order.flatten()).indices
    sorted_pool, sorted_mass = pool[order], mass.flatten()[order]
    load = mass.new_zeros(sources + 1).scatter_add(0, pool, mass.flatten())
    start = load.cumsum(0) - load
    before = sorted_mass.cumsum(0) - sorted_mass - start[sorted_pool]
    short = before < torch.cat([excess, excess.new_full((1,), -1)])[sorted_pool]
    back = torch.empty_like(short).scatter_(0, order, short).view(dropped.shape) & open_
    left = [
        subtract_load(
            bound.room, pools_of(own, back, bound.of_expert, source[:, 0], bound.room), back, bound.cost
        )
        for bound in bounds
    ]
    placed = torch.where(back, own, placement.experts)
    return Placement(placed, left[0], left[1] if len(left) > 1 else None), excess > by_source(back)
