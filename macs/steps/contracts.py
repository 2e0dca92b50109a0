"""What the steps of a plan hand to one another.

Shapes: T tokens, D features, E experts, k assignments of a token (k' with those a policy adds), S sources,
R ranks, P pools. An *assignment* is one (token, expert) pair; a *pool* is what has a capacity: an expert or
the experts of a rank together, once for each source. Loads, costs, capacities and priorities are int64 (see
``fixed_point``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..tokens import Tokens
from .fixed_point import MASS_UNIT, UNIT

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
    "visual_kept": 1,
    "visual_rerouted": 1,
}
"""What a plan did, in numbers, and the unit each is counted in, in the order of a record."""

LOADS = "load_visual", "load_before", "load_after"
"""Of a record, behind the scalars: three times E numbers."""


@dataclass(frozen=True)
class Constants:
    """What the plans of a layer have in common, on one device."""

    pool_of_expert: Tensor  # int64 [E] in 0..P-1
    rank_of_expert: Tensor  # int64 [E] in 0..R-1
    affinity: Tensor  # float32 [E, E], similarity in 0..1; 0 where rerouting may not go
    modality_bias: Tensor  # float64 [E]: m_j in -1..1
    reachable: Tensor  # bool [E, E], where rerouting may go
    bounds: Tensor  # float64 [2], ``capacity.bounds_of`` the settings
    places: Tensor  # int64 [S], where sources stand among those whose tokens meet
    local_experts: Tensor  # int64 [S, G], the experts on each source's own rank
    pools: int  # P
    ranks: int  # R
    min_tokens: int  # with fewer valid tokens a source does not plan

    def to(self, device: torch.device) -> Constants:
        """The same on another device."""
        moved = {name: one.to(device) for name, one in vars(self).items() if isinstance(one, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sums:
    """What the steps of one plan add up: whole numbers, so that the order of addition does not matter, in
    memory that is cleared at once. All int64.

    directions [S, D]   of visual tokens, by source (distinct weights)
    moments [3, G]      of what is normalised in each of G groups: number, sum, sum of squares
    tokens [S]          valid ones
    weight [S], visual_weight [S]  the sums of their weights, and of those of visual ones
    rows [S, E]         assignments that are asked of each expert
    cost [S, E]         the same by the tokens' weights, where that is what an assignment costs
    record [16 + 3 E]   ``SCALARS`` and ``LOADS``
    """

    directions: Tensor
    moments: Tensor
    tokens: Tensor
    weight: Tensor
    visual_weight: Tensor
    rows: Tensor
    cost: Tensor
    record: Tensor

    @classmethod
    def zeros(cls, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> Sums:
        """Nothing added yet, of these shapes; those not named are empty."""
        wanted = {name: shapes.get(name, (0,)) for name in cls.__dataclass_fields__}
        # Each begins at a multiple of 16 bytes, or kernels would be compiled for every place it may begin at.
        sizes = [-(-math.prod(shape) // 2) * 2 for shape in wanted.values()]
        parts = torch.zeros(sum(sizes), dtype=torch.int64, device=device).split(sizes)
        return cls(
            **{
                name: part[: math.prod(shape)].view(shape)
                for (name, shape), part in zip(wanted.items(), parts, strict=True)
            }
        )

    @property
    def device(self) -> torch.device:
        return self.rows.device


@dataclass(frozen=True)
class Choice:
    """What a router chose, and behind it what a policy adds.

    experts int64 [T, k'] (-1: none), weights [T, k'] their combine weights, scores [T, E] of every expert,
    0..1, 0 where a token may not be sent; top_k: k, the columns that are the router's own.
    """

    experts: Tensor
    weights: Tensor
    scores: Tensor
    top_k: int

    @property
    def device(self) -> torch.device:
        return self.experts.device


@dataclass(frozen=True)
class Weighed:
    """Semantic weights int64 [T] in 1..UNIT; finite bool [T], which tokens' features are, where that was
    asked for."""

    weight: Tensor
    finite: Tensor | None


@dataclass(frozen=True)
class Terms:
    """How assignments are ordered and counted: priority "score" or "product" (of score and weight);
    by_weight: an assignment costs its token's weight, otherwise one."""

    priority: str
    by_weight: bool


@dataclass(frozen=True)
class Demand:
    """The assignments to be planned.

    weight int64 [T]        semantic weights
    order int64 [T, k']     by falling priority, then place; different for all
    planned bool [T, k']    False: stays as it is and counts nowhere (padding)
    """

    choice: Choice
    tokens: Tokens
    weight: Tensor
    terms: Terms
    order: Tensor
    planned: Tensor

    @property
    def device(self) -> torch.device:
        return self.order.device

    @property
    def cost(self) -> Tensor:
        """What one assignment of each token takes from a capacity, int64 [T]."""
        return self.weight if self.terms.by_weight else torch.full_like(self.weight, UNIT)


@dataclass(frozen=True)
class Room:
    """Capacities: pools int64 [S, P]; rows int64 [S, R] where the rows of a rank have a bound of their own
    beside it; active bool [S]: which sources plan at all, the others' room has no bound. bounded: whether
    there is a bound on rows, of its own or as the pools' capacity."""

    pools: Tensor
    rows: Tensor | None
    active: Tensor
    bounded: bool


@dataclass(frozen=True)
class Placement:
    """Where assignments stand: experts int64 [T, k'] (-1: nowhere yet), and what room is left: room int64
    [S, P], row_room int64 [S, R], none where rows have no bound of their own.

    A plan's own: a step may change in place what the step before made.
    """

    experts: Tensor
    room: Tensor
    row_room: Tensor | None
