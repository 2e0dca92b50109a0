"""The kernel of combine weights: its twin in ``macs.routing``. Sums over a token's own are in float64 in both,
so that in whatever order they are added the result is rounded alike, but for one in millions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shared import power_of_2

if TYPE_CHECKING:
    from ..routing import Demand

TILE = 512
"""Assignments that a program looks at together."""


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
            TINY=torch.finfo(demand.scores.dtype).tiny, OWN=top_k, TOKENS=block, K=columns,
        )  # fmt: skip
    return combined, rerouted


@triton.jit(do_not_specialize=["count"])
def _combine(
    experts, placed, planned, scores, weights, combined, rerouted, count, slots, num_experts,
    TINY: tl.constexpr, OWN: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    slot = tl.arange(0, K)
    here = (token < count)[:, None] & (slot < slots)[None, :]
    cell = token[:, None] * slots + slot[None, :]
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
    total = tl.sum(tl.where(own, weight.to(tl.float64), 0.0), 1).to(weight.dtype)
    score_sum = tl.sum(tl.where(own, score.to(tl.float64), 0.0), 1).to(score.dtype)
    if score.dtype == tl.float64:
        share = tl.where(moved, candidate, 0.0) / tl.maximum(score_sum, TINY)[:, None]
    else:
        divisor = tl.maximum(score_sum.to(tl.float32), TINY)[:, None]
        share = tl.div_rn(tl.where(moved, candidate.to(tl.float32), 0.0), divisor).to(score.dtype)
    share = tl.where(share.to(tl.float64) > 1.0, 1.0, share.to(tl.float64)).to(weight.dtype)
    joined = share.to(tl.float64) * total.to(tl.float64)[:, None]
    kept = weight.to(tl.float64)
    told = tl.where(changed, tl.where(moved, joined, 0.0), kept).to(weight.dtype)
    tl.store(combined + cell, told, mask=here)
    tl.store(rerouted + cell, moved, mask=here)
