"""Kernels of rerouting; reference: ``macs.steps.rerouting``, equal.

experts, placed, queue  int64 [T, k]   the router's; placed (written); keys that wait (written)
scores              float   [T, E]     affinity  float32 [E, E]
source, position, weight  int64 [T]    valid  bool [T]
keys                int64   [T, k]     admission keys
remaining           int64   [S, P]     remaining_rows  int64 [S, R]    subtracted from
expert, column, key int64   [T]        each token's proposal: expert (-1: none), column, key
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..contracts import PRIORITY_BITS, UNIT, Demand, LayerConstants, Placement
from ..demand import EXEMPT_PRIORITY, key_bits, tie_bits
from .admission import ROW, asks, first_out, memory_for, price_in_pools, price_of, searched
from .shared import RULES, power_of_2, priority_of

TILE = 2048
"""Scores that one program looks at together."""


def reroute(demand: Demand, placement: Placement, constants: LayerConstants, rounds: int) -> Placement:
    """A round is two launches: what tokens ask for, and who of them is placed; three where rows have a bound
    of their own. Changes the placement in place."""
    placed, remaining, rows = placement.experts, placement.remaining, placement.remaining_rows
    (count, k), num_experts = placed.shape, demand.routing.scores.shape[1]
    if not count:
        return replace(placement, moved=True)
    tokens, device = demand.tokens, demand.weight.device
    sources, pools = remaining.shape
    key_bits(count, sources * pools)  # raises
    queue, key = torch.empty_like(demand.admission_key), torch.empty(count, dtype=torch.int64, device=device)
    # Each by itself: slices of one would begin where memory is not aligned, and be compiled for that too.
    expert, column = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(2))
    chosen, scores = demand.routing.experts.contiguous(), demand.routing.scores.contiguous()
    source, valid = tokens.source.contiguous(), tokens.valid.contiguous()
    width = power_of_2(num_experts)
    block = max(1, TILE // width)
    price = price_in_pools(demand)
    limits = [(remaining, constants.pool_of_expert, price)]
    if rows is not None:
        limits.append((rows, constants.rank_of_expert, ROW))
    for turn in range(rounds):
        _propose[(triton.cdiv(count, block),)](
            chosen, scores, constants.affinity, source, tokens.position.contiguous(), demand.weight,
            constants.pool_of_expert, constants.rank_of_expert, demand.admission_key, demand.planned,
            placed, queue,
            remaining, remaining if rows is None else rows, expert, column, key,
            count, k, num_experts, pools, constants.ranks, tie_bits(count),
            RULE=RULES[demand.rule.priority], FIRST=turn == 0, BOUNDED=rows is not None,
            PRICE=price, UNIT=UNIT, SCALE=1 << PRIORITY_BITS, TOP=EXEMPT_PRIORITY,
            TOKENS=block, K=power_of_2(k), EXPERTS=width,
        )  # fmt: skip
        for left, of_expert, taken in limits:
            _settle[(left.numel(),)](
                expert, column, key, demand.weight, valid, source, of_expert, placed, queue, left,
                constants.pool_of_expert, remaining, memory_for(left.numel(), left),
                count, k, left.shape[1], pools, FINAL=left is limits[-1][0], PRICE=taken, POOL_PRICE=price,
                UNIT=UNIT, WIDTH=1, **searched(count),
            )  # fmt: skip
    return replace(placement, moved=True)


@triton.jit(do_not_specialize=["count"])
def _settle(
    expert, column, key, weight, valid, source, of_expert, placed, queue, left, pool_of_expert, remaining,
    histogram, count, k, pools, inner_pools,
    FINAL: tl.constexpr, PRICE: tl.constexpr, POOL_PRICE: tl.constexpr, UNIT: tl.constexpr,
    WIDTH: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Place the proposals of one pool that fit. Where rows have a separate bound, the first of two launches
    withdraws the proposals that do not fit, and the second places the others."""
    LAST: tl.constexpr = 9223372036854775807
    mine = tl.program_id(0)
    spare = tl.load(left + mine)
    limit = first_out(
        expert, key, weight, valid, source, of_expert, histogram, spare, count, mine, pools,
        PRICE, UNIT, WIDTH, BINS, BLOCK,
    )  # fmt: skip
    taken = tl.zeros((), tl.int64)
    for start in range(0, count, BLOCK):
        token = start + tl.arange(0, BLOCK)
        takes, best, _ = asks(token, expert, valid, source, of_expert, count, mine, pools, PRICE, WIDTH)
        fits = takes & (tl.load(key + token, mask=takes, other=0) < limit)
        if FINAL:
            taken += tl.sum(price_of(weight, token, token, fits, PRICE, UNIT), 0)
            cell = token.to(tl.int64) * k + tl.load(column + token, mask=fits, other=0)
            tl.store(placed + cell, best, mask=fits)
            tl.store(queue + cell, tl.full([BLOCK], LAST, tl.int64), mask=fits)
            if PRICE == ROW:
                price = price_of(weight, token, token, fits, POOL_PRICE, UNIT)
                of = tl.load(source + token, mask=fits, other=0) * inner_pools
                at = remaining + of + tl.load(pool_of_expert + best, mask=fits, other=0)
                tl.atomic_add(at, -price, mask=fits, sem="relaxed")
        else:
            tl.store(expert + token, tl.full([BLOCK], -1, tl.int64), mask=takes & ~fits)
    if FINAL:
        tl.store(left + mine, spare - taken)


