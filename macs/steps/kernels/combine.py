"""Kernels of what leaves a plan; reference implementation: ``macs.steps.combine``.

Sums over a token's own are in float64 in both, so that in whatever order they are added the result is rounded
alike, but for one in millions. The record is of whole numbers, and equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tokens import TEXT
from ..combine import Combined, Findings
from ..contracts import SCALARS, Demand, Placement, Room
from ..fixed_point import MASS_UNIT
from .shared import assignments, power_of_2, rint, visual_of

(
    AT_SOURCES, AT_PLANNED, AT_TOKENS, AT_VISUAL, AT_WEIGHT, AT_VISUAL_WEIGHT, AT_NONFINITE, AT_UNMET,
    AT_KEPT, _, _, AT_KEPT_MASS, _, _, AT_VISUAL_KEPT, _,
) = (tl.constexpr(place) for place in range(len(SCALARS)))  # fmt: skip
"""Where in a record each of ``SCALARS`` is; the loads come behind them."""

TILE = 256
"""Assignments that a program looks at together."""


def wide(weights: Tensor) -> tl.dtype:
    """What weights are multiplied in: float32 where they are no wider, as in torch."""
    return tl.float64 if weights.dtype == torch.float64 else tl.float32


def combine(
    demand: Demand, placement: Placement, room: Room, drop_padding: bool, findings: Findings | None
) -> Combined:
    """One launch."""
    choice, tokens, placed = demand.choice, demand.tokens, placement.experts.contiguous()
    (count, slots), num_experts = placed.shape, choice.scores.shape[1]
    sources = len(room.active)
    changes = drop_padding or slots > choice.top_k
    experts = torch.empty_like(placed) if changes else placed
    weights = torch.empty_like(choice.weights, memory_format=torch.contiguous_format)
    rerouted = torch.empty(count, slots, dtype=torch.bool, device=placed.device)
    left = placement.room if placement.row_room is None else placement.row_room
    sums = None if findings is None else findings.sums
    finite = tokens.valid if findings is None else findings.finite
    excess = room.active if findings is None or findings.excess is None else findings.excess
    told = (room.active,) * 4 if sums is None else (sums.record, sums.tokens, sums.weight, sums.visual_weight)
    columns = power_of_2(slots)
    block = max(1, TILE // columns)
    tensors = (
        choice.experts, placed, demand.planned, choice.scores, choice.weights, tokens.source, tokens.valid,
        tokens.kinds, finite,
    )  # fmt: skip
    _combine[(max(1, triton.cdiv(count, block)),)](
        *(one.contiguous() for one in tensors), room.active, excess, left.contiguous(),
        experts, weights, rerouted, *told, count, slots, num_experts, sources, left.shape[1],
        WIDE=wide(weights), SCORE=wide(choice.scores), TINY=torch.finfo(choice.scores.dtype).tiny,
        OWN=choice.top_k, PADDING=drop_padding, ADDED=slots > choice.top_k, TOLD=sums is not None,
        BOUNDED=room.bounded, LIMITED=findings is not None and findings.excess is not None, TEXT=TEXT,
        MASS=MASS_UNIT, LOADS_AT=len(SCALARS), TOKENS=block, K=columns, SOURCES=power_of_2(sources),
        ROOM=power_of_2(left.shape[1]),
    )  # fmt: skip
    return Combined(experts, weights, rerouted)


@triton.jit
def share_of(candidate, scores, weights, SCORE: tl.constexpr, WIDE: tl.constexpr, TINY: tl.constexpr):
    """Combine weight of an expert that joins with score ``candidate`` [TOKENS, M] in SCORE: its share of the
    token's own scores [TOKENS, K], of the sum of its weights."""
    total = tl.sum(weights.to(tl.float64), 1).to(WIDE).to(weights.dtype)
    # What torch takes in half precision it takes in float32, and rounds.
    score_sum = tl.sum(scores.to(tl.float64), 1).to(SCORE).to(scores.dtype)
    divisor = score_sum.to(SCORE)[:, None] + tl.zeros_like(candidate)
    divisor = tl.where(divisor < TINY, TINY, divisor)  # NaN stays, as in a clamp
    share = tl.div_rn(candidate, divisor).to(scores.dtype) if tl.float32 == SCORE else candidate / divisor
    share = tl.where(share.to(WIDE) > 1.0, 1.0, share.to(WIDE)).to(weights.dtype)
    return share.to(WIDE) * total.to(WIDE)[:, None]


