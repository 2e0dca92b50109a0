"""What a policy returns: the plan of one MoE layer, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .capacity import LoadTable, loads_of
from .fixed_point import UNIT
from .modality import Tokens


@dataclass(frozen=True)
class PlanStatistics:
    """What a plan did, on the plan's device; every field adds up over sources and ranks.

    Scalars are float64. ``planned`` counts the sources that planned (0: all were left alone).
    Masses are sums of combine weights. Loads [E] count assignments (rows), valid tokens' only: what
    visual tokens asked for, what all asked for, and what they got.
    """

    sources: Tensor
    planned: Tensor
    tokens: Tensor
    visual: Tensor
    weight: Tensor
    visual_weight: Tensor
    nonfinite: Tensor
    unmet: Tensor
    kept: Tensor
    rerouted: Tensor
    dropped: Tensor
    kept_mass: Tensor
    rerouted_mass: Tensor
    dropped_mass: Tensor
    load_visual: Tensor
    load_before: Tensor
    load_after: Tensor

    @classmethod
    def scalar_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls) if not f.name.startswith("load_"))

    def pack(self) -> Tensor:
        """float64 [scalars + 3 E]."""
        scalars = torch.stack([getattr(self, name).double() for name in self.scalar_names()])
        loads = torch.cat([self.load_visual, self.load_before, self.load_after])
        return torch.cat([scalars, loads.double()])


@dataclass(frozen=True)
class Plan:
    """Where every assignment of a layer's tokens goes.

    experts  int64 [T, k']  -1: dropped
    weights  [T, k']        combine weights, in the dtype they came in; 0 where dropped
    rerouted bool [T, k']
    k' is k for every policy but expanded drop, which may add the experts local to the token's rank.
    """

    experts: Tensor
    weights: Tensor
    rerouted: Tensor
    statistics: PlanStatistics

    def as_map(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """The plan as multi-hot routing_map bool [T, E] and probs [T, E], in the weights' dtype."""
        rows = self.experts.shape[0]
        column = torch.where(self.experts >= 0, self.experts, num_experts)
        routing_map = torch.zeros(
            rows, num_experts + 1, dtype=torch.bool, device=self.experts.device
        ).scatter_(1, column, True)
        probs = torch.zeros(
            rows, num_experts + 1, dtype=self.weights.dtype, device=self.experts.device
        ).scatter_(1, column, self.weights)
        return routing_map[:, :num_experts].contiguous(), probs[:, :num_experts].contiguous()


def describe(
    tokens: Tokens,
    table: LoadTable,
    experts: Tensor,
    weights: Tensor,
    placed: Tensor,
    rerouted: Tensor,
    own: Tensor,
    nonfinite: Tensor,
    active: Tensor,
    unmet: Tensor,
) -> PlanStatistics:
    """Statistics of a plan that put experts [T, k'] at placed [T, k'].

    table: the sources' loads. own bool [k']: the router's own columns. nonfinite bool [T]: tokens
    whose features are not finite. active, unmet bool [S]: sources that planned, and those of them
    with a guard that could not be met.
    """
    asked = tokens.valid[:, None] & (experts >= 0) & own
    stays = asked & (placed == experts)
    moved = asked & rerouted
    gone = asked & (placed < 0)
    mass = torch.where(asked, torch.nan_to_num(weights.double()), 0.0)
    num_experts = table.cost.shape[1]

    return PlanStatistics(
        sources=torch.ones_like(active).sum(),
        planned=active.sum(),
        tokens=table.tokens.sum(),
        visual=tokens.visual.sum(),
        weight=table.weight.sum() / UNIT,
        visual_weight=table.visual_weight.sum() / UNIT,
        nonfinite=(nonfinite & tokens.valid).sum(),
        unmet=unmet.sum(),
        kept=stays.sum(),
        rerouted=moved.sum(),
        dropped=gone.sum(),
        kept_mass=torch.where(stays, mass, 0.0).sum(),
        rerouted_mass=torch.where(moved, mass, 0.0).sum(),
        dropped_mass=torch.where(gone, mass, 0.0).sum(),
        load_visual=loads_of(torch.where(asked & tokens.visual[:, None], experts, -1), num_experts),
        load_before=loads_of(torch.where(asked, experts, -1), num_experts),
        load_after=loads_of(torch.where(tokens.valid[:, None], placed, -1), num_experts),
    )
