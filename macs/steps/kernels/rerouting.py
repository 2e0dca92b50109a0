"""Kernels of rerouting; reference implementation: ``macs.steps.rerouting``, equal."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contracts import Constants, Demand, Placement
from ..demand import EXEMPT_PRIORITY, order_bits, place_bits
from ..fixed_point import PRIORITY_BITS, UNIT
from .admission import ROW, asks, first_out, memory_for, price_in_pools, price_of, searched
from .shared import RULES, power_of_2, priority_of

TILE = 2048
"""Scores that one program looks at together."""


def reroute(demand: Demand, placement: Placement, constants: Constants, rounds: int) -> Placement:
    """A round is two launches: what tokens ask for, and who of them is placed; three where rows have a bound
    of their own. Changes the placement in place."""
    placed, room, rows = placement.experts, placement.room, placement.row_room
    (count, k), num_experts = placed.shape, demand.choice.scores.shape[1]
    if not count:
        return placement
    tokens, terms, device = demand.tokens, demand.terms, demand.device
    sources, pools = room.shape
    order_bits(count, sources * pools)  # for its error
    queue, order = torch.empty_like(demand.order), torch.empty(count, dtype=torch.int64, device=device)
    # Each by itself: slices of one would begin where memory is not aligned, and be compiled for that too.
    expert, column = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(2))
    chosen, scores = demand.choice.experts.contiguous(), demand.choice.scores.contiguous()
    source, valid = tokens.source.contiguous(), tokens.valid.contiguous()
    width = power_of_2(num_experts)
    block = max(1, TILE // width)
    price = price_in_pools(demand)
    bounds = [(room, constants.pool_of_expert, price)]
    if rows is not None:
        bounds.append((rows, constants.rank_of_expert, ROW))
    for turn in range(rounds):
        _propose[(triton.cdiv(count, block),)](
            chosen, scores, constants.affinity, source, tokens.position.contiguous(), demand.weight,
            constants.pool_of_expert, constants.rank_of_expert, demand.order, demand.planned, placed, queue,
            room, room if rows is None else rows, expert, column, order,
            count, k, num_experts, pools, constants.ranks, place_bits(count),
            RULE=RULES[terms.priority], FIRST=turn == 0, BOUNDED=rows is not None,
            PRICE=price, UNIT=UNIT, SCALE=1 << PRIORITY_BITS, TOP=EXEMPT_PRIORITY,
            TOKENS=block, K=power_of_2(k), EXPERTS=width,
        )  # fmt: skip
        for left, of_expert, taken in bounds:
            _settle[(left.numel(),)](
                expert, column, order, demand.weight, valid, source, of_expert, placed, queue, left,
                constants.pool_of_expert, room, memory_for(left.numel(), left),
                count, k, left.shape[1], pools, FINAL=left is bounds[-1][0], PRICE=taken, POOL_PRICE=price,
                UNIT=UNIT, WIDTH=1, **searched(count),
            )  # fmt: skip
    return placement


@triton.jit(do_not_specialize=["count"])
def _settle(
    expert, column, order, weight, valid, source, of_expert, placed, queue, left, pool_of_expert, room,
    histogram, count, k, pools, inner_pools,
    FINAL: tl.constexpr, PRICE: tl.constexpr, POOL_PRICE: tl.constexpr, UNIT: tl.constexpr,
    WIDTH: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pool's proposals: those that fit are placed, take their room, and wait no more. Where rows are
    bounded too, the first of two withdraws those that do not fit, and the second places the others."""
    LAST: tl.constexpr = 9223372036854775807
    mine = tl.program_id(0)
    spare = tl.load(left + mine)
    limit = first_out(
        expert, order, weight, valid, source, of_expert, histogram, spare, count, mine, pools,
        PRICE, UNIT, WIDTH, BINS, BLOCK,
    )  # fmt: skip
    taken = tl.zeros((), tl.int64)
    for start in range(0, count, BLOCK):
        token = start + tl.arange(0, BLOCK)
        takes, best, _ = asks(token, expert, valid, source, of_expert, count, mine, pools, PRICE, WIDTH)
        fits = takes & (tl.load(order + token, mask=takes, other=0) < limit)
        if FINAL:
            taken += tl.sum(price_of(weight, token, token, fits, PRICE, UNIT), 0)
            cell = token.to(tl.int64) * k + tl.load(column + token, mask=fits, other=0)
            tl.store(placed + cell, best, mask=fits)
            tl.store(queue + cell, tl.full([BLOCK], LAST, tl.int64), mask=fits)
            if PRICE == ROW:
                price = price_of(weight, token, token, fits, POOL_PRICE, UNIT)
                of = tl.load(source + token, mask=fits, other=0) * inner_pools
                at = room + of + tl.load(pool_of_expert + best, mask=fits, other=0)
                tl.atomic_add(at, -price, mask=fits, sem="relaxed")
        else:
            tl.store(expert + token, tl.full([BLOCK], -1, tl.int64), mask=takes & ~fits)
    if FINAL:
        tl.store(left + mine, spare - taken)


