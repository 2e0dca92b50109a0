"""Admission by searching: exactly its twin in ``macs.routing``, which sorts.

What a pool admits is all that comes before one order, the first that does not fit. One program a pool finds
it: of the orders in which it may lie, the cost is summed by so many even steps, and the first step at which
the running sum passes what is left of the capacity is searched next. Each pass divides what is left of
the range by ``BINS``, from the lowest to the highest order of the pool on; pools with room for all make
none. Integers all along.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..routing import Queue, order_bits
from .shared import power_of_2

BINS = 256
"""Steps that the cost is summed by."""
BLOCK = 4096
"""Assignments that a program looks at together."""


def admit(queue: Queue, capacity: Tensor) -> Tensor:
    """One launch."""
    count, pools, device = len(queue.pool), len(capacity), queue.device
    order_bits(queue.places, pools)  # for its error
    admitted = torch.empty(count, dtype=torch.bool, device=device)
    if count:
        histogram = torch.empty(pools, BINS, dtype=torch.int64, device=device)
        tensors = (queue.pool, queue.order, queue.cost, capacity)
        _admit[(pools + 1,)](
            *(one.contiguous() for one in tensors), histogram, admitted, count, pools,
            BINS=BINS, BLOCK=min(BLOCK, max(256, power_of_2(count))), num_warps=8,
        )  # fmt: skip
    return admitted


# Numbers that follow the batch's size are no part of what is compiled: one form serves every size.
@triton.jit(do_not_specialize=["count"])
def _admit(
    pool, order, cost, capacity, histogram, admitted, count, pools, BINS: tl.constexpr, BLOCK: tl.constexpr
):
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
        total += tl.sum(tl.load(cost + item, mask=takes, other=0), 0)
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
                price = tl.load(cost + item, mask=takes, other=0)
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