@triton.jit(do_not_specialize=["count"])
def _combine(
    experts, placed, planned, scores, weights, source, valid, kinds, finite, active, excess, left,
    out_experts, combined, rerouted, record, tokens_of, weight_of, visual_weight_of,
    count, slots, num_experts, sources, pools,
    WIDE: tl.constexpr, SCORE: tl.constexpr, TINY: tl.constexpr, OWN: tl.constexpr, PADDING: tl.constexpr,
    ADDED: tl.constexpr, TOLD: tl.constexpr, BOUNDED: tl.constexpr, LIMITED: tl.constexpr,
    TEXT: tl.constexpr, MASS: tl.constexpr, LOADS_AT: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr,
    SOURCES: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    token, cell, here = assignments(count, slots, TOKENS, K)
    slot, exists = tl.arange(0, K), token < count
    expert = tl.load(experts + cell, mask=here, other=-1)
    now = tl.load(placed + cell, mask=here, other=-1)
    weight = tl.load(weights + cell, mask=here, other=0.0)
    asks = here & tl.load(planned + cell, mask=here, other=0).to(tl.int1)
    changed = asks & (now != expert)
    moved = changed & (now >= 0)
    own = here & (expert >= 0) & (slot < OWN)[None, :]
    row = scores + token[:, None] * num_experts
    score = tl.load(row + expert, mask=own, other=0.0)
    candidate = tl.load(row + now, mask=moved, other=0.0).to(SCORE)
    joined = share_of(candidate, score, tl.where(own, weight, 0.0).to(weight.dtype), SCORE, WIDE, TINY)
    told = tl.where(changed, tl.where(moved, joined, 0.0), weight.to(WIDE)).to(weight.dtype)
    counts, seen = visual_of(kinds, valid, token, exists, TEXT)
    if PADDING or ADDED:
        plans = tl.load(active + tl.load(source + token, mask=exists, other=0)).to(tl.int1)
        gone = here & False
        if PADDING:
            gone = gone | (plans & ~counts)[:, None]
        if ADDED:
            gone = gone | (~plans[:, None] & (slot >= OWN)[None, :])
        now = tl.where(gone, -1, now)
        told = tl.where(gone, 0.0, told).to(weight.dtype)
        tl.store(out_experts + cell, now, mask=here)
    tl.store(combined + cell, told, mask=here)
    tl.store(rerouted + cell, moved, mask=here)
    if TOLD:
        if tl.program_id(0) == 0:
            each = tl.arange(0, SOURCES)
            real = each < sources
            plans_ = tl.load(active + each, mask=real, other=0).to(tl.int64)
            failed = real & False
            if LIMITED:
                failed = tl.load(excess + each, mask=real, other=0).to(tl.int1)
            if BOUNDED:
                pool = tl.arange(0, ROOM)
                inside = real[:, None] & (pool < pools)[None, :]
                spare = tl.load(left + each[:, None] * pools + pool[None, :], mask=inside, other=0)
                failed = failed | (tl.min(spare, 1) < 0)
            _add(record, AT_SOURCES, real.to(tl.int64))
            _add(record, AT_PLANNED, plans_)
            _add(record, AT_TOKENS, tl.load(tokens_of + each, mask=real, other=0))
            _add(record, AT_WEIGHT, tl.load(weight_of + each, mask=real, other=0))
            _add(record, AT_VISUAL_WEIGHT, tl.load(visual_weight_of + each, mask=real, other=0))
            _add(record, AT_UNMET, plans_ * failed.to(tl.int64))
        odd = counts & (tl.load(finite + token, mask=exists, other=1) == 0)
        _add(record, AT_VISUAL, seen.to(tl.int64))
        _add(record, AT_NONFINITE, odd.to(tl.int64))
        mine = asks & (slot < OWN)[None, :]
        mass = weight.to(tl.float64)
        mass = rint(tl.where(mass == mass, mass, 0.0) * MASS).to(tl.int64)
        for state in tl.static_range(3):  # kept, rerouted, dropped
            some = mine & moved
            if state == 0:
                some = mine & ~moved & (now >= 0)
            if state == 2:
                some = mine & ~moved & (now < 0)
            _add(record, AT_KEPT + state, tl.sum(some.to(tl.int64), 1))
            _add(record, AT_KEPT_MASS + state, tl.sum(tl.where(some, mass, 0), 1))
            if state < 2:
                _add(record, AT_VISUAL_KEPT + state, tl.sum((some & seen[:, None]).to(tl.int64), 1))
        loads = record + LOADS_AT
        one = tl.full([TOKENS, K], 1, tl.int64)
        held = here & counts[:, None] & (now >= 0)
        tl.atomic_add(loads + expert, one, mask=mine & seen[:, None], sem="relaxed")
        tl.atomic_add(loads + num_experts + expert, one, mask=mine, sem="relaxed")
        tl.atomic_add(loads + 2 * num_experts + now, one, mask=held, sem="relaxed")


@triton.jit
def _add(record, place, amounts):
    """Add the sum of these to one number of the record."""
    tl.atomic_add(record + place, tl.sum(amounts, 0), sem="relaxed")


def choice_in(chosen: Tensor, probs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """One launch."""
    count, num_experts = chosen.shape
    experts = torch.empty(count, top_k, dtype=torch.int64, device=chosen.device)
    weights = torch.empty(count, top_k, dtype=probs.dtype, device=chosen.device)
    if count:
        width = power_of_2(num_experts)
        block = max(1, 2048 // width)
        _choice_in[(triton.cdiv(count, block),)](
            chosen.contiguous(), probs.contiguous(), experts, weights, count, top_k, num_experts,
            TOKENS=block, EXPERTS=width, K=power_of_2(top_k),
        )  # fmt: skip
    return experts, weights


@triton.jit(do_not_specialize=["count"])
def _choice_in(
    chosen, probs, experts, weights, count, top_k, num_experts,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here, expert, slot = token < count, tl.arange(0, EXPERTS), tl.arange(0, K)
    inside = here[:, None] & (expert < num_experts)[None, :]
    cell = token[:, None] * num_experts + expert[None, :]
    hit = tl.load(chosen + cell, mask=inside, other=0).to(tl.int1)
    weight = tl.load(probs + cell, mask=hit, other=0.0)
    number = tl.cumsum(hit.to(tl.int32), 1)
    at = token[:, None] * top_k + number - 1
    mine = hit & (number <= top_k)
    tl.store(experts + at, expert[None, :] + tl.zeros_like(at), mask=mine)
    tl.store(weights + at, weight, mask=mine)
    none = here[:, None] & (slot < top_k)[None, :] & (slot[None, :] >= tl.sum(hit.to(tl.int32), 1)[:, None])
    at = token[:, None] * top_k + slot[None, :]
    tl.store(experts + at, tl.full([TOKENS, K], -1, tl.int64), mask=none)
    first = tl.load(probs + token * num_experts, mask=here, other=0.0)
    tl.store(weights + at, first[:, None] + tl.zeros([TOKENS, K], first.dtype), mask=none)


def map_of(experts: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """One launch."""
    count, slots = experts.shape
    chosen = torch.empty(count, num_experts, dtype=torch.bool, device=experts.device)
    probs = torch.empty(count, num_experts, dtype=weights.dtype, device=experts.device)
    if count:
        width = power_of_2(num_experts)
        block = max(1, 2048 // width)
        _map[(triton.cdiv(count, block),)](
            experts.contiguous(), weights.contiguous(), chosen, probs, count, slots, num_experts,
            WIDE=wide(weights), TOKENS=block, EXPERTS=width,
        )  # fmt: skip
    return chosen, probs


@triton.jit(do_not_specialize=["count"])
def _map(
    experts, weights, chosen, probs, count, slots, num_experts,
    WIDE: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = token < count
    column = tl.arange(0, EXPERTS)
    told = tl.zeros([TOKENS, EXPERTS], WIDE)
    hit = tl.zeros([TOKENS, EXPERTS], tl.int32)
    for slot in range(slots):
        expert = tl.load(experts + token * slots + slot, mask=here, other=-1)
        weight = tl.load(weights + token * slots + slot, mask=here)
        mine = expert[:, None] == column[None, :]
        hit = tl.where(mine, 1, hit)
        told = tl.where(mine, weight.to(WIDE)[:, None], told)
    cell = token[:, None] * num_experts + column[None, :]
    inside = here[:, None] & (column < num_experts)[None, :]
    tl.store(chosen + cell, hit != 0, mask=inside)
    tl.store(probs + cell, told.to(probs.dtype.element_ty), mask=inside)
