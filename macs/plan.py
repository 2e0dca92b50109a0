"""What a policy returns: the plan of one MoE layer, and what it did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .capacity import LoadTable, loads_of
from .fixed_point import MASS_UNIT, UNIT, to_fixed
from .modality import Tokens
from .ops import fused

SCALARS: dict[str, int] = {
    "sources": 1,
    "planned": 1,
    "tokens": 1,
    "visual": 1,
    "weight": UNIT,
    "visual_weight": UNIT,
    "nonfinite": 1,
    "unmet": 1,
    "kept": 1,
    "rerouted": 1,
    "dropped": 1,
    "kept_mass": MASS_UNIT,
    "rerouted_mass": MASS_UNIT,
    "dropped_mass": MASS_UNIT,
}
"""What a plan did, in numbers, and the unit each is counted in, in the order of a record."""

LOADS = "load_visual", "load_before", "load_after"


def scalar_of(records: Tensor, name: str) -> Tensor:
    """A number of ``SCALARS`` out of records int64 [..., scalars + 3 E]: float64 [...]."""
    return records[..., list(SCALARS).index(name)].double() / SCALARS[name]


@dataclass(frozen=True)
class PlanStatistics:
    """What a plan did, on the plan's device; every field adds up over sources and ranks.

    record int64 [scalars + 3 E]: whole numbers, so that sums are exact in any order. Its numbers go by
    name: each of ``SCALARS`` is a float64 scalar, ``planned`` the sources that planned (0: all were left
    alone), masses sums of combine weights; ``load_visual``, ``load_before`` and ``load_after`` are int64
    [E], valid tokens' assignments: what visual ones asked for, what all asked for, what they got.
    """

    record: Tensor

    @classmethod
    def scalar_names(cls) -> tuple[str, ...]:
        return tuple(SCALARS)

    def __getattr__(self, name: str) -> Tensor:
        if name in SCALARS:
            return scalar_of(self.record, name)
        if name in LOADS:
            return self.record[len(SCALARS) :].view(len(LOADS), -1)[LOADS.index(name)]
        raise AttributeError(f"PlanStatistics has no {name!r}; it has {', '.join((*SCALARS, *LOADS))}")


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
        return map_of(self.experts, self.weights, num_experts)


@fused("combine")
def map_of(experts: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """A multi-hot map bool [T, E] of experts int64 [T, m] (-1: none), and their weights [T, m], so too."""
    column = experts.masked_fill(experts < 0, num_experts)
    chosen = column.new_zeros(len(column), num_experts + 1, dtype=torch.bool).scatter_(1, column, True)
    probs = weights.new_zeros(len(column), num_experts + 1).scatter_(1, column, weights)
    return chosen[:, :num_experts].contiguous(), probs[:, :num_experts].contiguous()


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


@fused("statistics")
def describe(
    tokens: Tokens, loads: LoadTable, experts: Tensor, weights: Tensor, outcome: Outcome
) -> PlanStatistics:
    """Statistics of a plan for what a router chose, experts int64 [T, k] and weights [T, k]."""
    num_experts, top_k = loads.rows.shape[1], experts.shape[1]
    placed, rerouted = outcome.placed[:, :top_k], outcome.rerouted[:, :top_k]
    asked = tokens.valid[:, None] & (experts >= 0)
    state = torch.where(rerouted, REROUTED, (placed < 0) * DROPPED)
    state = state.masked_fill(~asked, UNCOUNTED).flatten()
    mass = to_fixed(weights, MASS_UNIT).flatten()
    both = torch.stack([torch.ones_like(mass), mass])
    counts = both.new_zeros(2, 4).index_add_(1, state, both)[:, :UNCOUNTED]
    visual = tokens.visual
    scalars = (
        torch.ones_like(outcome.active).sum(),
        outcome.active.sum(),
        loads.tokens.sum(),
        visual.sum(),
        loads.weight.sum(),
        loads.visual_weight.sum(),
        (~outcome.finite & tokens.valid).sum(),
        (outcome.unmet & outcome.active).sum(),
    )
    after = outcome.placed.masked_fill(~tokens.valid[:, None], -1)
    return PlanStatistics(
        torch.cat(
            [
                torch.stack(scalars),
                counts.flatten(),
                loads_of(experts.masked_fill(~(asked & visual[:, None]), -1), num_experts),
                loads_of(experts.masked_fill(~asked, -1), num_experts),
                loads_of(after, num_experts),
            ]
        )
    )
