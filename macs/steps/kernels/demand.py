"""The kernel of what tokens ask for; reference implementation: ``macs.steps.demand``, equal."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tokens import TEXT, Tokens
from ..contracts import Choice, Demand, Sums, Terms
from ..demand import EXEMPT_PRIORITY, place_bits, places_of
from ..fixed_point import PRIORITY_BITS, UNIT
from .shared import RULES, assignments, power_of_2, priority_of, visual_of

TILE = 1024
"""Assignments that a program looks at together."""


def measure(choice: Choice, tokens: Tokens, weight: Tensor, terms: Terms, sums: Sums) -> Demand:
    """One launch."""
    (count, slots), (sources, experts) = choice.experts.shape, sums.rows.shape
    order = torch.empty(count, slots, dtype=torch.int64, device=weight.device)
    planned = torch.empty(count, slots, dtype=torch.bool, device=weight.device)
    if count:
        columns = power_of_2(slots)
        block = max(1, TILE // max(columns, power_of_2(sources)))
        tensors = (
            choice.experts, choice.scores, weight, tokens.position, tokens.source, tokens.kinds,
            tokens.valid, tokens.exempt,
        )  # fmt: skip
        spread = experts if slots == choice.top_k else 2 * experts
        _measure[(triton.cdiv(count, block),)](
            *(one.contiguous() for one in tensors), order, planned,
            sums.tokens, sums.weight, sums.visual_weight, sums.rows, sums.cost,
            count, slots, experts, sources, spread, place_bits(places_of(choice)),
            RULE=RULES[terms.priority], BY_WEIGHT=sums.cost.numel() > 0, UNIT=UNIT, SCALE=1 << PRIORITY_BITS,
            TOP=EXEMPT_PRIORITY, OWN=choice.top_k, TEXT=TEXT, TOKENS=block, K=columns,
            SOURCES=power_of_2(sources),
        )  # fmt: skip
    return Demand(choice, tokens, weight, terms, order, planned)


@triton.jit(do_not_specialize=["count", "place_bits"])
def _measure(
    experts, scores, weight, position, source, kinds, valid, exempt, order, planned,
    tokens_of, weight_of, visual_weight_of, rows, cost,
    count, slots, num_experts, sources, spread, place_bits,
    RULE: tl.constexpr, BY_WEIGHT: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr, TOP: tl.constexpr,
    OWN: tl.constexpr, TEXT: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    token, cell, real = assignments(count, slots, TOKENS, K)
    here, slot = token < count, tl.arange(0, K)
    counts, seen = visual_of(kinds, valid, token, here, TEXT)
    expert = tl.load(experts + cell, mask=real, other=-1)
    heavy = tl.load(weight + token, mask=here, other=0)
    of = tl.load(source + token, mask=here, other=0)

    own = tl.maximum(expert, 0)
    score = tl.load(scores + token[:, None] * num_experts + own, mask=real, other=0.0)
    priority = priority_of(score, heavy[:, None] + tl.zeros([TOKENS, K], tl.int64), RULE, UNIT, SCALE)
    spared = tl.load(exempt + token, mask=here, other=0).to(tl.int1)
    priority = tl.where(spared[:, None], TOP, priority)
    place = tl.load(position + token, mask=here, other=0)[:, None] * spread + own
    place += tl.where((slot >= OWN)[None, :], num_experts, 0)
    tl.store(order + cell, ((TOP - priority) << place_bits) | place, mask=real)
    asks = real & counts[:, None] & (expert >= 0)
    tl.store(planned + cell, asks, mask=real)

    one = tl.full([TOKENS, K], 1, tl.int64)
    at = of[:, None] * num_experts + own
    tl.atomic_add(rows + at, one, mask=asks, sem="relaxed")
    if BY_WEIGHT:
        tl.atomic_add(cost + at, one * heavy[:, None], mask=asks, sem="relaxed")
    each = tl.arange(0, SOURCES)
    hit = (of[:, None] == each[None, :]) & counts[:, None]
    inside = each < sources
    tl.atomic_add(tokens_of + each, tl.sum(hit.to(tl.int64), 0), mask=inside, sem="relaxed")
    tl.atomic_add(weight_of + each, tl.sum(tl.where(hit, heavy[:, None], 0), 0), mask=inside, sem="relaxed")
    heavy = tl.where(hit & seen[:, None], heavy[:, None], 0)
    tl.atomic_add(visual_weight_of + each, tl.sum(heavy, 0), mask=inside, sem="relaxed")
