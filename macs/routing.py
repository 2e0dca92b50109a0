"""The plan of one MoE layer, and what it did."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .steps.combine import map_of
from .steps.contracts import LOADS, UNITS, Field


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
        return map_of(self.experts, self.weights, num_experts)
