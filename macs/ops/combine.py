"""Kernels of combine weights and of the map that Megatron wants; reference implementations:
``macs.routing`` and ``macs.plan``.

Sums over a token's own are in float64 in both, so that in whatever order they are added the result is rounded
alike, but for one in millions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shared import assignments, power_of_2

if TYPE_CHECKING:
    from ..routing import Demand

TILE = 512
"""Assignments that a program looks at together."""


def wide(weights: Tensor) -> tl.dtype:
    """What weights are multiplied in: float32 where they are no wider, as in torch."""
    return tl.float64 if weights.dtype == torch.float64 else tl.float32


def combine_weights(demand: Demand, placed: Tensor, weights: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """One launch."""
    count, slots = placed.shape
    combined = torch.empty_like(weights, memory_format=torch.contiguous_format)
    rerouted = torch.empty(count, slots, dtype=torch.bool, device=placed.device)
    if count:
        columns = power_of_2(slots)
        block = max(1, TILE // columns)
        tensors = demand.experts, placed, demand.planned, demand.scores, weights
        _combine[(triton.cdiv(count, block),)](
            *(one.contiguous() for one in tensors), combined, rerouted, count, slots, demand.scores.shape[1],
            WIDE=wide(weights), SCORE=wide(demand.scores), TINY=torch.finfo(demand.scores.dtype).tiny,
            OWN=top_k, TOKENS=block, K=columns,
        )  # fmt: skip
    return combined, rerouted


@triton.jit(do_not_specialize=["count"])
def _combine(
    experts, placed, planned, scores, weights, combined, rerouted, count, slots, num_experts,
    WIDE: tl.constexpr, SCORE: tl.constexpr, TINY: tl.constexpr, OWN: tl.constexpr,
    TOKENS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    token, cell, here = assignments(count, slots, TOKENS, K)
    slot = tl.arange(0, K)
    expert = tl.load(experts + cell, mask=here, other=-1)
    now = tl.load(placed + cell, mask=here, other=-1)
    weight = tl.load(weights + cell, mask=here)
    changed = here & tl.load(planned + cell, mask=here, other=0).to(tl.int1) & (now != expert)
    moved = changed & (now >= 0)
    own = here & (expert >= 0) & (slot < OWN)[None, :]
    row = scores + token[:, None] * num_experts
    score = tl.load(row + expert, mask=own)
    candidate = tl.load(row + now, mask=moved)
    # What torch takes in half precision it takes in float32, and rounds.
    total = tl.sum(tl.where(own, weight.to(tl.float64), 0.0), 1).to(WIDE).to(weight.dtype)
    score_sum = tl.sum(tl.where(own, score.to(tl.float64), 0.0), 1).to(SCORE).to(score.dtype)
    candidate = tl.where(moved, candidate.to(SCORE), 0.0)
    divisor = score_sum.to(SCORE)[:, None] + tl.zeros_like(candidate)
    divisor = tl.where(divisor < TINY, TINY, divisor)  # NaN stays, as in a clamp
    share = tl.div_rn(candidate, divisor).to(score.dtype) if tl.float32 == SCORE else candidate / divisor
    share = tl.where(share.to(WIDE) > 1.0, 1.0, share.to(WIDE)).to(weight.dtype)
    joined = share.to(WIDE) * total.to(WIDE)[:, None]
    told = tl.where(changed, tl.where(moved, joined, 0.0), weight.to(WIDE)).to(weight.dtype)
    tl.store(combined + cell, told, mask=here)
    tl.store(rerouted + cell, moved, mask=here)


def map_of(experts: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """One launch."""
    count, slots = experts.shape
    chosen = torch.empty(count, num_experts, dtype=torch.bool, device=experts.device)
    probs = torch.empty(count, num_experts, dtype=weights.dtype, device=experts.device)
    if count:
        width = power_of_2(num_experts)
        block = max(1, 2048 // width)
        _map[(triton.cdiv(count, block),)](
            experts.contiguous(), weights.contiguous(), chosen, probs, count, num_experts,
            WIDE=wide(weights), SLOTS=slots, TOKENS=block, EXPERTS=width,
        )  # fmt: skip
    return chosen, probs


@triton.jit(do_not_specialize=["count"])
def _map(
    experts, weights, chosen, probs, count, num_experts,
    WIDE: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = token < count
    column = tl.arange(0, EXPERTS)
    told = tl.zeros([TOKENS, EXPERTS], WIDE)
    hit = tl.zeros([TOKENS, EXPERTS], tl.int32)
    for slot in tl.static_range(SLOTS):
        expert = tl.load(experts + token * SLOTS + slot, mask=here, other=-1)
        weight = tl.load(weights + token * SLOTS + slot, mask=here)
        mine = expert[:, None] == column[None, :]
        hit = tl.where(mine, 1, hit)
        told = tl.where(mine, weight.to(WIDE)[:, None], told)
    cell = token[:, None] * num_experts + column[None, :]
    inside = here[:, None] & (column < num_experts)[None, :]
    tl.store(chosen + cell, hit != 0, mask=inside)
    tl.store(probs + cell, told.to(probs.dtype.element_ty), mask=inside)