@triton.jit(do_not_specialize=["count", "tie_bits"])
def _propose(
    experts, scores, affinity, source, position, weight, pool_of_expert, rank_of_expert, keys, planned,
    placed, queue, remaining, remaining_rows, out_expert, out_column, out_key,
    count, k, num_experts, pools, ranks, tie_bits,
    RULE: tl.constexpr, FIRST: tl.constexpr, BOUNDED: tl.constexpr, PRICE: tl.constexpr,
    UNIT: tl.constexpr, SCALE: tl.constexpr, TOP: tl.constexpr,
    TOKENS: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """The proposal of each token: expert (-1: none), column of the assignment, key. An assignment without a
    candidate waits no longer."""
    LAST: tl.constexpr = 9223372036854775807
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = token < count
    slot = tl.arange(0, K)
    cell = token[:, None] * k + slot[None, :]
    real = here[:, None] & (slot < k)[None, :]
    if FIRST:
        nowhere = tl.load(placed + cell, mask=real, other=0) < 0
        nowhere = nowhere & tl.load(planned + cell, mask=real, other=0).to(tl.int1)
        waits = tl.load(keys + cell, mask=real & nowhere, other=LAST)
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
    spare = tl.load(remaining + of[:, None] * pools + pool[None, :], mask=option, other=-1)
    open_ = option & (value > 0) & (spare >= price[:, None])
    if BOUNDED:
        rank = tl.load(rank_of_expert + expert, mask=known, other=0)
        open_ = open_ & (
            tl.load(remaining_rows + of[:, None] * ranks + rank[None, :], mask=option, other=0) >= 1
        )
    for one in range(k):
        own = tl.load(experts + token * k + one, mask=asks_, other=-1)
        now = tl.load(placed + token * k + one, mask=asks_, other=-1)
        open_ = open_ & (expert[None, :] != own[:, None]) & (expert[None, :] != now[:, None])
    value = tl.where(open_, value, -1.0)
    best = tl.argmax(value, 1)  # the lowest of equals
    found = tl.max(value, 1) > 0
    best_score = tl.load(scores + token * num_experts + best, mask=found, other=0.0)
    token_weight = tl.load(weight + token, mask=here, other=0)
    priority = tl.where(found, priority_of(best_score, token_weight, RULE, UNIT, SCALE), 0)
    place = tl.load(position + token, mask=here, other=0)
    tl.store(out_expert + token, tl.where(found, best, -1).to(tl.int64), mask=here)
    tl.store(out_column + token, column.to(tl.int64), mask=here)
    tl.store(out_key + token, ((TOP - priority) << tie_bits) | place, mask=here)
    # No candidate now is none ever, for capacity only shrinks: the token's next assignment waits.
    given_up = (slot[None, :] == column[:, None]) & ~found[:, None]
    tl.store(queue + cell, tl.where(given_up, LAST, waits), mask=real)
