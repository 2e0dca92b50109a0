"""Kernels of the bound on drops; reference implementation: ``macs.steps.drops``, equal."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import Constants, Demand, Placement
from ..demand import order_bits, places_of
from ..fixed_point import MASS_UNIT, UNIT
from .admission import MASS, ROW, asks, fill, first_out, memory_for, price_in_pools, price_of, searched
from .shared import assignments, power_of_2, rint

TILE = 1024
"""Assignments that a program looks at together."""


def limit_drops(
    demand: Demand, placement: Placement, constants: Constants, max_drop: float, hard: bool
) -> tuple[Placement, Tensor]:
    """Two launches, one more under a ``hard`` bound on rows. Changes the placement in place."""
    placed, room, rows = placement.experts, placement.room, placement.row_room
    (count, slots), sources, device = placed.shape, len(room), room.device
    excess = torch.empty(sources, dtype=torch.bool, device=device)
    if not count:
        return placement, excess.zero_()
    order_bits(places_of(demand.choice), sources)  # for its error
    source, again = demand.tokens.source.contiguous(), torch.empty_like(placed)
    mass = torch.empty_like(placed)
    columns = power_of_2(slots)
    block = max(1, TILE // columns)
    choice = demand.choice
    _dropped[(triton.cdiv(count, block),)](
        choice.experts.contiguous(), choice.weights.contiguous(), demand.planned, placed, again, mass,
        count, slots, UNIT=MASS_UNIT, OWN=choice.top_k, TOKENS=block, K=columns,
    )  # fmt: skip
    if hard:
        bound = room if rows is None else rows
        spare = None if rows is None else torch.empty_like(room)  # nobody reads it
        fill(demand, constants, again, again, (bound, torch.empty_like(bound)), spare)
    _take_back[(sources,)](
        again, placed, demand.order, mass, demand.weight, demand.tokens.valid.contiguous(), source,
        constants.pool_of_expert, constants.rank_of_expert, room, room if rows is None else rows, excess,
        memory_for(sources, room), count * slots, room.shape[1], constants.ranks,
        MOST=max_drop, BOUNDED=rows is not None, PRICE=price_in_pools(demand), UNIT=UNIT, WIDTH=slots,
        **searched(count * slots),
    )  # fmt: skip
    return placement, excess


@triton.jit(do_not_specialize=["count"])
def _dropped(
    experts, weights, planned, placed, again, mass, count, slots,
    UNIT: tl.constexpr, OWN: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The combine weight of every planned assignment of the router's own, and the experts of those of them
    that are dropped (-1: no such)."""
    _, cell, here = assignments(count, slots, TOKENS, K)
    own = here & (tl.arange(0, K) < OWN)[None, :]
    own = own & tl.load(planned + cell, mask=own, other=0).to(tl.int1)
    weight = tl.load(weights + cell, mask=own, other=0.0).to(tl.float64)
    held = rint(tl.where(weight == weight, weight, 0.0) * UNIT).to(tl.int64)
    lost = own & (held > 0) & (tl.load(placed + cell, mask=own, other=0) < 0)
    tl.store(again + cell, tl.load(experts + cell, mask=lost, other=-1), mask=here)
    tl.store(mass + cell, held, mask=here)


@triton.jit(do_not_specialize=["count"])
def _take_back(
    again, placed, order, mass, weight, valid, source, pool_of_expert, rank_of_expert, room, row_room, excess,
    histogram, count, pools, ranks,
    MOST: tl.constexpr, BOUNDED: tl.constexpr, PRICE: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One source's: the first of the dropped, up to the one with which enough of them are back."""
    mine, place = tl.program_id(0), tl.arange(0, BLOCK)
    held, lost = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for start in range(0, count, BLOCK):
        item = start + place
        own = (item < count) & (tl.load(source + item // WIDTH, mask=item < count, other=-1) == mine)
        each = tl.load(mass + item, mask=own, other=0)
        held += tl.sum(each, 0)
        gone = own & (each > 0) & (tl.load(placed + item, mask=own, other=0) < 0)
        lost += tl.sum(tl.where(gone, each, 0), 0)
    over = lost - tl.floor(held.to(tl.float64) * tl.full((), MOST, tl.float64)).to(tl.int64)
    back = tl.zeros((), tl.int64)
    if over > 0:
        last = first_out(
            again, order, mass, valid, source, pool_of_expert, histogram, over - 1, count, mine, pools,
            MASS, UNIT, WIDTH, BINS, BLOCK,
        )  # fmt: skip
        for start in range(0, count, BLOCK):
            item = start + place
            takes, expert, token = asks(
                item, again, valid, source, pool_of_expert, count, mine, pools, MASS, WIDTH
            )
            takes = takes & (tl.load(order + item, mask=takes, other=0) <= last)
            back += tl.sum(price_of(mass, item, token, takes, MASS, UNIT), 0)
            tl.store(placed + item, expert, mask=takes)
            price = price_of(weight, item, token, takes, PRICE, UNIT)
            at = mine * pools + tl.load(pool_of_expert + expert, mask=takes, other=0)
            tl.atomic_add(room + at, -price, mask=takes, sem="relaxed")
            if BOUNDED:
                at = mine * ranks + tl.load(rank_of_expert + expert, mask=takes, other=0)
                one = price_of(weight, item, token, takes, ROW, UNIT)
                tl.atomic_add(row_room + at, -one, mask=takes, sem="relaxed")
    tl.store(excess + mine, over > back)
