"""The kernel of a plan's statistics; reference implementation: ``macs.plan``. Equal, for both add whole
numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..capacity import LoadTable
from ..fixed_point import MASS_UNIT
from ..modality import TEXT, Tokens
from .shared import assignments, power_of_2, rint

if TYPE_CHECKING:
    from ..plan import Outcome, PlanStatistics

TILE = 512
"""Assignments that a program looks at together."""


def describe(
    tokens: Tokens, loads: LoadTable, experts: Tensor, weights: Tensor, outcome: Outcome
) -> PlanStatistics:
    """One launch, and the memory that it adds to."""
    from ..plan import LOADS, SCALARS, PlanStatistics

    count, k = experts.shape
    sources, num_experts = loads.rows.shape
    record = torch.zeros(len(SCALARS) + len(LOADS) * num_experts, dtype=torch.int64, device=experts.device)
    slots = outcome.placed.shape[1]
    columns = power_of_2(slots)
    block = max(1, TILE // columns)
    tensors = (
        tokens.kinds, tokens.valid, outcome.finite, experts, weights, outcome.placed, outcome.rerouted,
        outcome.active, outcome.unmet, loads.tokens, loads.weight, loads.visual_weight,
    )  # fmt: skip
    _describe[(max(1, triton.cdiv(count, block)),)](
        *(one.contiguous() for one in tensors), record, count, k, slots, num_experts, sources,
        TEXT=TEXT, MASS=MASS_UNIT, TOKENS=block, K=columns, SOURCES=power_of_2(sources),
    )  # fmt: skip
    return PlanStatistics(record)


@triton.jit(do_not_specialize=["count"])
def _describe(
    kinds, valid, finite, experts, weights, placed, rerouted, active, unmet, tokens_of, weight_of, visual_of,
    record, count, k, slots, num_experts, sources,
    TEXT: tl.constexpr, MASS: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        source = tl.arange(0, SOURCES)
        real = source < sources
        plans = tl.load(active + source, mask=real, other=0).to(tl.int64)
        failed = tl.load(unmet + source, mask=real, other=0).to(tl.int64)
        tl.atomic_add(record, tl.sum(real.to(tl.int64), 0), sem="relaxed")
        tl.atomic_add(record + 1, tl.sum(plans, 0), sem="relaxed")
        tl.atomic_add(record + 2, tl.sum(tl.load(tokens_of + source, mask=real, other=0), 0), sem="relaxed")
        tl.atomic_add(record + 4, tl.sum(tl.load(weight_of + source, mask=real, other=0), 0), sem="relaxed")
        tl.atomic_add(record + 5, tl.sum(tl.load(visual_of + source, mask=real, other=0), 0), sem="relaxed")
        tl.atomic_add(record + 7, tl.sum(plans * failed, 0), sem="relaxed")
    token, cell, held = assignments(count, slots, TOKENS, K)
    here = token < count
    counts = tl.load(valid + token, mask=here, other=0).to(tl.int1) & here
    seen = counts & (tl.load(kinds + token, mask=here, other=TEXT) != TEXT)
    odd = counts & (tl.load(finite + token, mask=here, other=1) == 0)
    tl.atomic_add(record + 3, tl.sum(seen.to(tl.int64), 0), sem="relaxed")
    tl.atomic_add(record + 6, tl.sum(odd.to(tl.int64), 0), sem="relaxed")

    held = held & counts[:, None]
    now = tl.load(placed + cell, mask=held, other=-1)
    moved = tl.load(rerouted + cell, mask=held, other=0).to(tl.int1)
    _, asked, own = assignments(count, k, TOKENS, K)
    own = own & counts[:, None]
    expert = tl.load(experts + asked, mask=own, other=-1)
    weight = tl.load(weights + asked, mask=own, other=0.0).to(tl.float64)
    mass = rint(tl.where(weight == weight, weight, 0.0) * MASS).to(tl.int64)
    own = own & (expert >= 0)
    for state in tl.static_range(3):  # kept, rerouted, dropped
        mine = own & moved
        if state == 0:
            mine = own & ~moved & (now >= 0)
        if state == 2:
            mine = own & ~moved & (now < 0)
        tl.atomic_add(record + 8 + state, tl.sum(tl.sum(mine.to(tl.int64), 1), 0), sem="relaxed")
        tl.atomic_add(record + 11 + state, tl.sum(tl.sum(tl.where(mine, mass, 0), 1), 0), sem="relaxed")
    loads = record + 14
    one = tl.full([TOKENS, K], 1, tl.int64)
    tl.atomic_add(loads + expert, one, mask=own & seen[:, None], sem="relaxed")
    tl.atomic_add(loads + num_experts + expert, one, mask=own, sem="relaxed")
    tl.atomic_add(loads + 2 * num_experts + now, one, mask=held & (now >= 0), sem="relaxed")
