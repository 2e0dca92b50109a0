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
    from ..routing import Demand, Placement, Proposals

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


def propose(
    demand: Demand, placement: Placement, waiting: Tensor, asking: Tensor, affinity: Tensor, rule: str
) -> Proposals:
    """One launch, which reads the scores of waiting tokens only."""
    from ..routing import Proposals

    count, k = len(asking), demand.experts.shape[1]
    num_experts, bounded = demand.scores.shape[1], placement.row_room is not None
    # Each by itself: slices of one would begin where memory is not aligned, and be compiled for that too.
    expert, column, priority = (
        torch.empty(count, dtype=torch.int64, device=waiting.device) for _ in range(3)
    )
    if count:
        width = power_of_2(num_experts)
        tokens = max(1, TILE // width)
        row_room = placement.room if placement.row_room is None else placement.row_room
        tensors = (
            asking, demand.experts, placement.experts, waiting, demand.priority, demand.scores, affinity,
            demand.tokens.source, demand.cost, demand.weight, demand.pool_of_expert, demand.rank_of_expert,
            placement.room, row_room,
        )  # fmt: skip
        _propose[(triton.cdiv(count, tokens),)](
            *(one.contiguous() for one in tensors), expert, column, priority,
            count, k, num_experts, placement.room.shape[1], row_room.shape[1],
            RULE=RULES[rule], BOUNDED=bounded, UNIT=UNIT, SCALE=1 << PRIORITY_BITS,
            TOKENS=tokens, K=power_of_2(k), EXPERTS=width,
        )  # fmt: skip
    return Proposals(expert, column, priority)


@triton.jit(do_not_specialize=["count"])
def _propose(
    asking, experts, placed, waiting, priority_of, scores, affinity, source, cost, weight,
    pool_of_expert, rank_of_expert, room, row_room, out_expert, out_column, out_priority,
    count, k, num_experts, pools, ranks,
    RULE: tl.constexpr, BOUNDED: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr,
    TOKENS: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = row < count
    token = tl.load(asking + row, mask=here, other=0)
    slot = tl.arange(0, K)
    cell = token[:, None] * k + slot[None, :]
    real = here[:, None] & (slot < k)[None, :]
    waits = tl.load(waiting + cell, mask=real, other=0).to(tl.int1)
    before = tl.load(priority_of + cell, mask=real, other=-1) * num_experts
    before += num_experts - 1 - tl.load(experts + cell, mask=real, other=0)  # ties to the lower expert
    first = tl.where(waits, before, -1)
    column = tl.argmax(first, 1)
    asks = here & (tl.max(first, 1) >= 0)
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
    tl.store(out_expert + row, tl.where(found, best, -1).to(tl.int64), mask=here)
    tl.store(out_column + row, column.to(tl.int64), mask=here)
    priority = tl.where(found, _priority(told, heavy, RULE, UNIT, SCALE), 0)
    tl.store(out_priority + row, priority, mask=here)
