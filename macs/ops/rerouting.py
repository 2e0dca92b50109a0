"""Kernels of rerouting; reference implementation: ``macs.routing``, equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fixed_point import PRIORITY_BITS, UNIT
from .order import RULES, _priority
from .shared import power_of_2

if TYPE_CHECKING:
    from ..routing import Demand, Placement

TILE = 2048
"""Scores that one program looks at together."""
SETTLED = 512
"""Proposals of one program."""


def reroute(demand: Demand, placement: Placement, affinity: Tensor, rounds: int, rule: str) -> Placement:
    """A round is three launches: what tokens ask for, who of them is admitted, and what that changes; with a
    bound on rows a few more."""
    from ..routing import EXEMPT_PRIORITY, Placement, Queue, admit, place_bits

    count, k = placement.experts.shape
    source, num_experts, places = demand.tokens.source, demand.scores.shape[1], len(placement.experts)
    dense = torch.contiguous_format
    placed, room = placement.experts.clone(memory_format=dense), placement.room.clone(memory_format=dense)
    row_room = None if placement.row_room is None else placement.row_room.clone(memory_format=dense)
    if not count:
        return Placement(placed, room, row_room)
    queue = torch.empty_like(demand.order, memory_format=torch.contiguous_format)
    bounded = row_room is not None
    rows = room if row_room is None else row_room
    # Each by itself: slices of one would begin where memory is not aligned, and be compiled for that too.
    expert, column, order, pool, row_pool = (
        torch.empty(count, 1, dtype=torch.int64, device=queue.device) for _ in range(5)
    )
    width = power_of_2(num_experts)
    tokens = max(1, TILE // width)
    read = tuple(
        one.contiguous()
        for one in (
            demand.experts, demand.scores, affinity, source, demand.tokens.position, demand.cost,
            demand.weight, demand.pool_of_expert, demand.rank_of_expert, demand.order, demand.planned,
        )
    )  # fmt: skip
    cost, one_row = demand.cost.contiguous(), torch.ones_like(demand.cost) if bounded else demand.cost
    for turn in range(rounds):
        _propose[(triton.cdiv(count, tokens),)](
            *read, placed, queue, room, rows, expert, column, order, pool, row_pool,
            count, k, num_experts, room.shape[1], rows.shape[1], room.numel(), rows.numel(),
            place_bits(places), RULE=RULES[rule], FIRST=turn == 0, BOUNDED=bounded, UNIT=UNIT,
            SCALE=1 << PRIORITY_BITS, TOP=EXEMPT_PRIORITY, TOKENS=tokens, K=power_of_2(k), EXPERTS=width,
        )  # fmt: skip
        admitted = admit(Queue(pool, order, cost, places), room.flatten())
        if bounded:
            within = row_pool.masked_fill(~admitted, rows.numel())
            admitted = admitted & admit(Queue(within, order, one_row, places), rows.flatten())
        _settle[(triton.cdiv(count, SETTLED),)](
            expert, column, pool, row_pool, admitted, cost, placed, queue, room, rows, count, k,
            BOUNDED=bounded, TOKENS=SETTLED,
        )  # fmt: skip
    return Placement(placed, room, row_room)


@triton.jit(do_not_specialize=["count"])
def _settle(
    expert, column, pool, row_pool, admitted, cost, placed, queue, room, row_room, count, k,
    BOUNDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Those admitted are placed, and take their room; they, and those who found nothing, wait no more."""
    LAST: tl.constexpr = 9223372036854775807
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = token < count
    best = tl.load(expert + token, mask=here, other=-1)
    cell = token * k + tl.load(column + token, mask=here, other=0)
    fits = here & (best >= 0) & tl.load(admitted + token, mask=here, other=0).to(tl.int1)
    tl.store(placed + cell, best, mask=fits)
    tl.store(queue + cell, tl.full([TOKENS], LAST, tl.int64), mask=here & (fits | (best < 0)))
    price = tl.load(cost + token, mask=fits, other=0)
    tl.atomic_add(room + tl.load(pool + token, mask=fits, other=0), -price, mask=fits, sem="relaxed")
    if BOUNDED:
        one = tl.full([TOKENS], -1, tl.int64)
        tl.atomic_add(row_room + tl.load(row_pool + token, mask=fits, other=0), one, mask=fits, sem="relaxed")


