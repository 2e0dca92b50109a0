"""Kernels of the bound on drops; reference: ``macs.steps.drops``, equal.

experts, placed     int64 [T, k']
weights             float [T, k]
planned             bool  [T, k']
again               int64 [T, k']   experts of the dropped assignments, -1: not dropped
mass                int64 [T, k']   combine weight of the planned assignments
remaining           int64 [S, P]    subtracted from
remaining_rows      int64 [S, R]    subtracted from where rows have a separate bound
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contracts import MASS_UNIT, UNIT, Demand, LayerConstants, Placement
from ..demand import key_bits, tie_count
from .admission import MASS, ROW, asks, first_out, memory_for, price_in_pools, price_of, searched
from .shared import assignments, power_of_2, rint

TILE = 1024
"""Assignments that a program looks at together."""


def limit_drops(
    demand: Demand, placement: Placement, constants: LayerConstants, max_drop: float
) -> Placement:
    """Two launches. Changes the placement in place."""
    placed, remaining, rows = placement.experts, placement.remaining, placement.remaining_rows
    (count, slots), sources = placed.shape, len(remaining)
    if not count:
        return placement
    key_bits(tie_count(demand.routing), sources)  # raises
    again, mass = torch.empty_like(placed), torch.empty_like(placed)
    columns = power_of_2(slots)
    block = max(1, TILE // columns)
    routing = demand.routing
    _dropped[(triton.cdiv(count, block),)](
        routing.experts.contiguous(), routing.weights.contiguous(), demand.planned, placed, again, mass,
        count, slots, UNIT=MASS_UNIT, OWN=routing.top_k, TOKENS=block, K=columns,
    )  # fmt: skip
    _readmit[(sources,)](
        again, placed, demand.admission_key, mass, demand.weight, demand.tokens.valid.contiguous(),
        demand.tokens.source.contiguous(), constants.pool_of_expert, constants.rank_of_expert, remaining,
        remaining if rows is None else rows, memory_for(sources, remaining), count * slots,
        remaining.shape[1], constants.ranks,
        MOST=max_drop, BOUNDED=rows is not None, PRICE=price_in_pools(demand), UNIT=UNIT, WIDTH=slots,
        **searched(count * slots),
    )  # fmt: skip
    return placement


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
def _readmit(
    again, placed, key, mass, weight, valid, source, pool_of_expert, rank_of_expert, remaining,
    remaining_rows, histogram, count, pools, ranks,
    MOST: tl.constexpr, BOUNDED: tl.constexpr, PRICE: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Re-admit the first of one source's dropped assignments, up to the one with which enough are back."""
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
    if over > 0:
        last = first_out(
            again, key, mass, valid, source, pool_of_expert, histogram, over - 1, count, mine, pools,
            MASS, UNIT, WIDTH, BINS, BLOCK,
        )  # fmt: skip
        for start in range(0, count, BLOCK):
            item = start + place
            takes, expert, token = asks(
                item, again, valid, source, pool_of_expert, count, mine, pools, MASS, WIDTH
            )
            takes = takes & (tl.load(key + item, mask=takes, other=0) <= last)
            tl.store(placed + item, expert, mask=takes)
            price = price_of(weight, item, token, takes, PRICE, UNIT)
            at = mine * pools + tl.load(pool_of_expert + expert, mask=takes, other=0)
            tl.atomic_add(remaining + at, -price, mask=takes, sem="relaxed")
            if BOUNDED:
                at = mine * ranks + tl.load(rank_of_expert + expert, mask=takes, other=0)
                one = price_of(weight, item, token, takes, ROW, UNIT)
                tl.atomic_add(remaining_rows + at, -one, mask=takes, sem="relaxed")
