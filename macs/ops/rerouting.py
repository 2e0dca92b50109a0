"""Kernels for priorities and proposals: exactly their twins in ``macs.routing``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fixed_point import PRIORITY_BITS, UNIT
from .shared import power_of_2, rint

if TYPE_CHECKING:
    from ..routing import Demand, Placement

RULES = {"score": 0, "product": 1}
TILE = 2048
"""Scores that one program looks at together."""


@triton.jit
def _priority(score, weight, RULE: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr):
    """Priority by rule of a score and a weight in fixed point."""
    share = weight.to(tl.float64) / UNIT
    value = score.to(tl.float64)
    if RULE == 1:
        value = share * value
    value = tl.where(value == value, value, 0.0)
    value = tl.minimum(tl.maximum(value, 0.0), 1.0)
    return rint(value * SCALE).to(tl.int64)


def priority_of(score: Tensor, weight: Tensor, rule: str) -> Tensor:
    """One launch."""
    count, k = score.shape
    told = torch.empty(count, k, dtype=torch.int64, device=score.device)
    if count and k:
        block = 1024
        _priorities[(triton.cdiv(count * k, block),)](
            score.contiguous(), weight.contiguous(), told, count * k, k,
            RULE=RULES[rule], UNIT=UNIT, SCALE=1 << PRIORITY_BITS, BLOCK=block,
        )  # fmt: skip
    return told


@triton.jit(do_not_specialize=["total"])
def _priorities(
    score, weight, told, total, k,
    RULE: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = place < total
    value = tl.load(score + place, mask=here, other=0.0)
    heavy = tl.load(weight + place // k, mask=here, other=0)
    tl.store(told + place, _priority(value, heavy, RULE, UNIT, SCALE), mask=here)


def reroute(demand: Demand, placement: Placement, affinity: Tensor, rounds: int, rule: str) -> Placement:
    """A launch for the proposals of a round, and those of admission."""
    from ..routing import LAST, Placement, Queue, admit, less, pools_of

    source, cost, one = demand.tokens.source, demand.cost, torch.ones_like(demand.cost)
    placed, room, row_room = placement.experts, placement.room, placement.row_room
    queue = demand.order.masked_fill(~(demand.planned & (placed < 0)), LAST)
    for _ in range(rounds):
        expert, column, order = _proposals(demand, placed, queue, room, row_room, affinity, rule)
        accepted = expert >= 0
        bounds = [(demand.pool_of_expert, room, cost)]
        if row_room is not None:
            bounds.append((demand.rank_of_expert, row_room, one))
        for of_expert, left, price in bounds:
            pool = pools_of(expert, accepted, of_expert, source, left)[:, 0]
            fits = admit(Queue(pool, order[:, 0], price, len(placed)), left.flatten())
            accepted = accepted & fits[:, None]
        first = queue.gather(1, column)
        queue = queue.scatter(1, column, first.masked_fill(accepted | (expert < 0), LAST))
        placed = placed.scatter(1, column, torch.where(accepted, expert, placed.gather(1, column)))
        taken = expert.masked_fill(~accepted, -1)
        room = less(room, source, demand.pool_of_expert, taken, cost)
        if row_room is not None:
            row_room = less(row_room, source, demand.rank_of_expert, taken, one)
    return Placement(placed, room, row_room)


def _proposals(
    demand: Demand,
    placed: Tensor,
    queue: Tensor,
    room: Tensor,
    row_room: Tensor | None,
    affinity: Tensor,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch, which reads the scores of waiting tokens only: int64 [T, 1] each, the expert that a token
    asks for (-1: none), for its assignment in this column, in this order."""
    from ..routing import EXEMPT_PRIORITY, place_bits

    count, k = placed.shape
    num_experts, bounded = demand.scores.shape[1], row_room is not None
    row_room = room if row_room is None else row_room
    # Each by itself: slices of one would begin where memory is not aligned, and be compiled for that too.
    expert, column, order = (torch.empty(count, 1, dtype=torch.int64, device=queue.device) for _ in range(3))
    if count:
        width = power_of_2(num_experts)
        tokens = max(1, TILE // width)
        tensors = (
            demand.experts, placed, queue, demand.scores, affinity, demand.tokens.source,
            demand.tokens.position, demand.cost, demand.weight, demand.pool_of_expert,
            demand.rank_of_expert, room, row_room,
        )  # fmt: skip
        _propose[(triton.cdiv(count, tokens),)](
            *(one.contiguous() for one in tensors), expert, column, order,
            count, k, num_experts, room.shape[1], row_room.shape[1], place_bits(count),
            RULE=RULES[rule], BOUNDED=bounded, UNIT=UNIT, SCALE=1 << PRIORITY_BITS, TOP=EXEMPT_PRIORITY,
            TOKENS=tokens, K=power_of_2(k), EXPERTS=width,
        )  # fmt: skip
    return expert, column, order


@triton.jit(do_not_specialize=["count", "place_bits"])
def _propose(
    experts, placed, queue, scores, affinity, source, position, cost, weight,
    pool_of_expert, rank_of_expert, room, row_room, out_expert, out_column, out_order,
    count, k, num_experts, pools, ranks, place_bits,
    RULE: tl.constexpr, BOUNDED: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr, TOP: tl.constexpr,
    TOKENS: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    LAST: tl.constexpr = 9223372036854775807
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = token < count
    slot = tl.arange(0, K)
    cell = token[:, None] * k + slot[None, :]
    real = here[:, None] & (slot < k)[None, :]
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