@triton.jit(do_not_specialize=["count", "place_bits"])
def _propose(
    experts, scores, affinity, source, position, cost, weight, pool_of_expert, rank_of_expert,
    orders, planned, placed, queue, room, row_room, out_expert, out_column, out_order, out_pool, out_row_pool,
    count, k, num_experts, pools, ranks, no_pool, no_row_pool, place_bits,
    RULE: tl.constexpr, FIRST: tl.constexpr, BOUNDED: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr,
    TOP: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """What each token asks for: an expert (-1: none), for its assignment in this column, in this order."""
    LAST: tl.constexpr = 9223372036854775807
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = token < count
    slot = tl.arange(0, K)
    cell = token[:, None] * k + slot[None, :]
    real = here[:, None] & (slot < k)[None, :]
    if FIRST:
        nowhere = tl.load(placed + cell, mask=real, other=0) < 0
        nowhere = nowhere & tl.load(planned + cell, mask=real, other=0).to(tl.int1)
        waits = tl.load(orders + cell, mask=real & nowhere, other=LAST)
        tl.store(queue + cell, waits, mask=real)
    else:
        waits = tl.load(queue + cell, mask=real, other=LAST)
    column = tl.argmin(waits, 1)
    asks = here & (tl.min(waits, 1) < LAST)
    home = tl.load(experts + token * k + column, mask=asks, other=0)

    expert = tl.arange(0, EXPERTS)
    known = expert < num_experts
    option = asks[:, None] & known[None, :]
    score = tl.load(scores + token[:, None] * num_experts + expert[None, :], mask=option, other=0.0)
    like = tl.load(affinity + home[:, None] * num_experts + expert[None, :], mask=option, other=0.0)
    value = score * like
    of = tl.load(source + token, mask=asks, other=0)
    price = tl.load(cost + token, mask=asks, other=0)
    pool = tl.load(pool_of_expert + expert, mask=known, other=0)
    spare = tl.load(room + of[:, None] * pools + pool[None, :], mask=option, other=-1)
    open_ = option & (value > 0) & (spare >= price[:, None])
    if BOUNDED:
        rank = tl.load(rank_of_expert + expert, mask=known, other=0)
        open_ = open_ & (tl.load(row_room + of[:, None] * ranks + rank[None, :], mask=option, other=0) >= 1)
    for one in range(k):
        own = tl.load(experts + token * k + one, mask=asks, other=-1)
        now = tl.load(placed + token * k + one, mask=asks, other=-1)
        open_ = open_ & (expert[None, :] != own[:, None]) & (expert[None, :] != now[:, None])
    value = tl.where(open_, value, -1.0)
    best = tl.argmax(value, 1)  # the lowest of equals
    found = tl.max(value, 1) > 0
    told = tl.load(scores + token * num_experts + best, mask=found, other=0.0)
    heavy = tl.load(weight + token, mask=here, other=0)
    priority = tl.where(found, _priority(told, heavy, RULE, UNIT, SCALE), 0)
    place = tl.load(position + token, mask=here, other=0)
    tl.store(out_expert + token, tl.where(found, best, -1).to(tl.int64), mask=here)
    tl.store(out_column + token, column.to(tl.int64), mask=here)
    tl.store(out_order + token, ((TOP - priority) << place_bits) | place, mask=here)
    mine = of * pools + tl.load(pool_of_expert + best, mask=found, other=0)
    tl.store(out_pool + token, tl.where(found, mine, no_pool), mask=here)
    if BOUNDED:
        mine = of * ranks + tl.load(rank_of_expert + best, mask=found, other=0)
        tl.store(out_row_pool + token, tl.where(found, mine, no_row_pool), mask=here)
