"""Admission: who gets a place at the expert that the router chose.

Shapes: T tokens, m assignments of a token that are looked at, S sources, P pools, Q = S P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .capacity import UNBOUNDED
from .contracts import Constants, Demand, Placement, Room
from .demand import order_bits, places_of
from .kernels.dispatch import fused, indices_of

BINS = 256
"""Steps of the order that costs are summed by before anything is sorted."""


@fused
def admit(demand: Demand, room: Room, constants: Constants) -> Placement:
    """Each pool's ``longest_prefix``, then, where rows have a bound of their own, each rank's.

    Exempt tokens come first, and are admitted also where they do not fit.
    """
    experts, spared = demand.choice.experts, demand.tokens.exempt[:, None]
    kept, left = demand.planned, []
    for bound in bounds_of(demand, room.pools, room.rows, constants):
        pool = pools_of(experts, kept, bound.of_expert, demand.tokens.source, bound.room)
        queue = Queue(pool, demand.order, bound.cost, places_of(demand.choice))
        fits = longest_prefix(queue, bound.room.flatten())
        kept = kept & (fits | spared)
        left.append((bound, pool))
    placed = experts.masked_fill(demand.planned & ~kept, -1)
    rooms = [subtract_load(bound.room, pool, kept, bound.cost) for bound, pool in left]
    return Placement(placed, rooms[0], rooms[1] if len(rooms) > 1 else None)


@dataclass(frozen=True)
class Bound:
    """What is bounded: pools of experts, of_expert int64 [E] in 0..P-1, by room int64 [S, P], each assignment
    taking its token's cost int64 [T]."""

    of_expert: Tensor
    room: Tensor
    cost: Tensor


def bounds_of(demand: Demand, pools: Tensor, rows: Tensor | None, constants: Constants) -> list[Bound]:
    """The bounds that an assignment has to fit: its pool's and, if there is one, that on its rank's rows."""
    found = [Bound(constants.pool_of_expert, pools, demand.cost)]
    if rows is not None:
        found.append(Bound(constants.rank_of_expert, rows, torch.ones_like(demand.weight)))
    return found


def pools_of(experts: Tensor, takes_part: Tensor, of_expert: Tensor, source: Tensor, room: Tensor) -> Tensor:
    """The pool of room [S, P] that each expert in experts [T, m] is in, int64; Q where it takes no part."""
    pool = of_expert[experts]  # -1, no expert, is the last one, which takes no part
    if room.shape[0] > 1:
        pool = pool + source[:, None] * room.shape[1]
    return pool.masked_fill(~takes_part, room.numel())


@dataclass(frozen=True)
class Queue:
    """Assignments that wait for admission.

    pool int64 [T, m] in 0..Q (Q: takes no part), order int64 [T, m] (``demand.order_of``, different for all
    that take part), cost int64 [T] > 0, of each; places: as of the order.
    """

    pool: Tensor
    order: Tensor
    cost: Tensor
    places: int


def longest_prefix(queue: Queue, capacity: Tensor) -> Tensor:
    """The longest prefix of every pool, in ascending order, whose cost fits its capacity.

    capacity int64 [Q] -> bool [T, m]; True for what takes no part. Costs are summed by ``BINS`` steps of the
    order first: bins that fit as a whole are admitted, and only those who share the bin in which a pool's
    capacity ends are sorted.
    """
    bits, pools = order_bits(queue.places, len(capacity)), len(capacity) + 1
    if not queue.pool.numel():
        return torch.ones_like(queue.pool, dtype=torch.bool)
    pool, order = queue.pool.flatten(), queue.order.flatten()
    cost = queue.cost[:, None].expand(queue.pool.shape).flatten()
    low, high = order.aminmax()
    # Rounded or not, a later order is in no earlier bin.
    bin_ = ((order - low).double() * (BINS / (high - low + 1).double())).long().clamp_(max=BINS - 1)
    load = load_of(pool * BINS + bin_, cost, pools * BINS).view(pools, BINS)
    limit = torch.cat([capacity, capacity.new_full((1,), UNBOUNDED)])
    whole = load.cumsum(1) <= limit[:, None]
    last = whole.sum(1)[pool]
    fits, split = bin_ < last, bin_ == last
    left = limit - (load * whole).sum(1)
    index = indices_of(split)  # [M]
    index = index[((pool[index] << bits) | order[index]).sort().indices]
    pool, cost, split = pool[index], (cost * split)[index], split[index]
    load = load_of(pool, cost, pools)
    # Costs are positive, so the running sum rises and what fits is a prefix by itself.
    running = cost.cumsum(0) - (load.cumsum(0) - load)[pool]
    fits[index] |= split & (running <= left[pool])
    return fits.view(queue.pool.shape)


def load_of(pool: Tensor, cost: Tensor, pools: int) -> Tensor:
    """What each of so many pools is asked for: pool int64 [N], cost int64 [N] -> int64 [pools]."""
    return pool.new_zeros(pools).scatter_add_(0, pool, cost)


def subtract_load(room: Tensor, pool: Tensor, taken: Tensor, cost: Tensor) -> Tensor:
    """Room int64 [S, P] less the cost int64 [T] of what is taken, bool [T, m], from pool int64 [T, m]."""
    load = load_of(pool.flatten(), (taken * cost[:, None]).flatten(), room.numel() + 1)
    return room - load[:-1].view(room.shape)
