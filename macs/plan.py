"""What a policy returns: the plan of one MoE layer, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .capacity import LoadTable, loads_of
from .fixed_point import MASS_UNIT, UNIT, to_fixed
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
    """Where every assignment of a layer's tokens goes; statistics only where they were asked for.

    experts  int64 [T, k']  -1: dropped
    weights  [T, k']        combine weights, in the dtype they came in; 0 where dropped
    rerouted bool [T, k']
    k' is k for every policy but expanded drop, which may add the experts local to the token's rank.
    """

    experts: Tensor
    weights: Tensor
    rerouted: Tensor
    statistics: PlanStatistics | None

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


@dataclass(frozen=True)
class Outcome:
    """What became of a plan, for ``describe``.

    placed int64 [T, k']: where assignments ended (-1: dropped). rerouted bool [T, k']. active, unmet
    bool [S]: sources that planned, and those of them with a guard that could not be met. finite bool [T]:
    tokens whose features are.
    """

    placed: Tensor
    rerouted: Tensor
    active: Tensor
    unmet: Tensor
    finite: Tensor


KEPT, REROUTED, DROPPED, UNCOUNTED = range(4)


def describe(
    tokens: Tokens, loads: LoadTable, experts: Tensor, weights: Tensor, outcome: Outcome
) -> PlanStatistics:
    """Statistics of a plan for what a router chose, experts int64 [T, k] and weights [T, k]."""
    num_experts, top_k = loads.rows.shape[1], experts.shape[1]
    placed, rerouted = outcome.placed[:, :top_k], outcome.rerouted[:, :top_k]
    asked = tokens.valid[:, None] & (experts >= 0)
    state = torch.where(rerouted, REROUTED, torch.where(placed < 0, DROPPED, KEPT))
    state = torch.where(asked, state, UNCOUNTED).flatten()
    counts = state.new_zeros(4).scatter_add(0, state, torch.ones_like(state))
    mass = to_fixed(weights, MASS_UNIT).flatten()  # whole numbers, which add up in any order
    masses = mass.new_zeros(4).scatter_add(0, state, mass) / MASS_UNIT
    before = loads.rows.sum(0)
    if outcome.placed.shape[1] > top_k:  # loads hold what the policy added too
        before = loads_of(torch.where(asked, experts, -1), num_experts)
    return PlanStatistics(
        sources=outcome.active.new_full((), outcome.active.numel(), dtype=torch.int64),
        planned=outcome.active.sum(),
        tokens=loads.tokens.sum(),
        visual=tokens.visual.sum(),
        weight=loads.weight.sum() / UNIT,
        visual_weight=loads.visual_weight.sum() / UNIT,
        nonfinite=(~outcome.finite & tokens.valid).sum(),
        unmet=(outcome.unmet & outcome.active).sum(),
        kept=counts[KEPT],
        rerouted=counts[REROUTED],
        dropped=counts[DROPPED],
        kept_mass=masses[KEPT],
        rerouted_mass=masses[REROUTED],
        dropped_mass=masses[DROPPED],
        load_visual=loads_of(torch.where(asked & tokens.visual[:, None], experts, -1), num_experts),
        load_before=before,
        load_after=loads_of(torch.where(tokens.valid[:, None], outcome.placed, -1), num_experts),
    )
