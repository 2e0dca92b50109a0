"""Admission by searching; the reference implementation in ``macs.routing`` sorts.

What a pool admits is all that comes before one order, the first that does not fit. One program a pool finds
it: of the orders in which it may lie, the cost is summed by so many even steps, and the first step at which
the running sum passes what is left of the capacity is searched next. Each pass divides what is left of
the range by ``BINS``, from the lowest to the highest order of the pool on; a pool with
room for all is not searched. Integers all along, so that both are equal.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..routing import Demand, Placement, Queue, order_bits, take
from .shared import assignments, power_of_2

BINS = 256
"""Steps that the cost is summed by."""
BLOCK = 4096
"""Assignments that a program looks at together."""
TILE = 1024
"""The same, where every program has some of its own."""


def place_admitted(demand: Demand, start: Placement) -> Placement:
    """Three launches, two more for the room that is left, and three more where rows are bounded."""
    count, slots = demand.experts.shape
    bounds = [(demand.pool_of_expert, start.room, demand.cost)]
    if start.row_room is not None:
        bounds.append((demand.rank_of_expert, start.row_room, torch.ones_like(demand.cost)))
    if not count:
        return start
    columns = power_of_2(slots)
    block = max(1, TILE // columns)
    grid = (triton.cdiv(count, block),)
    experts, planned = demand.experts.contiguous(), demand.planned.contiguous()
    source, exempt = demand.tokens.source.contiguous(), demand.tokens.exempt.contiguous()
    kept, placed, taken = planned, experts, experts
    for of_expert, room, cost in bounds:
        pool = torch.empty(count, slots, dtype=torch.int64, device=demand.device)
        _pools[grid](
            experts, kept, source, of_expert, pool, count, slots, room.shape[1], room.numel(),
            TOKENS=block, K=columns,
        )  # fmt: skip
        fits = admit(Queue(pool, demand.order, cost, demand.places), room.flatten())
        before, kept = kept, torch.empty(count, slots, dtype=torch.bool, device=demand.device)
        placed, taken = (torch.empty_like(experts) for _ in range(2))
        _place[grid](
            experts, planned, before, fits, exempt, kept, placed, taken, count, slots,
            TOKENS=block, K=columns,
        )  # fmt: skip
    return take(demand, replace(start, experts=placed), taken)


@triton.jit(do_not_specialize=["count"])
def _pools(
    experts, part, source, of_expert, pool, count, slots, pools, none, TOKENS: tl.constexpr, K: tl.constexpr
):
    """The pool of every assignment that takes part."""
    token, cell, here = assignments(count, slots, TOKENS, K)
    takes = here & tl.load(part + cell, mask=here, other=0).to(tl.int1)
    expert = tl.load(experts + cell, mask=takes, other=0)
    of = tl.load(source + token, mask=token < count, other=0)
    mine = of[:, None] * pools + tl.load(of_expert + expert, mask=takes, other=0)
    tl.store(pool + cell, tl.where(takes, mine, none), mask=here)


@triton.jit(do_not_specialize=["count"])
def _place(
    experts, planned, part, fits, exempt, kept, placed, taken, count, slots,
    TOKENS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Who is kept, where assignments stand, and the experts that were taken (-1: none)."""
    token, cell, here = assignments(count, slots, TOKENS, K)
    spared = tl.load(exempt + token, mask=token < count, other=0).to(tl.int1)
    stays = tl.load(fits + cell, mask=here, other=0).to(tl.int1) | spared[:, None]
    stays = stays & tl.load(part + cell, mask=here, other=0).to(tl.int1)
    expert = tl.load(experts + cell, mask=here, other=-1)
    asks = tl.load(planned + cell, mask=here, other=0).to(tl.int1)
    tl.store(kept + cell, stays, mask=here)
    tl.store(placed + cell, tl.where(asks & ~stays, -1, expert), mask=here)
    tl.store(taken + cell, tl.where(stays, expert, -1), mask=here)


def admit(queue: Queue, capacity: Tensor) -> Tensor:
    """One launch."""
    count, pools, device = queue.pool.numel(), len(capacity), queue.device
    order_bits(queue.places, pools)  # for its error
    admitted = torch.empty(queue.pool.shape, dtype=torch.bool, device=device)
    if count:
        histogram = torch.empty(pools, BINS, dtype=torch.int64, device=device)
        tensors = (queue.pool, queue.order, queue.cost, capacity)
        _admit[(pools + 1,)](
            *(one.contiguous() for one in tensors), histogram, admitted, count, pools,
            WIDTH=queue.pool.shape[1], BINS=BINS, BLOCK=min(BLOCK, max(256, power_of_2(count))), num_warps=8,
        )  # fmt: skip
    return admitted


# Numbers that follow the batch's size are no part of what is compiled: one form serves every size.
@triton.jit(do_not_specialize=["count"])
def _admit(
    pool, order, cost, capacity, histogram, admitted, count, pools,
    WIDTH: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pool's; the program after the last admits what takes no part."""
    LAST: tl.constexpr = 9223372036854775807
    mine = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    low, high = tl.full((), LAST, tl.int64), tl.full((), -1, tl.int64)
    total = tl.zeros((), tl.int64)
    for start in range(0, count, BLOCK):
        item = start + place
        takes = tl.load(pool + item, mask=item < count, other=-1) == mine
        own = tl.load(order + item, mask=takes, other=0)
        total += tl.sum(tl.load(cost + item // WIDTH, mask=takes, other=0), 0)
        low = tl.minimum(low, tl.min(tl.where(takes, own, LAST), 0))
        high = tl.maximum(high, tl.max(tl.where(takes, own, -1), 0))
    left = tl.load(capacity + mine, mask=mine < pools, other=LAST)
    limit = high + 1
    if total > left:
        bin_of = tl.arange(0, BINS)
        row = histogram + mine * BINS + bin_of
        while low < high:
            shift = tl.zeros((), tl.int64)
            while ((high - low) >> shift) >= BINS:
                shift += 1
            tl.store(row, tl.zeros([BINS], tl.int64))
            tl.debug_barrier()
            for start in range(0, count, BLOCK):
                item = start + place
                takes = tl.load(pool + item, mask=item < count, other=-1) == mine
                own = tl.load(order + item, mask=takes, other=-1)
                takes = takes & (own >= low) & (own <= high)
                price = tl.load(cost + item // WIDTH, mask=takes, other=0)
                step = tl.where(takes, (own - low) >> shift, 0)
                tl.atomic_add(histogram + mine * BINS + step, price, mask=takes, sem="relaxed")
            tl.debug_barrier()
            asked = tl.load(row, volatile=True)
            fits = tl.cumsum(asked, 0) <= left
            tl.debug_barrier()
            left -= tl.sum(tl.where(fits, asked, 0), 0)
            low += tl.sum(fits.to(tl.int64), 0) << shift
            high = tl.minimum(high, low + (1 << shift) - 1)
        limit = low
    for start in range(0, count, BLOCK):
        item = start + place
        takes = tl.load(pool + item, mask=item < count, other=-1) == mine
        own = tl.load(order + item, mask=takes, other=0)
        tl.store(admitted + item, own < limit, mask=takes)
