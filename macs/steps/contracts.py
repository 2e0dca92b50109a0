"""Values that the steps of a plan hand to one another.

Shapes: T tokens, D features, E experts, k assignments of a token (k' with those a policy adds), S sources,
R ranks, P pools. An *assignment* is one (token, expert) pair. A *pool* has a capacity: one expert, or the
experts of one rank together, once for each source.

Loads, costs, capacities and priorities are int64 in fixed point: sums of floats depend on the order of
addition, and a plan is to be the same on every rank, device and engine. Where floats have to be summed first,
they are summed in float64 and the result is quantised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
from torch import Tensor

from ..tokens import Tokens

UNIT = 1 << 16
"""The weight of one whole token; capacities and costs are counted in 1/65536 of a token."""

PRIORITY_BITS = 24
"""Priorities are integers from 0 to 2 ** 24."""

MASS_UNIT = 1 << 20
"""Combine weights are counted in 1/1048576 where shares of them are compared."""

VALUE_UNIT = 1 << 18
"""Moments of entropy and distinctness are quantised to 1/262144."""


def to_fixed(values: Tensor, unit: int) -> Tensor:
    """Nearest integer count of ``1 / unit``, int64; NaN counts as 0."""
    return torch.nan_to_num(values.double() * unit, nan=0.0).round().long()


class Field(IntEnum):
    """The scalars of a record and their positions in it; three loads of E numbers follow them."""

    TOKENS = 0
    WEIGHT = 1
    VISUAL_WEIGHT = 2
    SOURCES = 3
    PLANNED = 4
    UNMET = 5
    VISUAL = 6
    NONFINITE = 7
    KEPT = 8
    REROUTED = 9
    DROPPED = 10
    KEPT_MASS = 11
    REROUTED_MASS = 12
    DROPPED_MASS = 13
    VISUAL_KEPT = 14
    VISUAL_REROUTED = 15
    VISUAL_DROPPED = 16


UNITS = {Field.WEIGHT: UNIT, Field.VISUAL_WEIGHT: UNIT} | dict.fromkeys(
    (Field.KEPT_MASS, Field.REROUTED_MASS, Field.DROPPED_MASS), MASS_UNIT
)
"""Fixed-point units of the scalars that are not plain counts."""

LOADS = "load_visual", "load_before", "load_after"


def record_size(num_experts: int) -> int:
    """Numbers in the record of a layer with E experts."""
    return len(Field) + len(LOADS) * num_experts


@dataclass(frozen=True)
class LayerConstants:
    """Tensors that all plans of a layer share, on one device."""

    pool_of_expert: Tensor  # int64 [E] in 0..P-1
    rank_of_expert: Tensor  # int64 [E] in 0..R-1
    affinity: Tensor  # float32 [E, E]: similarity in 0..1, 0 where rerouting is not allowed
    modality_bias: Tensor  # float64 [E]: m_j in -1..1
    target_load: Tensor  # float64 [1]; inf: rows are not bounded
    local_experts: Tensor  # int64 [S, G]: experts on each source's rank
    pools: int  # P
    ranks: int  # R
    min_tokens: int  # a source with fewer valid tokens does not plan

    def to(self, device: torch.device) -> LayerConstants:
        """The same values on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Counts:
    """Sums over the tokens of one plan, in one allocation that is zeroed by one launch.

    by_source [3, S]    valid tokens; sums of all and of visual semantic weights
    rows [S, E]         assignments to each expert
    cost [S, E]         the same by token weight, where an assignment costs its weight
    record [17 + 3 E]   ``Field`` and ``LOADS``
    moments [3, S K]    float64, of K modalities: number, sum and sum of squares of the values to normalise
    directions [S, D]   float64: sum of unit feature vectors of visual tokens
    All but the last two are int64.
    """

    by_source: Tensor
    rows: Tensor
    cost: Tensor
    record: Tensor
    moments: Tensor
    directions: Tensor

    @classmethod
    def zeros(cls, shapes: dict[str, tuple[int, ...]], device: torch.device) -> Counts:
        """Zeros of these shapes; fields without one are empty."""
        # Multiples of 16 bytes, or Triton would compile a kernel for each alignment.
        sizes = [-(-math.prod(shape) // 2) * 2 for shape in shapes.values()]
        memory = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        views, start = dict.fromkeys(cls.__dataclass_fields__, memory[:0]), 0
        for (name, shape), size in zip(shapes.items(), sizes, strict=True):
            views[name] = memory.as_strided(shape, (*shape[1:], 1), start)
            start += size
        for name in {"moments", "directions"} & shapes.keys():
            views[name] = views[name].view(torch.float64)
        return cls(**views)

    @property
    def tokens(self) -> Tensor:
        """Valid tokens of each source, int64 [S]."""
        return self.by_source[0]


@dataclass(frozen=True)
class Routing:
    """The router's output: experts int64 [T, k'] (-1: none), weights [T, k'] (combine weights), scores [T, E]
    in 0..1 (0 where a token may not be sent). The first ``top_k`` columns are the router's own; a policy may
    append others."""

    experts: Tensor
    weights: Tensor
    scores: Tensor
    top_k: int


@dataclass(frozen=True)
class TokenWeights:
    """Semantic weights int64 [T] in 1..UNIT; finite bool [T]: tokens with finite features, if requested."""

    weight: Tensor
    finite: Tensor | None


@dataclass(frozen=True)
class AdmissionRule:
    """priority: "score" or "product" (score times weight). by_weight: an assignment costs its token's weight,
    otherwise one."""

    priority: str
    by_weight: bool


@dataclass(frozen=True)
class CapacityRule:
    """capacity_factor: gamma, or none where capacities meet ``target_load``. rows_only: the capacity of a
    rank's pool is its bound on rows. modality_strength: rho. floor: least capacity of a pool, in tokens."""

    capacity_factor: float | None
    rows_only: bool
    modality_strength: float
    floor: float


@dataclass(frozen=True)
class Demand:
    """The assignments to plan.

    weight int64 [T]            semantic weights
    admission_key int64 [T, k'] ascending by falling priority, then by position; unique
    planned bool [T, k']        False: padding, which stays where it is and is not counted
    """

    routing: Routing
    tokens: Tokens
    weight: Tensor
    rule: AdmissionRule
    admission_key: Tensor
    planned: Tensor

    @property
    def cost(self) -> Tensor:
        """Capacity that one assignment of each token takes, int64 [T, 1]."""
        return (self.weight if self.rule.by_weight else torch.full_like(self.weight, UNIT))[:, None]


@dataclass(frozen=True)
class Capacities:
    """pools int64 [S, P]; rows int64 [S, R] where the rows of a rank have a separate bound; active bool [S]:
    sources that plan (the others are unbounded). bounded: whether rows are bounded at all."""

    pools: Tensor
    rows: Tensor | None
    active: Tensor
    bounded: bool


@dataclass(frozen=True)
class Placement:
    """experts int64 [T, k'] (-1: not placed); remaining int64 [S, P] and remaining_rows int64 [S, R], what is
    left of ``Capacities``; moved: whether assignments may be at other experts than the router's. A step may
    change in place what the step before allocated."""

    experts: Tensor
    remaining: Tensor
    remaining_rows: Tensor | None = None
    moved: bool = field(default=False, kw_only=True)
