"""The kernel that puts assignments in order; reference implementation: ``macs.routing``, equal."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fixed_point import PRIORITY_BITS, UNIT
from ..modality import Tokens
from .shared import assignments, power_of_2, rint

RULES = {"score": 0, "product": 1}
TILE = 1024
"""Assignments that a program looks at together."""


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


def ask(
    experts: Tensor, scores: Tensor, weight: Tensor, tokens: Tokens, rule: str, top_k: int
) -> tuple[Tensor, Tensor]:
    """One launch."""
    from ..routing import EXEMPT_PRIORITY, place_bits, places_of

    (count, slots), num_experts = experts.shape, scores.shape[1]
    order = torch.empty(count, slots, dtype=torch.int64, device=experts.device)
    planned = torch.empty(count, slots, dtype=torch.bool, device=experts.device)
    if count:
        columns = power_of_2(slots)
        block = max(1, TILE // columns)
        tensors = experts, scores, weight, tokens.position, tokens.valid, tokens.exempt
        _ask[(triton.cdiv(count, block),)](
            *(one.contiguous() for one in tensors), order, planned,
            count, slots, num_experts, place_bits(places_of(count, num_experts, slots > top_k)),
            RULE=RULES[rule], UNIT=UNIT, SCALE=1 << PRIORITY_BITS, TOP=EXEMPT_PRIORITY, OWN=top_k,
            SPREAD=places_of(1, num_experts, slots > top_k), TOKENS=block, K=columns,
        )  # fmt: skip
    return order, planned


@triton.jit(do_not_specialize=["count", "place_bits"])
def _ask(
    experts, scores, weight, position, valid, exempt, order, planned, count, slots, num_experts, place_bits,
    RULE: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr, TOP: tl.constexpr, OWN: tl.constexpr,
    SPREAD: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    token, cell, real = assignments(count, slots, TOKENS, K)
    here, slot = token < count, tl.arange(0, K)
    expert = tl.load(experts + cell, mask=real, other=-1)
    own = tl.maximum(expert, 0)
    score = tl.load(scores + token[:, None] * num_experts + own, mask=real, other=0.0)
    heavy = tl.load(weight + token, mask=here, other=0)
    priority = _priority(score, heavy[:, None] + tl.zeros([TOKENS, K], tl.int64), RULE, UNIT, SCALE)
    spared = tl.load(exempt + token, mask=here, other=0).to(tl.int1)
    priority = tl.where(spared[:, None], TOP, priority)
    place = tl.load(position + token, mask=here, other=0)[:, None] * SPREAD + own
    place += tl.where((slot >= OWN)[None, :], num_experts, 0)
    tl.store(order + cell, ((TOP - priority) << place_bits) | place, mask=real)
    counts = tl.load(valid + token, mask=here, other=0).to(tl.int1)
    tl.store(planned + cell, counts[:, None] & (expert >= 0), mask=real)
