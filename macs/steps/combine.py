"""The output of a plan: experts, combine weights, and the record of what the plan did.

Shapes: T tokens, k assignments of a token (k' with those a policy adds), E experts, S sources.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contracts import Capacities, Counts, Demand, Field, Placement, Routing
from .fixed_point import MASS_UNIT, to_fixed
from .kernels.dispatch import kernels_enabled


@dataclass(frozen=True)
class Combined:
    """experts int64 [T, k'] (-1: dropped), weights [T, k'], 0 where dropped, rerouted bool [T, k']."""

    experts: Tensor
    weights: Tensor
    rerouted: Tensor


def combine(
    demand: Demand, placement: Placement, capacities: Capacities, finite: Tensor | None, counts: Counts
) -> Combined:
    """Final experts with their ``combine_weights``; adds to ``counts.record`` where ``finite`` is given.

    Of sources that do not plan, the columns that a policy appended are dropped.

    Args:
        demand: the assignments.
        placement: where they were placed.
        capacities: which sources plan, and whether rows are bounded.
        finite: tokens with finite features, bool [T]; none: nothing is recorded.
        counts: of this plan.

    Returns:
        What the engine gets.
    """
    if kernels_enabled(demand.device):
        from .kernels import combine as kernels

        return kernels.combine(demand, placement, capacities, finite, counts)
    weights, rerouted = combine_weights(demand, placement)
    experts, top_k = placement.experts, demand.routing.top_k
    if experts.shape[1] > top_k:
        added = torch.arange(experts.shape[1], device=experts.device) >= top_k
        added = ~capacities.active[demand.tokens.source][:, None] & added
        experts, weights = experts.masked_fill(added, -1), weights.masked_fill(added, 0)
    combined = Combined(experts, weights, rerouted)
    if finite is not None:
        _record(demand, combined, placement, capacities, finite, counts)
    return combined


def combine_weights(demand: Demand, placement: Placement) -> tuple[Tensor, Tensor]:
    """Combine weights [T, k'] of the placed assignments, 0 where dropped, and which are rerouted, bool.

    Kept assignments pass through untouched; a rerouted one gets ``weight_of_score`` of its new expert.
    """
    routing, placed = demand.routing, placement.experts
    dropped = demand.planned & (placed < 0)
    weights = routing.weights.masked_fill(dropped, 0.0)
    if not placement.moved:
        return weights, torch.zeros_like(dropped)
    rerouted = demand.planned & (placed != routing.experts) & ~dropped
    moved = weight_of_score(routing.scores.gather(1, placed.clamp(min=0)), routing)
    return torch.where(rerouted, moved, weights), rerouted


def weight_of_score(score: Tensor, routing: Routing) -> Tensor:
    """Combine weight of an expert that joins a token with ``score`` [T, m]: s_c sum(w) / sum(s).

    The sums are over the token's own k, in float64, so that the order of a router's experts does not matter.
    At most sum(w), which a correction bias or vanishing scores could exceed.
    """
    experts, weights = routing.experts[:, : routing.top_k], routing.weights[:, : routing.top_k]
    real = experts >= 0
    total = torch.where(real, weights, 0).sum(1, keepdim=True, dtype=torch.float64).to(weights.dtype)
    chosen = torch.where(real, routing.scores.gather(1, experts.clamp(min=0)), 0)
    score_sum = chosen.sum(1, keepdim=True, dtype=torch.float64).to(chosen.dtype)
    share = (score / score_sum.clamp(min=torch.finfo(score_sum.dtype).tiny)).clamp(max=1.0)
    return share.to(weights.dtype) * total


def loads_of(experts: Tensor, num_experts: int) -> Tensor:
    """Assignments of each expert.

    Args:
        experts: int64, any shape; -1: none.
        num_experts: E.

    Returns:
        int64 [E].
    """
    column = torch.where(experts < 0, num_experts, experts).flatten()
    return column.new_zeros(num_experts + 1).scatter_add(0, column, torch.ones_like(column))[:-1]


def _record(
    demand: Demand,
    combined: Combined,
    placement: Placement,
    capacities: Capacities,
    finite: Tensor,
    counts: Counts,
) -> None:
    """Add ``Field`` and ``LOADS`` of this plan to the record."""
    routing, tokens, record = demand.routing, demand.tokens, counts.record
    top_k, num_experts, visual = routing.top_k, routing.scores.shape[1], tokens.visual
    planned, now = demand.planned[:, :top_k].long(), combined.experts
    unmet = torch.zeros_like(capacities.active)
    if capacities.bounded:
        remaining = placement.remaining if placement.remaining_rows is None else placement.remaining_rows
        unmet = capacities.active & (remaining < 0).any(1)
    record[: Field.SOURCES].add_(counts.by_source.sum(1))
    flags = torch.stack([torch.ones_like(unmet), capacities.active, unmet])
    record[Field.SOURCES : Field.VISUAL].add_(flags.sum(1))
    record[Field.VISUAL : Field.KEPT].add_(torch.stack([visual, tokens.valid & ~finite]).sum(1))
    state = combined.rerouted[:, :top_k] + 2 * (now[:, :top_k] < 0)  # kept, rerouted, dropped
    planned_visual, expert = planned * visual[:, None], routing.experts[:, :top_k].clamp(min=0)
    mass = planned * to_fixed(routing.weights[:, :top_k], MASS_UNIT)
    index = [state + Field.KEPT, state + Field.KEPT_MASS, state + Field.VISUAL_KEPT]
    index += [expert + len(Field), expert + len(Field) + num_experts]
    amount = [planned, mass, planned_visual, planned_visual, planned]
    record.scatter_add_(0, torch.stack(index).flatten(), torch.stack(amount).flatten())
    final = now.clamp(min=0) + len(Field) + 2 * num_experts
    record.scatter_add_(0, final.flatten(), ((now >= 0) & tokens.valid[:, None]).long().flatten())


def routing_from_map(chosen: Tensor, probs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``map_of``.

    Args:
        chosen: multi-hot map, bool [T, E].
        probs: combine weights of its entries, [T, E].
        top_k: k.

    Returns:
        Experts int64 [T, k], ascending (-1: none), and their weights [T, k] (arbitrary where -1).
    """
    if kernels_enabled(chosen.device):
        from .kernels import combine as kernels

        return kernels.routing_from_map(chosen, probs, top_k)
    rows, num_experts = chosen.shape
    column = torch.where(chosen, chosen.cumsum(1) - 1, top_k).clamp(max=top_k)
    expert = torch.arange(num_experts, device=chosen.device).expand(rows, -1)
    experts = torch.full((rows, top_k + 1), -1, dtype=torch.int64, device=chosen.device)
    experts = experts.scatter_(1, column, expert)[:, :top_k].contiguous()
    return experts, probs.gather(1, experts.clamp(min=0))


def map_of(experts: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Experts int64 [T, m] (-1: none) and weights [T, m] as a multi-hot map bool [T, E] and probs [T, E]."""
    if kernels_enabled(experts.device):
        from .kernels import combine as kernels

        return kernels.map_of(experts, weights, num_experts)
    column = experts.masked_fill(experts < 0, num_experts)
    chosen = column.new_zeros(len(column), num_experts + 1, dtype=torch.bool).scatter_(1, column, True)
    probs = weights.new_zeros(len(column), num_experts + 1).scatter_(1, column, weights)
    return chosen[:, :num_experts].contiguous(), probs[:, :num_experts].contiguous()
