"""Admission by searching; the reference, ``macs.steps.admission``, sorts.

A pool admits everything before one key: that of the first assignment that does not fit. One program a pool
searches it. The cost is summed over ``BINS`` even ranges of the keys in which it may lie; the first range at
which the running sum passes what is left of the capacity is searched next. Each pass divides the range by
``BINS``, starting from the lowest to the highest key of the pool; a pool with capacity for all is not
searched. All numbers are integers, so both are equal.

    experts, placed     int64 [T, k']   asked for; placed (-1: not)
    key                 int64 [T, k']   admission key
    weight              int64 [T]       semantic weight (mass int64 [T, k'] where the price is MASS)
    valid, exempt       bool  [T]
    source              int64 [T]
    of_expert           int64 [E]       pool of each expert
    capacity, left      int64 [Q]       of each source's pools
    pools_left          int64 [S, P]    where the limit is on rows: capacity that they shut out is returned
    histogram           int64 [Q, BINS] memory for the search
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import UNIT, Capacities, Demand, LayerConstants, Placement
from ..demand import key_bits, tie_count
from .shared import power_of_2

BINS = 256
"""Steps that the cost is summed by."""
BLOCK = 4096
"""Assignments that a program looks at together."""


def admit(demand: Demand, capacities: Capacities, constants: LayerConstants) -> Placement:
    """One launch; one more where rows have a separate bound."""
    experts = demand.routing.experts.contiguous()
    if not experts.numel():
        return Placement(experts, capacities.pools, capacities.rows)
    placed, left = torch.empty_like(experts), torch.empty_like(capacities.pools)
    fill(demand, constants, experts, placed, (capacities.pools, left), None)
    if capacities.rows is None:
        return Placement(placed, left, None)
    rows_left = torch.empty_like(capacities.rows)
    fill(demand, constants, placed, placed, (capacities.rows, rows_left), left)
    return Placement(placed, left, rows_left)


def fill(
    demand: Demand, constants: LayerConstants, asked: Tensor, placed: Tensor,
    limit: tuple[Tensor, Tensor], pools_left: Tensor | None,
) -> None:  # fmt: skip
    """Write the experts of ``asked`` int64 [T, k'] (-1: none) that fit to ``placed``, -1 for the others.

    limit: capacities [S, P] or [S, R], and the output for what is left of them. With ``pools_left`` [S, P]
    the limit is on rows, and assignments that it shuts out return their capacity there.
    """
    capacity, left = limit
    (sources, pools), rows = capacity.shape, pools_left is not None
    key_bits(tie_count(demand.routing), sources * pools)  # raises
    tokens, count = demand.tokens, asked.numel()
    _admit[(sources * pools + 1,)](
        asked, placed, demand.admission_key, demand.weight,
        tokens.valid.contiguous(), tokens.source.contiguous(),
        tokens.exempt.contiguous(), constants.rank_of_expert if rows else constants.pool_of_expert, capacity,
        left, constants.pool_of_expert, pools_left if rows else left, memory_for(sources * pools, left),
        count, pools, constants.pools, PRICE=ROW if rows else price_in_pools(demand),
        POOL_PRICE=price_in_pools(demand), UNIT=UNIT, WIDTH=asked.shape[1], **searched(count),
    )  # fmt: skip


def memory_for(pools: int, near: Tensor) -> Tensor:
    """Histograms for a search in each of so many pools."""
    return torch.empty(pools, BINS, dtype=torch.int64, device=near.device)


def searched(count: int) -> dict[str, int]:
    """Compile-time arguments of a search among ``count`` assignments."""
    return {"BINS": BINS, "BLOCK": min(BLOCK, max(256, power_of_2(count))), "num_warps": 16}


ONE, WEIGHT, ROW, MASS = (tl.constexpr(price) for price in range(4))
"""What an assignment takes: one token of a pool's capacity, its token's weight, one row of a rank, or its
combine weight of what a source may drop."""


def price_in_pools(demand: Demand) -> tl.constexpr:
    """What an assignment takes from its pool."""
    return WEIGHT if demand.rule.by_weight else ONE


@triton.jit
def asks(
    item, experts, valid, source, of_expert, count, mine, pools, PRICE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Which assignments ask for this pool, their experts, and their tokens."""
    token = item // WIDTH
    expert = tl.load(experts + item, mask=item < count, other=-1)
    some = expert >= 0
    some = some & tl.load(valid + token, mask=some, other=0).to(tl.int1)
    pool = tl.load(source + token, mask=some, other=0)
    if PRICE != MASS:
        pool = pool * pools + tl.load(of_expert + expert, mask=some, other=0)
    return some & (pool == mine), expert, token


@triton.jit
def price_of(amount, item, token, takes, PRICE: tl.constexpr, UNIT: tl.constexpr):
    """The price of each assignment that asks, 0 for the others. amount: token weights, or masses."""
    if PRICE == WEIGHT:
        price = tl.load(amount + token, mask=takes, other=0)
    elif PRICE == MASS:
        price = tl.load(amount + item, mask=takes, other=0)
    else:
        price = tl.where(takes, 1 if PRICE == ROW else UNIT, 0).to(tl.int64)
    return price


@triton.jit
def first_out(
    experts, key, amount, valid, source, of_expert, histogram, left, count, mine, pools,
    PRICE: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The key of the first assignment of a pool that does not fit what is left; beyond all if all fit."""
    LAST: tl.constexpr = 9223372036854775807
    place = tl.arange(0, BLOCK)
    low, high = tl.full((), LAST, tl.int64), tl.full((), -1, tl.int64)
    total = tl.zeros((), tl.int64)
    for start in range(0, count, BLOCK):
        item = start + place
        takes, _, token = asks(item, experts, valid, source, of_expert, count, mine, pools, PRICE, WIDTH)
        own = tl.load(key + item, mask=takes, other=0)
        total += tl.sum(price_of(amount, item, token, takes, PRICE, UNIT), 0)
        low = tl.minimum(low, tl.min(tl.where(takes, own, LAST), 0))
        high = tl.maximum(high, tl.max(tl.where(takes, own, -1), 0))
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
                takes, _, token = asks(
                    item, experts, valid, source, of_expert, count, mine, pools, PRICE, WIDTH
                )
                own = tl.load(key + item, mask=takes, other=-1)
                takes = takes & (own >= low) & (own <= high)
                price = price_of(amount, item, token, takes, PRICE, UNIT)
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
    return limit


# Numbers that follow the batch's size are no part of what is compiled: one form serves every size.
@triton.jit(do_not_specialize=["count"])
def _admit(
    experts, placed, key, weight, valid, source, exempt, of_expert, capacity, left, pool_of_expert,
    pools_left, histogram, count, pools, inner_pools,
    PRICE: tl.constexpr, POOL_PRICE: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Admit one pool; the program after the last copies what is not planned."""
    mine, place = tl.program_id(0), tl.arange(0, BLOCK)
    if mine == tl.num_programs(0) - 1:
        for start in range(0, count, BLOCK):
            item = start + place
            here = item < count
            expert = tl.load(experts + item, mask=here, other=-1)
            counts = tl.load(valid + item // WIDTH, mask=here, other=0).to(tl.int1)
            tl.store(placed + item, expert, mask=here & ((expert < 0) | ~counts))
    else:
        available = tl.load(capacity + mine)
        limit = first_out(
            experts, key, weight, valid, source, of_expert, histogram, available, count, mine, pools,
            PRICE, UNIT, WIDTH, BINS, BLOCK,
        )  # fmt: skip
        taken = tl.zeros((), tl.int64)
        for start in range(0, count, BLOCK):
            item = start + place
            takes, expert, token = asks(
                item, experts, valid, source, of_expert, count, mine, pools, PRICE, WIDTH
            )
            own = tl.load(key + item, mask=takes, other=0)
            stays = takes & ((own < limit) | tl.load(exempt + token, mask=takes, other=0).to(tl.int1))
            taken += tl.sum(price_of(weight, item, token, stays, PRICE, UNIT), 0)
            tl.store(placed + item, tl.where(stays, expert, -1), mask=takes)
            if PRICE == ROW:
                out = takes & ~stays
                back = price_of(weight, item, token, out, POOL_PRICE, UNIT)
                of = tl.load(source + token, mask=out, other=0) * inner_pools
                at = pools_left + of + tl.load(pool_of_expert + expert, mask=out, other=0)
                tl.atomic_add(at, back, mask=out, sem="relaxed")
        tl.store(left + mine, available - taken)
