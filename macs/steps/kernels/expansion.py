"""The kernel of expanded drop's further candidates; reference: ``macs.steps.expansion``, equal as combine
weights are.

    experts             int64 [T, k]        weights float [T, k]        scores float [T, E]
    source              int64 [T]           valid, exempt  bool [T]     local_experts  int64 [S, G]
    out_experts         int64 [T, k + G]    out_weights    float [T, k + G]     written
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...tokens import Tokens
from ..contracts import LayerConstants, Routing
from .combine import share_of, wide
from .shared import power_of_2

TILE = 512
"""Assignments that a program looks at together."""


def add_local_experts(routing: Routing, tokens: Tokens, constants: LayerConstants) -> Routing:
    """One launch."""
    (count, k), more = routing.experts.shape, constants.local_experts.shape[1]
    experts = torch.empty(count, k + more, dtype=torch.int64, device=routing.device)
    weights = torch.empty(count, k + more, dtype=routing.weights.dtype, device=routing.device)
    if count:
        added, own = power_of_2(more), power_of_2(k)
        block = max(1, TILE // max(added, own))
        tensors = (
            routing.experts, routing.weights, routing.scores, tokens.source, tokens.valid, tokens.exempt,
            constants.local_experts,
        )  # fmt: skip
        _add_local_experts[(triton.cdiv(count, block),)](
            *(one.contiguous() for one in tensors), experts, weights, count, k, more, routing.scores.shape[1],
            WIDE=wide(weights), SCORE=wide(routing.scores), TINY=torch.finfo(routing.scores.dtype).tiny,
            TOKENS=block, K=own, MORE=added,
        )  # fmt: skip
    return Routing(experts, weights, routing.scores, routing.top_k)


@triton.jit(do_not_specialize=["count"])
def _add_local_experts(
    experts, weights, scores, source, valid, exempt, local_experts, out_experts, out_weights,
    count, k, more, num_experts,
    WIDE: tl.constexpr, SCORE: tl.constexpr, TINY: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr,
    MORE: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = token < count
    slot, extra = tl.arange(0, K), tl.arange(0, MORE)
    real = here[:, None] & (slot < k)[None, :]
    inside = here[:, None] & (extra < more)[None, :]
    own = tl.load(experts + token[:, None] * k + slot[None, :], mask=real, other=-1)
    weight = tl.load(weights + token[:, None] * k + slot[None, :], mask=real, other=0.0)
    of = tl.load(source + token, mask=here, other=0)
    local = tl.load(local_experts + of[:, None] * more + extra[None, :], mask=inside, other=0)
    row = scores + token[:, None] * num_experts
    may = tl.load(valid + token, mask=here, other=0).to(tl.int1)
    may = may & ~tl.load(exempt + token, mask=here, other=0).to(tl.int1)
    candidate = tl.load(row + local, mask=inside, other=0.0)
    open_ = inside & may[:, None] & (candidate.to(SCORE) > 0)
    for one in range(k):
        used = tl.load(experts + token * k + one, mask=here, other=-1)
        open_ = open_ & (local != used[:, None])
    asked = real & (own >= 0)
    score = tl.load(row + own, mask=asked, other=0.0)
    joined = share_of(
        candidate.to(SCORE), score, tl.where(asked, weight, 0.0).to(weight.dtype), SCORE, WIDE, TINY
    )
    start = token[:, None] * (k + more)
    tl.store(out_experts + start + slot[None, :], own, mask=real)
    tl.store(out_weights + start + slot[None, :], weight, mask=real)
    at = start + k + extra[None, :]
    tl.store(out_experts + at, tl.where(open_, local, -1), mask=inside)
    tl.store(out_weights + at, tl.where(open_, joined, 0.0).to(weight.dtype), mask=inside)
