"""What leaves a plan: experts, combine weights, and what the plan did.

Shapes: T tokens, k assignments of a token (k' with those a policy adds), E experts, S sources.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .capacity import loads_of
from .contracts import Choice, Demand, Placement, Room, Sums
from .fixed_point import MASS_UNIT, to_fixed
from .kernels.dispatch import fused


@dataclass(frozen=True)
class Combined:
    """experts int64 [T, k'] (-1: dropped), weights [T, k'], 0 where dropped, rerouted bool [T, k']."""

    experts: Tensor
    weights: Tensor
    rerouted: Tensor


@dataclass(frozen=True)
class Findings:
    """What a plan's record tells beside where assignments ended: its sums, the record among them, to be
    added to; finite bool [T]: tokens whose features are; excess bool [S]: sources that drop more than they
    may, if that has a bound."""

    sums: Sums
    finite: Tensor
    excess: Tensor | None


@fused
def combine(
    demand: Demand, placement: Placement, room: Room, drop_padding: bool, findings: Findings | None
) -> Combined:
    """Where assignments end, with ``combine_weights``; writes the record where there are ``findings``.

    With ``drop_padding`` padding of sources that plan goes nowhere; of those that do not, added experts are
    nobody's.
    """
    weights, rerouted = combine_weights(demand, placement.experts)
    experts, top_k, source = placement.experts, demand.choice.top_k, demand.tokens.source
    if drop_padding:
        padding = (room.active[source] & ~demand.tokens.valid)[:, None]
        experts, weights = experts.masked_fill(padding, -1), weights.masked_fill(padding, 0)
    if experts.shape[1] > top_k:
        added = torch.arange(experts.shape[1], device=experts.device) >= top_k
        added = ~room.active[source][:, None] & added
        experts, weights = experts.masked_fill(added, -1), weights.masked_fill(added, 0)
    combined = Combined(experts, weights, rerouted)
    if findings is not None:
        describe(demand, combined, room, unmet_of(placement, room, findings.excess), findings)
    return combined


def combine_weights(demand: Demand, placed: Tensor) -> tuple[Tensor, Tensor]:
    """Combine weights of the placed assignments, float [T, k'], 0 where dropped, and which of them were
    rerouted, bool [T, k'].

    Kept ones pass through untouched. A rerouted one gets ``weight_of_score`` of its new expert.
    """
    choice = demand.choice
    changed = demand.planned & (placed != choice.experts)
    rerouted = changed & (placed >= 0)
    moved = weight_of_score(choice.scores.gather(1, placed.clamp(min=0)), choice)
    return torch.where(changed, moved.masked_fill(~rerouted, 0.0), choice.weights), rerouted


def weight_of_score(score: Tensor, choice: Choice) -> Tensor:
    """Combine weight of an expert that joins a token with ``score`` [T, m]: s_c sum(w) / sum(s).

    The sums are over the token's own k, so scores and weights keep their proportion; they are taken in
    float64, so that the order in which a router names its experts does not matter. Never more than sum(w),
    as a correction bias or scores that vanish could have it.
    """
    experts, weights = choice.experts[:, : choice.top_k], choice.weights[:, : choice.top_k]
    real = experts >= 0
    total = torch.where(real, weights, 0).sum(1, keepdim=True, dtype=torch.float64).to(weights.dtype)
    own = torch.where(real, choice.scores.gather(1, experts.clamp(min=0)), 0)
    score_sum = own.sum(1, keepdim=True, dtype=torch.float64).to(own.dtype)
    share = (score / score_sum.clamp(min=torch.finfo(score_sum.dtype).tiny)).clamp(max=1.0)
    return share.to(weights.dtype) * total


def unmet_of(placement: Placement, room: Room, excess: Tensor | None) -> Tensor:
    """For which sources a guard could not be met, bool [S]."""
    unmet = torch.zeros_like(room.active) if excess is None else excess
    if not room.bounded:
        return unmet
    left = placement.room if placement.row_room is None else placement.row_room
    return unmet | (left < 0).any(1)


KEPT, REROUTED, DROPPED, UNCOUNTED = range(4)


def describe(demand: Demand, combined: Combined, room: Room, unmet: Tensor, findings: Findings) -> None:
    """Add to the record what became of a router's choice: ``SCALARS`` and ``LOADS``."""
    choice, tokens, sums = demand.choice, demand.tokens, findings.sums
    top_k, num_experts, visual = choice.top_k, choice.scores.shape[1], tokens.visual
    asked, own = demand.planned[:, :top_k], choice.experts[:, :top_k]
    state = torch.where(combined.rerouted[:, :top_k], REROUTED, (combined.experts[:, :top_k] < 0) * DROPPED)
    state = state.masked_fill_(~asked, UNCOUNTED).flatten()
    mass = to_fixed(choice.weights[:, :top_k], MASS_UNIT).flatten()
    # Of text and of visual tokens, side by side, here and below.
    kind = state.view(-1, top_k) + 4 * visual[:, None]
    counts = mass.new_zeros(8).scatter_add_(0, kind.flatten(), torch.ones_like(mass)).view(2, 4)
    masses = mass.new_zeros(4).scatter_add_(0, state, mass)
    before = loads_of((own + num_experts * visual[:, None]).masked_fill_(~asked, -1), 2 * num_experts)
    before = before.view(2, num_experts)
    after = combined.experts.masked_fill(~tokens.valid[:, None], -1)
    scalars = (
        torch.ones_like(room.active),
        room.active,
        sums.tokens,
        visual,
        sums.weight,
        sums.visual_weight,
        ~findings.finite & tokens.valid,
        unmet & room.active,
    )
    parts = [
        torch.stack([one.sum() for one in scalars]),
        counts.sum(0)[:UNCOUNTED],
        masses[:UNCOUNTED],
        counts[1, :DROPPED],
    ]
    parts += [before[1], before.sum(0), loads_of(after, num_experts)]
    sums.record.add_(torch.cat(parts))


@fused
def choice_in(chosen: Tensor, probs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """What ``map_of`` made a map of: the columns of the true entries of a map bool [T, E], int64 [T, k],
    ascending, -1: none, and their weights out of probs [T, E] (of none, any)."""
    rows, num_experts = chosen.shape
    column = torch.where(chosen, chosen.cumsum(1) - 1, top_k).clamp(max=top_k)
    expert = torch.arange(num_experts, device=chosen.device).expand(rows, -1)
    experts = torch.full((rows, top_k + 1), -1, dtype=torch.int64, device=chosen.device)
    experts = experts.scatter_(1, column, expert)[:, :top_k].contiguous()
    return experts, probs.gather(1, experts.clamp(min=0))


@fused
def map_of(experts: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """A multi-hot map bool [T, E] of experts int64 [T, m] (-1: none), and their weights [T, m], so too."""
    column = experts.masked_fill(experts < 0, num_experts)
    chosen = column.new_zeros(len(column), num_experts + 1, dtype=torch.bool).scatter_(1, column, True)
    probs = weights.new_zeros(len(column), num_experts + 1).scatter_(1, column, weights)
    return chosen[:, :num_experts].contiguous(), probs[:, :num_experts].contiguous()