@triton.jit(do_not_specialize=["count", "place_bits"])
def _propose(
    experts, scores, affinity, source, position, weight, pool_of_expert, rank_of_expert, orders, planned,
    placed, queue, room, row_room, out_expert, out_column, out_order,
    count, k, num_experts, pools, ranks, place_bits,
    RULE: tl.constexpr, FIRST: tl.constexpr, BOUNDED: tl.constexpr, PRICE: tl.constexpr,
    UNIT: tl.constexpr, SCALE: tl.constexpr, TOP: tl.constexpr,
    TOKENS: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """What each token asks for: an expert (-1: none), for its assignment in this column, in this order. Whose
    assignment finds none waits no more with it."""
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
    else:
        waits = tl.load(queue + cell, mask=real, other=LAST)
    column = tl.argmin(waits, 1)
    asks_ = here & (tl.min(waits, 1) < LAST)
    home = tl.load(experts + token * k + column, mask=asks_, other=0)

    expert = tl.arange(0, EXPERTS)
    known = expert < num_experts
    option = asks_[:, None] & known[None, :]
    score = tl.load(scores + token[:, None] * num_experts + expert[None, :], mask=option, other=0.0)
    like = tl.load(affinity + home[:, None] * num_experts + expert[None, :], mask=option, other=0.0)
    value = score * like
    of = tl.load(source + token, mask=asks_, other=0)
    price = price_of(weight, token, token, asks_, PRICE, UNIT)
    pool = tl.load(pool_of_expert + expert, mask=known, other=0)
    spare = tl.load(room + of[:, None] * pools + pool[None, :], mask=option, other=-1)
    open_ = option & (value > 0) & (spare >= price[:, None])
    if BOUNDED:
        rank = tl.load(rank_of_expert + expert, mask=known, other=0)
        open_ = open_ & (tl.load(row_room + of[:, None] * ranks + rank[None, :], mask=option, other=0) >= 1)
    for one in range(k):
        own = tl.load(experts + token * k + one, mask=asks_, other=-1)
        now = tl.load(placed + token * k + one, mask=asks_, other=-1)
        open_ = open_ & (expert[None, :] != own[:, None]) & (expert[None, :] != now[:, None])
    value = tl.where(open_, value, -1.0)
    best = tl.argmax(value, 1)  # the lowest of equals
    found = tl.max(value, 1) > 0
    told = tl.load(scores + token * num_experts + best, mask=found, other=0.0)
    heavy = tl.load(weight + token, mask=here, other=0)
    priority = tl.where(found, priority_of(told, heavy, RULE, UNIT, SCALE), 0)
    place = tl.load(position + token, mask=here, other=0)
    tl.store(out_expert + token, tl.where(found, best, -1).to(tl.int64), mask=here)
    tl.store(out_column + token, column.to(tl.int64), mask=here)
    tl.store(out_order + token, ((TOP - priority) << place_bits) | place, mask=here)
    # No candidate now is none ever: room only shrinks. Let the token's next one have its turn.
    given_up = (slot[None, :] == column[:, None]) & ~found[:, None]
    tl.store(queue + cell, tl.where(given_up, LAST, waits), mask=real)
