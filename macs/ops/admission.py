"""Admission by counting: exactly its twin in ``macs.routing``, which sorts.

What a pool admits is all that comes before one key, the first that does not fit. That key is found digit
by digit: of the assignments that share the digits found so far, the cost is summed by the next digit, and
the first digit at which the running sum passes what is left of the capacity is the key's. A few passes
over the assignments, four for a rank's usual tokens and pools, and integers all along.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..routing import Queue, order_bits

BLOCK = 512
"""Assignments of one program."""


def admit(queue: Queue, capacity: Tensor) -> Tensor:
    """Two launches a digit, and one to compare."""
    count, pools, device = len(queue.pool), len(capacity), queue.device
    admitted = torch.empty(count, dtype=torch.bool, device=device)
    if not count:
        return admitted
    # Histograms of a megabyte at most: all of it stays in cache.
    digit = min(11, max(4, 17 - pools.bit_length()))
    steps = triton.cdiv(order_bits(queue.places, pools), digit)
    tensors = tuple(one.contiguous() for one in (queue.pool, queue.order, queue.cost))
    room = capacity.clone(memory_format=torch.contiguous_format)
    found = torch.zeros(pools, dtype=torch.int64, device=device)
    histogram = torch.zeros(pools, 1 << digit, dtype=torch.int64, device=device)
    grid = (triton.cdiv(count, BLOCK),)
    form = {"BLOCK": BLOCK}
    for step in reversed(range(steps)):
        _count[grid](*tensors, found, histogram, count, pools, step * digit, DIGIT=digit, **form)
        _narrow[(pools,)](found, room, histogram, DIGIT=digit)
    _compare[grid](*tensors[:2], found, admitted, count, pools, **form)
    return admitted


# Numbers that follow the batch's size are no part of what is compiled: one form serves every size.
@triton.jit(do_not_specialize=["count", "left"])
def _count(
    pool, order, cost, found, histogram, count, pools, left, DIGIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cost by pool and next digit, of the assignments whose digits so far are those found."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = token < count
    of = tl.load(pool + token, mask=here, other=0)
    takes = here & (of < pools)
    key = tl.load(order + token, mask=takes, other=0) >> left
    takes = takes & ((key >> DIGIT) == tl.load(found + of, mask=takes, other=-1))
    price = tl.load(cost + token, mask=takes, other=0)
    cell = (of << DIGIT) + (key & ((1 << DIGIT) - 1))
    tl.atomic_add(histogram + cell, price, mask=takes, sem="relaxed")


@triton.jit
def _narrow(found, room, histogram, DIGIT: tl.constexpr):
    """The next digit of a pool's key, the room left before it, and an empty histogram again.

    Where everything fits the digit is one past the last, which no assignment has, then or later.
    """
    pool = tl.program_id(0)
    digit = tl.arange(0, 1 << DIGIT)
    row = histogram + (pool << DIGIT) + digit
    cost = tl.load(row)
    left = tl.load(room + pool)
    fits = tl.cumsum(cost, 0) <= left
    tl.store(found + pool, (tl.load(found + pool) << DIGIT) + tl.sum(fits.to(tl.int64), 0))
    tl.store(room + pool, left - tl.sum(tl.where(fits, cost, 0), 0))
    tl.store(row, tl.zeros([1 << DIGIT], tl.int64))


@triton.jit(do_not_specialize=["count"])
def _compare(pool, order, found, admitted, count, pools, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = token < count
    of = tl.load(pool + token, mask=here, other=0)
    takes = here & (of < pools)
    limit = tl.load(found + of, mask=takes, other=0)
    fits = ~takes | (tl.load(order + token, mask=takes, other=0) < limit)
    tl.store(admitted + token, fits, mask=here)
