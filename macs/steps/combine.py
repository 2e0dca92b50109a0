"""The plan: experts, combine weights, and the record of what it did.

Shapes: T tokens, k assignments of a token (k' with those a policy adds), E experts, S sources.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tokens import Tokens
from .contracts import (
    LOADS,
    MASS_UNIT,
    UNITS,
    Capacities,
    Counts,
    Demand,
    Field,
    LayerConstants,
    Placement,
    Routing,
    to_fixed,
)
from .kernels.dispatch import kernels_enabled


def scalar_of(records: Tensor, name: str) -> Tensor:
    """A scalar of ``Field`` of records int64 [..., 17 + 3 E], by its name in lower case: float64 [...]."""
    field = Field[name.upper()]
    return records[..., field].double() / UNITS.get(field, 1)


def load_of(records: Tensor, name: str) -> Tensor:
    """Loads of ``LOADS`` out of records int64 [..., 17 + 3 E]: int64 [..., E]."""
    return records[..., len(Field) :].unflatten(-1, (len(LOADS), -1))[..., LOADS.index(name), :]


@dataclass(frozen=True)
class PlanStatistics:
    """What a plan did, on the plan's device; every field adds up over sources and ranks.

    record int64 [17 + 3 E]. Its numbers are attributes: each name of ``Field`` in lower case is a float64
    scalar (``planned``: sources that planned; masses: sums of combine weights); ``load_visual``,
    ``load_before`` and ``load_after`` are int64 [E], assignments of valid tokens: of visual tokens before
    planning, of all before, of all after.
    """

    record: Tensor

    def __getattr__(self, name: str) -> Tensor:
        if name.upper() in Field.__members__:
            return scalar_of(self.record, name)
        if name in LOADS:
            return load_of(self.record, name)
        names = (*(field.lower() for field in Field.__members__), *LOADS)
        raise AttributeError(f"PlanStatistics has no {name!r}; it has {', '.join(names)}")


@dataclass(frozen=True)
class Plan:
    """Where every assignment of a layer's tokens goes; statistics only where requested.

    experts  int64 [T, k']  -1: dropped
    weights  [T, k']        combine weights, in the dtype they came in; 0 where dropped
    rerouted bool [T, k']
    k' is k for every policy but expanded drop, which may add the experts on the token's rank.
    """

    experts: Tensor
    weights: Tensor
    rerouted: Tensor
    statistics: PlanStatistics | None

    def as_map(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """The plan as multi-hot routing_map bool [T, E] and probs [T, E], in the weights' dtype."""
        if kernels_enabled(self.experts.device):
            from .kernels import combine as kernels

            return kernels.map_of(self.experts, self.weights, num_experts)
        column = self.experts.masked_fill(self.experts < 0, num_experts)
        shape = len(column), num_experts + 1
        chosen = column.new_zeros(shape, dtype=torch.bool).scatter_(1, column, True)
        probs = self.weights.new_zeros(shape).scatter_(1, column, self.weights)
        return chosen[:, :num_experts].contiguous(), probs[:, :num_experts].contiguous()


def combine(
    demand: Demand, placement: Placement, capacities: Capacities, finite: Tensor | None, counts: Counts
) -> Plan:
    """Final experts and combine weights; adds to ``counts.record`` where ``finite`` is given.

    Kept assignments keep their weights; a rerouted one gets ``weight_of_score`` of its new expert. Of sources
    that do not plan, the columns that a policy appended are dropped.

    Args:
        demand: the assignments.
        placement: where they were placed.
        capacities: which sources plan, and whether rows are bounded.
        finite: tokens with finite features, bool [T]; none: nothing is recorded.
        counts: of this plan.

    Returns:
        The plan, with statistics where ``finite`` is given.
    """
    if kernels_enabled(demand.weight.device):
        from .kernels import combine as kernels

        return kernels.combine(demand, placement, capacities, finite, counts)
    routing, experts, top_k = demand.routing, placement.experts, demand.routing.top_k
    dropped = demand.planned & (experts < 0)
    weights, rerouted = routing.weights.masked_fill(dropped, 0.0), torch.zeros_like(dropped)
    if placement.moved:
        rerouted = demand.planned & (experts != routing.experts) & ~dropped
        moved = weight_of_score(routing.scores.gather(1, experts.clamp(min=0)), routing)
        weights = torch.where(rerouted, moved, weights)
    if experts.shape[1] > top_k:
        added = torch.arange(experts.shape[1], device=experts.device) >= top_k
        added = ~capacities.active[demand.tokens.source][:, None] & added
        experts, weights = experts.masked_fill(added, -1), weights.masked_fill(added, 0)
    plan = Plan(experts, weights, rerouted, None if finite is None else PlanStatistics(counts.record))
    if finite is not None:
        _record(demand, plan, placement, capacities, finite, counts)
    return plan


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


def add_local_experts(routing: Routing, tokens: Tokens, constants: LayerConstants) -> Routing:
    """Append the G experts of the token's own rank, each with ``weight_of_score``; -1 where the token has
    that expert already, may not be sent there, is padding or is exempt."""
    if kernels_enabled(routing.experts.device):
        from .kernels import combine as kernels

        return kernels.add_local_experts(routing, tokens, constants)
    experts, scores = routing.experts, routing.scores
    local, num_experts = constants.local_experts[tokens.source], scores.shape[1]
    used = scores.new_zeros(len(scores), num_experts + 1, dtype=torch.bool)
    used = used.scatter_(1, experts.masked_fill(experts < 0, num_experts), True)
    score = scores.gather(1, local)
    open_ = ~used.gather(1, local) & (tokens.valid & ~tokens.exempt)[:, None] & (score > 0)
    added = torch.where(open_, local, -1)
    weights = torch.where(open_, weight_of_score(score, routing), 0)
    return Routing(
        torch.cat([experts, added], 1), torch.cat([routing.weights, weights], 1), scores, routing.top_k
    )


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
    plan: Plan,
    placement: Placement,
    capacities: Capacities,
    finite: Tensor,
    counts: Counts,
) -> None:
    """Add ``Field`` and ``LOADS`` of this plan to the record."""
    routing, tokens, record = demand.routing, demand.tokens, counts.record
    top_k, num_experts, visual = routing.top_k, routing.scores.shape[1], tokens.visual
    planned, kept, active = demand.planned[:, :top_k], plan.experts >= 0, capacities.active
    remaining = placement.remaining if placement.remaining_rows is None else placement.remaining_rows
    unmet = active & (remaining < 0).any(1) if capacities.bounded else torch.zeros_like(active)
    by_source = torch.cat([counts.by_source, torch.stack([torch.ones_like(active), active, unmet])])
    record[: Field.VISUAL].add_(by_source.sum(1))
    record[Field.VISUAL : Field.KEPT].add_(torch.stack([visual, tokens.valid & ~finite]).sum(1))

    action = torch.where(kept, plan.rerouted, 2)[:, :top_k]  # kept, rerouted, dropped
    mass = planned * to_fixed(routing.weights[:, :top_k], MASS_UNIT)
    visual_planned = planned & visual[:, None]
    chosen, placed = routing.experts[:, :top_k].clamp(min=0), plan.experts.clamp(min=0)
    load_visual, load_before, load_after = (len(Field) + row * num_experts for row in range(len(LOADS)))
    amounts = [
        (Field.KEPT + action, planned),
        (Field.KEPT_MASS + action, mass),
        (Field.VISUAL_KEPT + action, visual_planned),
        (load_visual + chosen, visual_planned),
        (load_before + chosen, planned),
        (load_after + placed, tokens.valid[:, None] & kept),
    ]
    index, amount = (torch.cat(columns, 1).flatten() for columns in zip(*amounts, strict=True))
    record.scatter_add_(0, index, amount)


def routing_from_map(chosen: Tensor, probs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``Plan.as_map``.

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
