"""The kernel of the demand; reference: ``macs.steps.demand``, equal.

experts             int64 [T, k']
scores              float [T, E]
weight, position, source  int64 [T]
modality            int8  [T]
valid, exempt       bool  [T]
key                 int64 [T, k']   written: admission key
planned             bool  [T, k']   written
by_source           int64 [3, S]    added to: tokens, weights, visual weights
rows, cost          int64 [S, E]    added to
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tokens import TEXT, Tokens
from ..contracts import PRIORITY_BITS, UNIT, AdmissionRule, Counts, Demand, Routing
from ..demand import EXEMPT_PRIORITY, tie_bits, tie_count
from .shared import RULES, assignments, power_of_2, priority_of, visual_of

TILE = 1024
"""Assignments that a program looks at together."""


def measure_demand(
    routing: Routing, tokens: Tokens, weight: Tensor, rule: AdmissionRule, counts: Counts
) -> Demand:
    """One launch."""
    (count, slots), (sources, experts) = routing.experts.shape, counts.rows.shape
    key = torch.empty(count, slots, dtype=torch.int64, device=weight.device)
    planned = torch.empty(count, slots, dtype=torch.bool, device=weight.device)
    if count:
        columns = power_of_2(slots)
        block = max(1, TILE // max(columns, power_of_2(sources)))
        tensors = (
            routing.experts, routing.scores, weight, tokens.position, tokens.source, tokens.modality,
            tokens.valid, tokens.exempt,
        )  # fmt: skip
        stride = experts if slots == routing.top_k else 2 * experts
        _measure[(triton.cdiv(count, block),)](
            *(one.contiguous() for one in tensors), key, planned,
            counts.by_source, counts.rows, counts.cost,
            count, slots, experts, sources, stride, tie_bits(tie_count(routing)),
            RULE=RULES[rule.priority], BY_WEIGHT=counts.cost.numel() > 0, UNIT=UNIT, SCALE=1 << PRIORITY_BITS,
            TOP=EXEMPT_PRIORITY, OWN=routing.top_k, TEXT=TEXT, TOKENS=block, K=columns,
            SOURCES=power_of_2(sources),
        )  # fmt: skip
    return Demand(routing, tokens, weight, rule, key, planned)


@triton.jit(do_not_specialize=["count", "tie_bits"])
def _measure(
    experts, scores, weight, position, source, modality, valid, exempt, key, planned,
    by_source, rows, cost,
    count, slots, num_experts, sources, stride, tie_bits,
    RULE: tl.constexpr, BY_WEIGHT: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr, TOP: tl.constexpr,
    OWN: tl.constexpr, TEXT: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    token, cell, real = assignments(count, slots, TOKENS, K)
    here, slot = token < count, tl.arange(0, K)
    counts, seen = visual_of(modality, valid, token, here, TEXT)
    expert = tl.load(experts + cell, mask=real, other=-1)
    token_weight = tl.load(weight + token, mask=here, other=0)
    of = tl.load(source + token, mask=here, other=0)

    own = tl.maximum(expert, 0)
    score = tl.load(scores + token[:, None] * num_experts + own, mask=real, other=0.0)
    priority = priority_of(score, token_weight[:, None] + tl.zeros([TOKENS, K], tl.int64), RULE, UNIT, SCALE)
    spared = tl.load(exempt + token, mask=here, other=0).to(tl.int1)
    priority = tl.where(spared[:, None], TOP, priority)
    place = tl.load(position + token, mask=here, other=0)[:, None] * stride + own
    place += tl.where((slot >= OWN)[None, :], num_experts, 0)
    tl.store(key + cell, ((TOP - priority) << tie_bits) | place, mask=real)
    asks = real & counts[:, None] & (expert >= 0)
    tl.store(planned + cell, asks, mask=real)

    one = tl.full([TOKENS, K], 1, tl.int64)
    at = of[:, None] * num_experts + own
    tl.atomic_add(rows + at, one, mask=asks, sem="relaxed")
    if BY_WEIGHT:
        tl.atomic_add(cost + at, one * token_weight[:, None], mask=asks, sem="relaxed")
    each = tl.arange(0, SOURCES)
    hit = (of[:, None] == each[None, :]) & counts[:, None]
    inside = each < sources
    tl.atomic_add(by_source + each, tl.sum(hit.to(tl.int64), 0), mask=inside, sem="relaxed")
    tl.atomic_add(
        by_source + sources + each,
        tl.sum(tl.where(hit, token_weight[:, None], 0), 0),
        mask=inside,
        sem="relaxed",
    )
    token_weight = tl.where(hit & seen[:, None], token_weight[:, None], 0)
    tl.atomic_add(by_source + 2 * sources + each, tl.sum(token_weight, 0), mask=inside, sem="relaxed")
