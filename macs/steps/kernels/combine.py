"""Kernels of the output of a plan; reference: ``macs.steps.combine``.

Sums over a token's own experts are in float64 in both, so that they round alike in any order, but for one in
millions. The record is of integers, and equal.

    experts, placed     int64 [T, k']       planned   bool  [T, k']
    scores              float [T, E]        weights   float [T, k']
    source              int64 [T]           valid, finite  bool [T]     modality  int8 [T]
    active              bool  [S]           left      int64 [S, P or R]     remaining capacities
    out_experts, combined, rerouted   [T, k']   written
    record              int64 [17 + 3 E]    added to
    by_source           int64 [3, S]
    exempt              bool  [T]           local_experts  int64 [S, G]     of expanded drop
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tokens import TEXT, Tokens
from ..combine import Plan, PlanStatistics
from ..contracts import MASS_UNIT, Capacities, Counts, Demand, Field, LayerConstants, Placement, Routing
from .dispatch import on_device
from .shared import assignments, power_of_2, rint, visual_of

AT = {name: tl.constexpr(int(field)) for name, field in Field.__members__.items()}
AT_SOURCES, AT_PLANNED, AT_TOKENS = AT["SOURCES"], AT["PLANNED"], AT["TOKENS"]
AT_WEIGHT, AT_VISUAL_WEIGHT, AT_UNMET = AT["WEIGHT"], AT["VISUAL_WEIGHT"], AT["UNMET"]
AT_VISUAL, AT_NONFINITE, AT_KEPT = AT["VISUAL"], AT["NONFINITE"], AT["KEPT"]
AT_KEPT_MASS, AT_VISUAL_KEPT = AT["KEPT_MASS"], AT["VISUAL_KEPT"]

TILE, EXPANSION_TILE = 256, 512
"""Assignments that a program looks at together."""


def wide(weights: Tensor) -> tl.dtype:
    """The dtype in which weights are multiplied: float32 where they are no wider, as in torch."""
    return tl.float64 if weights.dtype == torch.float64 else tl.float32


def combine(
    demand: Demand, placement: Placement, capacities: Capacities, finite: Tensor | None, counts: Counts
) -> Plan:
    """One launch."""
    routing, tokens, placed = demand.routing, demand.tokens, placement.experts.contiguous()
    (count, slots), num_experts, sources = placed.shape, routing.scores.shape[1], len(capacities.active)
    added = slots > routing.top_k
    experts = torch.empty_like(placed) if added else placed
    weights = torch.empty_like(routing.weights, memory_format=torch.contiguous_format)
    rerouted = torch.empty(count, slots, dtype=torch.bool, device=placed.device)
    left = placement.remaining if placement.remaining_rows is None else placement.remaining_rows
    columns = power_of_2(slots)
    block = max(1, TILE // columns)
    tensors = (
        routing.experts, placed, demand.planned, routing.scores, routing.weights, tokens.source, tokens.valid,
        tokens.modality, tokens.valid if finite is None else finite,
    )  # fmt: skip
    _combine[(max(1, triton.cdiv(count, block)),)](
        *(tensor.contiguous() for tensor in tensors), capacities.active, left.contiguous(), experts, weights,
        rerouted, counts.record, counts.by_source,
        count, slots, num_experts, sources, left.shape[1],
        WIDE=wide(weights), SCORE=wide(routing.scores), TINY=torch.finfo(routing.scores.dtype).tiny,
        OWN=routing.top_k, MOVED=placement.moved, ADDED=added, RECORDED=finite is not None,
        BOUNDED=capacities.bounded, TEXT=TEXT,
        MASS=MASS_UNIT, LOADS_AT=len(Field), TOKENS=block, K=columns, SOURCES=power_of_2(sources),
        POOLS=power_of_2(left.shape[1]),
    )  # fmt: skip
    return Plan(experts, weights, rerouted, None if finite is None else PlanStatistics(counts.record))


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
    experts, placed, planned, scores, weights, source, valid, modality, finite, active, left,
    out_experts, combined, rerouted, record, by_source,
    count, slots, num_experts, sources, pools,
    WIDE: tl.constexpr, SCORE: tl.constexpr, TINY: tl.constexpr, OWN: tl.constexpr,
    MOVED: tl.constexpr, ADDED: tl.constexpr, RECORDED: tl.constexpr, BOUNDED: tl.constexpr,
    TEXT: tl.constexpr, MASS: tl.constexpr, LOADS_AT: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr,
    SOURCES: tl.constexpr, POOLS: tl.constexpr,
):  # fmt: skip
    token, cell, here = assignments(count, slots, TOKENS, K)
    slot, exists = tl.arange(0, K), token < count
    expert = tl.load(experts + cell, mask=here, other=-1)
    now = tl.load(placed + cell, mask=here, other=-1)
    weight = tl.load(weights + cell, mask=here, other=0.0)
    asks = here & tl.load(planned + cell, mask=here, other=0).to(tl.int1)
    changed = asks & (now != expert)
    moved = changed & (now >= 0)
    result = tl.where(changed, 0.0, weight.to(WIDE)).to(weight.dtype)
    if MOVED:
        own = here & (expert >= 0) & (slot < OWN)[None, :]
        row = scores + token[:, None] * num_experts
        score = tl.load(row + expert, mask=own, other=0.0)
        candidate = tl.load(row + now, mask=moved, other=0.0).to(SCORE)
        joined = share_of(candidate, score, tl.where(own, weight, 0.0).to(weight.dtype), SCORE, WIDE, TINY)
        result = tl.where(moved, joined, result).to(weight.dtype)
    counts, seen = visual_of(modality, valid, token, exists, TEXT)
    if ADDED:
        plans = tl.load(active + tl.load(source + token, mask=exists, other=0)).to(tl.int1)
        gone = here & ~plans[:, None] & (slot >= OWN)[None, :]
        now = tl.where(gone, -1, now)
        result = tl.where(gone, 0.0, result).to(weight.dtype)
        tl.store(out_experts + cell, now, mask=here)
    tl.store(combined + cell, result, mask=here)
    tl.store(rerouted + cell, moved, mask=here)
    if RECORDED:
        if tl.program_id(0) == 0:
            each = tl.arange(0, SOURCES)
            real = each < sources
            plans_ = tl.load(active + each, mask=real, other=0).to(tl.int64)
            if BOUNDED:
                pool = tl.arange(0, POOLS)
                inside = real[:, None] & (pool < pools)[None, :]
                spare = tl.load(left + each[:, None] * pools + pool[None, :], mask=inside, other=0)
                _add(record, AT_UNMET, plans_ * (tl.min(spare, 1) < 0).to(tl.int64))
            _add(record, AT_SOURCES, real.to(tl.int64))
            _add(record, AT_PLANNED, plans_)
            _add(record, AT_TOKENS, tl.load(by_source + each, mask=real, other=0))
            _add(record, AT_WEIGHT, tl.load(by_source + sources + each, mask=real, other=0))
            _add(record, AT_VISUAL_WEIGHT, tl.load(by_source + 2 * sources + each, mask=real, other=0))
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
            _add(record, AT_VISUAL_KEPT + state, tl.sum((some & seen[:, None]).to(tl.int64), 1))
        loads = record + LOADS_AT
        one = tl.full([TOKENS, K], 1, tl.int64)
        held = here & counts[:, None] & (now >= 0)
        tl.atomic_add(loads + expert, one, mask=mine & seen[:, None], sem="relaxed")
        tl.atomic_add(loads + num_experts + expert, one, mask=mine, sem="relaxed")
        tl.atomic_add(loads + 2 * num_experts + now, one, mask=held, sem="relaxed")


@triton.jit
def _add(record, place, amounts):
    """Add the sum of the amounts to one number of the record."""
    tl.atomic_add(record + place, tl.sum(amounts, 0), sem="relaxed")


def routing_from_map(chosen: Tensor, probs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """One launch."""
    count, num_experts = chosen.shape
    experts = torch.empty(count, top_k, dtype=torch.int64, device=chosen.device)
    weights = torch.empty(count, top_k, dtype=probs.dtype, device=chosen.device)
    if count:
        width = power_of_2(num_experts)
        block = max(1, 2048 // width)
        with on_device(chosen.device):
            _routing_from_map[(triton.cdiv(count, block),)](
                chosen.contiguous(), probs.contiguous(), experts, weights, count, top_k, num_experts,
                TOKENS=block, EXPERTS=width, K=power_of_2(top_k),
            )  # fmt: skip
    return experts, weights


@triton.jit(do_not_specialize=["count"])
def _routing_from_map(
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
        with on_device(experts.device):
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
    value = tl.zeros([TOKENS, EXPERTS], WIDE)
    hit = tl.zeros([TOKENS, EXPERTS], tl.int32)
    for slot in range(slots):
        expert = tl.load(experts + token * slots + slot, mask=here, other=-1)
        weight = tl.load(weights + token * slots + slot, mask=here)
        mine = expert[:, None] == column[None, :]
        hit = tl.where(mine, 1, hit)
        value = tl.where(mine, weight.to(WIDE)[:, None], value)
    cell = token[:, None] * num_experts + column[None, :]
    inside = here[:, None] & (column < num_experts)[None, :]
    tl.store(chosen + cell, hit != 0, mask=inside)
    tl.store(probs + cell, value.to(probs.dtype.element_ty), mask=inside)


def add_local_experts(routing: Routing, tokens: Tokens, constants: LayerConstants) -> Routing:
    """One launch."""
    (count, k), more = routing.experts.shape, constants.local_experts.shape[1]
    experts = torch.empty(count, k + more, dtype=torch.int64, device=routing.experts.device)
    weights = torch.empty(count, k + more, dtype=routing.weights.dtype, device=routing.experts.device)
    if count:
        added, own = power_of_2(more), power_of_2(k)
        block = max(1, EXPANSION_TILE // max(added, own))
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
